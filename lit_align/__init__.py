"""Preference optimization of language models whose anchors move, as PyTorch Lightning modules."""

__version__ = "0.1.0"
