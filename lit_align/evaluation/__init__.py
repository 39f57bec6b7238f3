"""The policy on held-out prompts, against the start."""
