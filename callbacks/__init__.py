"""A door: the callbacks' code is in `lit_align/callbacks/`, one file each. These names are the same objects."""

from lit_align.callbacks import *  # noqa: F403
from lit_align.callbacks import __all__  # noqa: F401
