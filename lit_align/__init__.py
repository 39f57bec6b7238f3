"""Preference optimization of language models whose anchors move, as PyTorch Lightning modules."""

import sys

__version__ = "0.2.0"

if sys.platform == "win32":
    raise ImportError("lit_align needs Linux or macOS. On Windows, use it within WSL 2.")
