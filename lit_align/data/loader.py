"""Batches of examples in a reproducible order; resumes in the middle of an epoch."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lit_align.data.batches import collate
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError, check_types
from lit_align.logprobs import PreferenceBatch


@dataclass(frozen=True)
class Mixture:
    """How often the examples of several sources, one after another in a list, are served in an epoch.

    A weight of 2 serves each example of its source twice. A weight of 0.3 serves 30 % of them: another share in each
    epoch, in turn, until all have been served. Which ones depends on seed and epoch alone.

    Args:
        counts: The number of examples of each source.
        weights: The weight of each source.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def size(self) -> int:
        """Examples of an epoch."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [max(1, round(count * weight)) for count, weight in zip(self.counts, self.weights, strict=True)]

    def indices(self, seed: int, epoch: int) -> NDArray[np.int32]:
        """Numbers of the examples of an epoch, source by source; in order if each is served equally often."""
        found: list[NDArray[np.int32]] = []
        start = 0
        for count, size in zip(self.counts, self._sizes, strict=True):
            order = np.arange(start, start + count, dtype=np.int32)
            if size % count:
                order = order[torch.randperm(count, generator=torch.Generator().manual_seed(seed + start)).numpy()]
            found.append(np.resize(np.roll(order, -(epoch * size % count)), size))
            start += count
        return np.concatenate(found)


class LoaderState(NamedTuple):
    """The place of a loader in an epoch, in a checkpoint.

    Args:
        served: Batches that are trained on.
        length: Batches of the epoch.
        examples_per_batch: Of all processes together.
        tokens: Of all examples, which identifies the data.
        weights: Of the sources; checkpoints of one source had none.
        open: Whether the epoch's end is left to do where all its batches were served.
    """

    served: int
    length: int
    examples_per_batch: int
    tokens: int
    weights: list = [1.0]  # noqa: RUF012  # read, never written
    open: bool = False


class ExampleLoader:
    """Batches of examples in an order that is a function of (seed, epoch); resumes in the middle of an epoch.

    Every process takes every world_size-th example. With several processes, examples left over after the last full
    batch of all processes are dropped (`dropped` per epoch), so that no process waits for another.

    Args:
        batch_size: Examples per batch and process.
        shuffle: Use a new order each epoch.
        group_by_length: Then put examples of similar length into one batch (of all processes together), within
            stretches of 32 batches, and shuffle the batches. An incomplete last one stays the last.
        epoch: Returns the current epoch; called when iteration begins.
        mixture: How often the examples of each source are served; None is once.
        length: Batches per epoch: the examples are repeated or cut short to fill it. None is one pass through all
            examples.
        pins: Put batches into page-locked memory, from which a GPU copies faster.
    """

    def __init__(
        self,
        examples: ExampleTable,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture | None = None,
        length: int | None = None,
        pins: bool = False,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.pins = pins
        self.mixture = mixture or Mixture((len(examples),), (1.0,))
        count = self.mixture.size if len(examples) else 0
        share = count // (batch_size * world_size) * batch_size if world_size > 1 else count
        self.share = share
        self.length = -(-share // batch_size) if length is None else length
        self.dropped = count - share * world_size
        self._served = 0
        self._resume_at = 0
        self._summed: tuple[tuple[int, int], NDArray[np.float64]] = (-1, -1), np.empty((0, 0))

    def __len__(self) -> int:
        return self.length

    def weight_of(self, batch: int) -> float:
        """The sum of the weights of the examples of one of the epoch's batches, on this process."""
        passage, place = divmod(batch, self._batches_once)
        if self.examples.weights is None:
            return min(self.batch_size, self.share - place * self.batch_size)
        return self._batch_weights(passage, self.examples.weights)[self.rank, place].item()

    def mean_weight_of(self, batch: int) -> float:
        """The mean of `weight_of` over all processes."""
        if self.examples.weights is None:
            return self.weight_of(batch)
        passage, place = divmod(batch, self._batches_once)
        return self._batch_weights(passage, self.examples.weights)[:, place].mean().item()

    def _batch_weights(self, passage: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of the weights of each batch, [processes, batches]."""
        key = (self.epoch(), passage)
        if key != self._summed[0]:
            served = weights[self._order(passage)][: self.share * self.world_size]
            starts = range(0, self.share, self.batch_size)
            sums = [np.add.reduceat(served[rank :: self.world_size], starts) for rank in range(self.world_size)]
            self._summed = key, np.stack(sums)
        return self._summed[1]

    @property
    def _batches_once(self) -> int:
        """Batches in which all examples are served once."""
        return -(-self.share // self.batch_size)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        start, self._resume_at = self._resume_at, 0  # now, not at the first batch: there may be none left
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[PreferenceBatch]:
        """The batches from one on; each is collated while the one before it is trained on."""
        self._served = start
        with ThreadPoolExecutor(1, "collate") as thread:
            ahead: Future[PreferenceBatch] | None = None
            for indices in self._indices(start):
                ready, ahead = ahead, thread.submit(self._collate, indices)
                if ready is not None:
                    self._served += 1
                    yield ready.result()
            if ahead is not None:
                self._served += 1
                yield ahead.result()

    def _indices(self, start: int) -> Iterator[NDArray[np.int32]]:
        """Numbers of the examples of each batch."""
        mine: dict[int, NDArray[np.int32]] = {}  # the examples of one passage, in order
        for number in range(start, self.length):
            passage, place = divmod(number, self._batches_once)
            if passage not in mine:
                mine = {passage: self._order(passage)[self.rank :: self.world_size][: self.share]}
            yield mine[passage][place * self.batch_size : (place + 1) * self.batch_size]

    def _collate(self, indices: NDArray[np.int32]) -> PreferenceBatch:
        places = indices.tolist()
        batch = collate(self.examples.views(places), places)
        return batch.pinned() if self.pins else batch

    def _order(self, passage: int) -> NDArray[np.int32]:
        """Numbers of the examples of all processes, which take turns."""
        order = self.mixture.indices(self.seed, self.epoch())
        if self.shuffle:
            key = self.seed * 1_000_003 + self.epoch() + passage * 999_999_937
            generator = torch.Generator().manual_seed(key)
            order = order[torch.randperm(len(order), generator=generator).numpy()]
            if self.group_by_length:
                order = self._grouped(order, generator)
        return order

    def _grouped(self, order: NDArray[np.int32], generator: torch.Generator) -> NDArray[np.int32]:
        size = self.batch_size * self.world_size
        full = len(order) // size * size
        batches = np.empty((full // size, size), np.int32)
        tokens = self.examples.lengths.total
        for start in range(0, full, 32 * size):
            some = order[start : min(start + 32 * size, full)]
            some = some[np.argsort(tokens[some], kind="stable")]
            batches[start // size :][: len(some) // size] = some.reshape(-1, size)
        shuffled = torch.randperm(len(batches), generator=generator).numpy()
        return np.concatenate([batches[shuffled].reshape(-1), order[full:]])

    def state_dict(self) -> dict[str, Any]:
        weights = list(self.mixture.weights)
        return LoaderState(self._served, len(self), self._examples_per_batch, self._tokens, weights)._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were served. An epoch that was served whole starts again, unless it is open:
        then its end alone is left to do.

        Raises:
            UserError: the data have changed, or batches were of another size, or more than there are now, so that their
                number does not tell which examples were served.
            TypeError: the state has other fields than a loader saves, or a field has another type.
        """
        then = check_types(LoaderState(**state))
        is_whole = then.served >= then.length
        if is_whole and not then.open:
            self._resume_at = 0
            return
        if then.examples_per_batch != self._examples_per_batch or then.served >= len(self) + is_whole:
            raise UserError(
                f"the checkpoint is from the middle of an epoch of {then.length} batches of "
                f"{then.examples_per_batch} examples, and now there are {len(self)} of {self._examples_per_batch} "
                f"(data.batch_size={self.batch_size} × {self.world_size} processes; of a stream of texts "
                "data.text_batch_size): some would be trained on twice, or never. Restore that size, or resume from "
                "the end of an epoch."
            )
        if then.weights != list(self.mixture.weights):
            raise UserError(
                f"the checkpoint is from the middle of an epoch of sources with the weights {then.weights}, and "
                f"now they are {list(self.mixture.weights)}. Restore those, or resume from the end of an epoch."
            )
        if then.tokens != self._tokens:
            raise UserError(
                f"the checkpoint is from the middle of an epoch over {then.tokens} tokens of data, and now there "
                f"are {self._tokens}: the data have changed, and some would be trained on twice, or never. Restore "
                "the data, or resume from the end of an epoch."
            )
        self._resume_at = then.served

    @cached_property
    def _tokens(self) -> int:
        """Number of tokens of all examples, which identifies the data."""
        return int(self.examples.lengths.total.sum())

    @property
    def _examples_per_batch(self) -> int:
        """Examples per batch of all processes together: a checkpoint may move between one process and several."""
        return self.batch_size * self.world_size
