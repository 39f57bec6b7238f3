"""A start without scipy.signal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_scipy_signal() -> Iterator[None]:
    """Import torchmetrics without scipy.signal, which would take about 0.8 s of CPU time.

    torchmetrics imports it only to restore `scipy.signal.hamming`, which one audio metric uses; a stub that has the
    name satisfies it. Afterwards the stub is gone, and code that needs scipy.signal imports the real one.
    """
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    stub = ModuleType(name)
    stub.hamming = None  # type: ignore[attr-defined]
    sys.modules[name] = stub
    try:
        yield
    finally:
        del sys.modules[name]
