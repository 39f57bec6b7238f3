"""Preference optimization of language models whose anchors move, as PyTorch Lightning modules."""

__version__ = "0.2.0"
