"""The way to a quantised file: calibrate, solve or round, write. The files are those of `quant`."""
