"""Commands that measure, and the held-out scenes that the starter models are judged on."""
