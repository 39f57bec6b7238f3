"""Studies: pre-registered comparisons, each with its protocol, its programs and its results."""
