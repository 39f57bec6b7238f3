"""Tokenized examples in Arrow memory: a file that is mapped rather than read, or a few record batches.

    examples.arrow     prompt      list<int32>
                       responses   list<list<int32>>
                       source      binary, UTF-8
                       weight      double
                       rewards, sampler_logps, …   list<double>, where the examples have them
                       text                        of prompts to sample from, with what is beside them: as JSON
                       texts, preferences          of groups that a pairing rule chooses from

A table of any size costs a process a few numbers per example (`lengths`). Tokens become Python objects only where an
example is shown; batches are padded from NumPy views of the file.
"""

import copy
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_align.data.batches import Example
from lit_align.files import writing

CHUNK = 512
"""Examples of one record batch: this many are Python objects while a table is written."""
SAMPLED = 512
"""Examples of a sample are at least this many."""
NUMBERS = ("rewards", "labels", "win_probabilities", "sampler_logps", "reference_logps", "weight")
"""Fields of an example that hold a number for each response; `labels` may be one for the example, `weight` is."""
OTHERS = ("texts", "preferences")
"""Fields of a group from which a pairing rule chooses."""
MISMATCHED = b"lit_align.mismatched"
TOKENS = pa.list_(pa.int32())
_UTF8 = ("utf-8", "surrogatepass")  # of names of files that are not UTF-8


@dataclass(frozen=True)
class _Lists:
    """The lists of an Arrow array, as views."""

    starts: NDArray[np.int32]
    values: NDArray[Any]

    @classmethod
    def of(cls, array: pa.ListArray) -> Self:
        return cls(np.asarray(array.offsets), np.asarray(array.values))

    def __getitem__(self, place: int) -> NDArray[Any]:
        return self.values[self.starts[place] : self.starts[place + 1]]


class _Chunk:
    """A record batch of examples."""

    def __init__(self, batch: pa.RecordBatch):
        groups = batch.column("responses")
        self.batch = batch
        self.size = batch.num_rows
        self.prompts = _Lists.of(batch.column("prompt"))
        self.responses = _Lists.of(groups.values)
        self.first = np.asarray(groups.offsets)  # the first response of each example
        self.is_mismatched = MISMATCHED in (batch.schema.metadata or {})
        self.numbers: dict[str, _Lists] = {}  # of each response
        self.singles: dict[str, NDArray[Any]] = {}  # of each example
        self.others = [name for name in OTHERS if name in batch.schema.names]
        for name in set(batch.schema.names) & set(NUMBERS):
            column = batch.column(name)
            if pa.types.is_list(column.type):
                self.numbers[name] = _Lists.of(column)
            else:
                self.singles[name] = np.asarray(column)

    @property
    def lengths(self) -> Sequence[NDArray[Any]]:
        """The fields of `Lengths`."""
        prompt, starts = np.diff(self.prompts.starts), self.responses.starts
        total = prompt + np.diff(starts[self.first])
        responses = np.diff(starts)
        has_some = len(responses) > 0  # prompts to sample from have none
        longest = np.maximum.reduceat(responses, self.first[:-1]) if has_some else np.zeros_like(prompt)
        return np.diff(self.first), prompt, total, longest

    def view(self, place: int) -> Example:
        """An example whose token ids and numbers are views."""
        responses = range(self.first[place], self.first[place + 1])
        numbers: dict[str, Any] = {name: lists[place] for name, lists in self.numbers.items()}
        numbers |= {name: values[place] for name, values in self.singles.items()}
        for name in self.others:
            numbers[name] = self.batch.column(name)[place].as_py()
        if "text" in self.batch.schema.names:
            names = ("prompt", "beside", "continues")
            numbers |= zip(names, json.loads(self.batch.column("text")[place].as_py()), strict=True)
        return Example(
            self.prompts[place],  # type: ignore[arg-type]
            [self.responses[k] for k in responses],  # type: ignore[misc]
            self.batch.column("source")[place].as_py().decode(*_UTF8),
            mismatched=self.is_mismatched,
            **numbers,
        )


@dataclass(frozen=True)
class Lengths:
    """The lengths of a table's examples, in tokens."""

    responses: NDArray[np.int32]  # K of each example: not tokens, but how many there are
    prompt: NDArray[np.int32]
    total: NDArray[np.int32]  # of the prompt and all responses
    longest: NDArray[np.int32]  # of the longest response

    @classmethod
    def of(cls, chunks: Sequence[_Chunk]) -> Self:
        found = np.empty((len(fields(cls)), sum(chunk.size for chunk in chunks)), np.int32)
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.size
            found[:, start:end] = chunk.lengths
        return cls(*found)

    def take(self, places: NDArray[np.int64]) -> Self:
        """The lengths of some examples."""
        return replace(self, **{name: values[places] for name, values in vars(self).items()})


