"""Results that each process computes for its batches of prompts, and all of them together, in temporary files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Trainer

from lit_align.console import phase
from lit_align.data.formats.spool import Spool
from lit_align.sharding import in_turns

T = TypeVar("T")
Batches = Sequence[Sequence[int]]
"""Places of the prompts of each batch."""


class Share(Mapping[int, Sequence[T]], Generic[T]):
    """Results of this process's batches, by the batch's number."""

    def __init__(self, numbers: Sequence[int], results: Iterator[Sequence[T]]):
        self._results = Spool(results)
        self._places = {number: place for place, number in enumerate(numbers)}

    def __getitem__(self, number: int) -> Sequence[T]:
        return self._results[self._places[number]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class InOrder(Sequence[T], Generic[T]):
    """Results of all batches, in the order of the prompts."""

    def __init__(self, batches: Batches, results: Iterator[T]):
        self._results = Spool(results)
        self._places = np.argsort(np.fromiter(chain.from_iterable(batches), np.int64))

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._results[i] for i in self._places[place].tolist()]
        return self._results[int(self._places[place])]

    def __iter__(self) -> Iterator[T]:
        return map(self._results.__getitem__, self._places.tolist())


def compute_share(
    trainer: Trainer,
    batches: Batches,
    name: str | None,
    compute: Callable[[Sequence[int]], Sequence[T]],
    idle: Callable[[], object] = lambda: None,
) -> Share[T]:
    """`compute` of the places of each of this process's batches, one in each turn of all processes.

    Args:
        name: Shown beside a progress bar; None shows none.
        idle: Called in the last turn by a process without a batch, where all compute together.
    """

    def results() -> Iterator[Sequence[T]]:
        with phase(name, sum(map(len, batches)), "prompts") if name else nullcontext() as bar:
            for turn, own in in_turns(batches, trainer.global_rank, trainer.world_size):
                if own is not None:
                    yield compute(own)
                else:
                    idle()
                if bar is not None:
                    bar.advance(sum(map(len, turn)))

    return Share(range(trainer.global_rank, len(batches), trainer.world_size), results())


def gather_in_order(trainer: Trainer, batches: Batches, share: Mapping[int, Sequence[T]]) -> InOrder[T]:
    """The results of all processes, on every process; a batch at a time passes between them."""

    def results() -> Iterator[Sequence[T]]:
        for number in range(len(batches)):
            box: list[Any] = [share.get(number)]
            if trainer.world_size > 1:
                dist.broadcast_object_list(box, src=number % trainer.world_size)
            yield box[0]

    return InOrder(batches, chain.from_iterable(results()))
