"""Values in a temporary file, so that the rows of a data set of any size take 8 bytes of memory each."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

from lit_align.files import writing

T = TypeVar("T")


class Spool(Sequence[T], Generic[T]):
    """A sequence whose values are pickled into a file without a name, which the system deletes with the process.

    Raises:
        UserError: the disk is full, or the system's folder of temporary files cannot be written to.
    """

    def __init__(self, values: Iterable[T]):
        self._ends = array("q", [0])
        folder = tempfile.gettempdir()
        with writing(folder, "TMPDIR"):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as the sequence
        for value in values:
            data = pickle.dumps(value)
            with writing(folder, "TMPDIR"):
                self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))
        with writing(folder, "TMPDIR"):
            self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        if isinstance(place, slice):
            return [self._load(i) for i in range(len(self))[place]]
        return self._load(range(len(self))[place])

    def __iter__(self) -> Iterator[T]:
        return map(self._load, range(len(self)))

    def _load(self, place: int) -> T:
        start, end = self._ends[place], self._ends[place + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))  # our own process wrote it
