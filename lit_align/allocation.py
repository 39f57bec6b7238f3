"""Keep the memory that tensors free, so that the next tensors need no fresh pages from the kernel.

glibc gives each large block back to the kernel when it is freed. A training step then gets gigabytes of zeroed pages
again and again. `keep_freed_memory` moves glibc's thresholds (mallopt(3)), so that freed memory stays in the heap: the
process keeps its peak, which was up to a tenth higher than without. `docs/speed.md` has the figures.
"""

import ctypes
import os

SWITCH = "LIT_ALIGN_KEEP_MEMORY"
"""Environment variable; 0 leaves glibc's thresholds as they are."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's options in malloc.h
_USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_kept = False


def keep_freed_memory() -> None:
    """Keep freed memory from now on. Call this before the first tensor.

    Does nothing if `LIT_ALIGN_KEEP_MEMORY=0`, if the user configures glibc through its own environment variables, or
    if the C library is not glibc.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or os.environ.get(SWITCH) == "0" or any(name in os.environ for name in _USERS_OWN):
        return
    _kept = bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def keeps_freed_memory() -> bool:
    """Whether this process keeps the memory that its tensors free."""
    return _kept