class ExampleTable(Sequence[Example]):
    """Examples in Arrow memory. `table[i]` is an `Example` of Python lists; `views` copies nothing.

    Args:
        batches: None of them empty, all of the same columns.
        added: Numbers of each response that the batches do not hold, such as log-probabilities, [examples, K].
        order: Places in the batches of the table's examples; None is all, one after another, in no memory.
        digest: Identifies the tokens of all examples, where that is known: it is kept with a file.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        added: Mapping[str, NDArray[np.float64]] | None = None,
        order: NDArray[np.int64] | None = None,
        digest: str | None = None,
    ):
        self._chunks = [_Chunk(batch) for batch in batches]
        self._starts = np.cumsum([0, *(chunk.size for chunk in self._chunks)])
        self._added = dict(added or {})
        self._order = order
        lengths = Lengths.of(self._chunks)
        self.lengths = lengths if order is None else lengths.take(order)
        self.digest = digest

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self:
        """A table in memory."""
        return cls(list(_batches(examples)))

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> Self:
        """A table in a file, which is mapped.

        Args:
            digest: As for the class.

        Raises:
            pa.ArrowException, OSError: the file is damaged or not there.
        """
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            return cls([reader.get_batch(i) for i in range(reader.num_record_batches)], digest=digest)

    @classmethod
    def write(cls, path: Path, examples: Iterable[Example], option: str = "") -> Self:
        """Write examples to a file as they come, and open it. A table that is open at that path stays as it is.

        Args:
            option: The option that names another folder, in messages.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        return cls.write_batches(path, _batches(examples), option)

    @classmethod
    def write_batches(cls, path: Path, batches: Iterable[pa.RecordBatch], option: str = "") -> Self:
        """The same with the record batches of examples."""
        beside = path.with_name(f"{path.name}.new")
        writer: pa.RecordBatchFileWriter | None = None
        with writing(path, option):
            file = pa.OSFile(str(beside), "wb")
        with file:
            for batch in batches:
                with writing(path, option):
                    writer = writer or pa.ipc.new_file(file, batch.schema)
                    writer.write_batch(batch)
            with writing(path, option):
                if writer is not None:
                    writer.close()
        with writing(path, option):
            beside.replace(path)
        return cls([]) if writer is None else cls.open(path)

    @classmethod
    def temporary(cls, examples: Iterable[Example]) -> Self:
        """A table in a file that the system deletes with the process."""
        return cls.temporary_of_batches(_batches(examples))

    @classmethod
    def temporary_of_batches(cls, batches: Iterable[pa.RecordBatch]) -> Self:
        """The same with the record batches of examples."""
        with tempfile.TemporaryDirectory() as folder:
            return cls.write_batches(Path(folder, "examples.arrow"), batches, "TMPDIR")

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """The examples of several tables, one after another."""
        if len(tables) == 1:
            return tables[0]
        digests = [table.digest for table in tables]
        digest = None if None in digests else " ".join(map(str, digests))
        return cls([batch for table in tables for batch in table.batches], digest=digest)

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """The record batches."""
        return [chunk.batch for chunk in self._chunks]

    def with_numbers(self, name: str, numbers: NDArray[np.float64]) -> "ExampleTable":
        """The same examples with another number of each response.

        Args:
            name: One of NUMBERS.
            numbers: [examples, K].
        """
        table = copy.copy(self)
        table._added = self._added | {name: numbers}
        return table

    def reordered(self, order: NDArray[np.int64]) -> "ExampleTable":
        """The examples at some places, in that order."""
        added = {name: numbers[order] for name, numbers in self._added.items()}
        return ExampleTable(self.batches, added, order if self._order is None else self._order[order])

    def __len__(self) -> int:
        return len(self.lengths.prompt)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [_in_python(self._view(i)) for i in range(len(self))[place]]
        return _in_python(self._view(range(len(self))[place]))

    def __iter__(self) -> Iterator[Example]:
        return (_in_python(self._view(i)) for i in range(len(self)))

    def views(self, places: Iterable[int]) -> list[Example]:
        """Examples whose token ids and numbers are views of the table, not lists."""
        return [self._view(place) for place in places]

    def _view(self, place: int) -> Example:
        stored = place if self._order is None else self._order[place]
        number = int(np.searchsorted(self._starts, stored, "right")) - 1
        example = self._chunks[number].view(int(stored - self._starts[number]))
        return replace(example, **{name: numbers[place] for name, numbers in self._added.items()})  # type: ignore[arg-type]

    def numbers(self, name: str) -> NDArray[np.float64] | None:
        """One of NUMBERS of all examples, one after another; None if the examples do not have it for each response.

        All examples must have the same number of responses.
        """
        if name in self._added:
            return self._added[name].reshape(-1)
        if not self._chunks or name not in self._chunks[0].numbers:
            return None
        values = np.concatenate([chunk.numbers[name].values for chunk in self._chunks])
        return self._ordered(values.reshape(self._starts[-1], -1)).reshape(-1)

    def _ordered(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the examples in the batches, as those of the table."""
        return values if self._order is None else values[self._order]

    def digest_of_tokens(self) -> str:
        """Identifies the tokens of all examples in the batches, one after another."""
        found = hashlib.sha256()
        for chunk in self._chunks:
            for lists in (chunk.prompts, chunk.responses):
                found.update(np.diff(lists.starts).tobytes())
                found.update(lists.values[lists.starts[0] : lists.starts[-1]].tobytes())
            found.update(np.diff(chunk.first).tobytes())
        return found.hexdigest()

    def sample(self) -> tuple[list[Example], list[str]]:
        """All examples if they are few; otherwise evenly spaced ones, and a digest of the tokens of all."""
        stride = max(1, len(self) // SAMPLED)
        return self[::stride], [self.digest or self.digest_of_tokens()] if stride > 1 else []

    def digests_of_numbers(self) -> list[str]:
        """Identify the numbers that the batches hold of each response, such as labels and rewards, by their names."""
        found = {name: hashlib.sha256(name.encode()) for chunk in self._chunks for name in sorted(chunk.numbers)}
        for chunk in self._chunks:
            for name, lists in chunk.numbers.items():
                found[name].update(lists.values[lists.starts[0] : lists.starts[-1]].tobytes())
        return [each.hexdigest() for each in found.values()]

    @cached_property
    def weights(self) -> NDArray[np.float64] | None:
        """The weight of each example, as batches hold it: rounded to 32 bits. None if all are 1."""
        if all((chunk.singles["weight"] == 1).all() for chunk in self._chunks):
            return None
        weights = self._ordered(np.concatenate([chunk.singles["weight"] for chunk in self._chunks]))
        return weights.astype(np.float32).astype(np.float64)

    @property
    def group_sizes(self) -> Counter[int]:
        """How many examples have how many responses."""
        sizes, counts = np.unique(self.lengths.responses, return_counts=True)
        return Counter(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))


def digest_of_sample(count: int, total: int, sample: list[Any]) -> str:
    """Identifies token sequences by their number, their total length, some of them, and digests of all."""
    return hashlib.sha256(repr((count, total, sample)).encode()).hexdigest()[:16]


def _batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Record batches of examples that all have the same numbers."""
    rest = iter(examples)
    while some := list(islice(rest, CHUNK)):
        first = some[0]
        columns = {
            "prompt": _tokens([example.prompt_ids for example in some]),
            "responses": pa.ListArray.from_arrays(
                _offsets([example.response_ids for example in some]),
                _tokens([ids for example in some for ids in example.response_ids]),
            ),
            "source": pa.array([example.source.encode(*_UTF8) for example in some], pa.binary()),
        }
        for name in NUMBERS:
            value = getattr(first, name)
            if value is not None:
                kind = pa.float64() if isinstance(value, int | float) else pa.list_(pa.float64())
                columns[name] = pa.array([getattr(example, name) for example in some], kind)
        if first.prompt is not None:
            texts = [json.dumps([example.prompt, example.beside, example.continues]) for example in some]
            columns["text"] = pa.array(texts, pa.string())
        metadata = {MISMATCHED: b"1"} if first.mismatched else None
        schema = pa.schema([(name, column.type) for name, column in columns.items()], metadata)
        yield pa.record_batch(list(columns.values()), schema=schema)


def _tokens(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    values = np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in lists)])
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(values))


def _offsets(lists: Sequence[Sequence[Any]]) -> pa.Int32Array:
    """Where each list begins in all their values, and where the last ends."""
    return pa.array(np.cumsum([0, *map(len, lists)]), pa.int32())


def _in_python(example: Example) -> Example:
    numbers = {name: value.tolist() for name in NUMBERS if (value := getattr(example, name)) is not None}
    return replace(
        example,
        prompt_ids=example.prompt_ids.tolist(),  # type: ignore[attr-defined]
        response_ids=[ids.tolist() for ids in example.response_ids],  # type: ignore[attr-defined]
        **numbers,
    )
