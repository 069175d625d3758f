"""The only place that knows the host's internals."""
