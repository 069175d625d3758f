"""Commands that measure, and the scenes the starter models are trained and judged on."""
