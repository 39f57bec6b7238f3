"""Batches of examples in a reproducible order; resumes in the middle of an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lit_align.data.batches import Example, collate
from lit_align.errors import UserError
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

    def indices(self, seed: int, epoch: int) -> list[int]:
        """Numbers of the examples of an epoch, source by source; in order if each is served equally often."""
        found: list[int] = []
        start = 0
        for count, size in zip(self.counts, self._sizes, strict=True):
            order = list(range(count))
            if size % count:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + start)).tolist()
            found += [start + order[i % count] for i in range(epoch * size, (epoch + 1) * size)]
            start += count
        return found


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
    """

    def __init__(
        self,
        examples: Sequence[Example],
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
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.mixture = mixture or Mixture((len(examples),), (1.0,))
        count = self.mixture.size if len(examples) else 0
        share = count // (batch_size * world_size) * batch_size if world_size > 1 else count
        self.share = share
        self.length = -(-share // batch_size) if length is None else length
        self.dropped = count - share * world_size
        self._served = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return self.length

    def size_of(self, batch: int) -> int:
        """Examples of one of the epoch's batches, on this process."""
        return min(self.batch_size, self.share - batch % self._batches_once * self.batch_size)

    @property
    def _batches_once(self) -> int:
        """Batches in which all examples are served once."""
        return -(-self.share // self.batch_size)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        start, self._resume_at = self._resume_at, 0  # now, not at the first batch: there may be none left
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[PreferenceBatch]:
        once = self._batches_once
        self._served = start
        mine: dict[int, list[int]] = {}  # the examples of one passage, in order
        for number in range(start, self.length):
            passage, place = divmod(number, once)
            if passage not in mine:
                mine = {passage: self._order(passage)}
            indices = mine[passage][place * self.batch_size : (place + 1) * self.batch_size]
            self._served += 1
            yield collate([self.examples[i] for i in indices], indices)

    def _order(self, passage: int) -> list[int]:
        order = self.mixture.indices(self.seed, self.epoch())
        if self.shuffle:
            key = self.seed * 1_000_003 + self.epoch() + passage * 999_999_937
            generator = torch.Generator().manual_seed(key)
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
            if self.group_by_length:
                order = self._grouped(order, generator)
        return order[self.rank :: self.world_size][: self.share]

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        size = self.batch_size * self.world_size
        full = len(order) // size * size
        batches: list[list[int]] = []
        for start in range(0, full, 32 * size):
            some = sorted(order[start : min(start + 32 * size, full)], key=lambda i: self.examples[i].tokens)
            batches += [some[first : first + size] for first in range(0, len(some), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [i for batch in shuffled for i in batches[batch]] + order[full:]

    def state_dict(self) -> dict[str, Any]:
        return {
            "served": self._served,
            "weights": list(self.mixture.weights),
            "length": len(self),
            "examples_per_batch": self._examples_per_batch,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were served. An epoch that was served whole starts again, unless it is open:
        then its end alone is left to do.

        Raises:
            UserError: the data have changed, or batches were of another size, or more than there are now, so that their
                number does not tell which examples were served.
        """
        is_whole = state["served"] >= state["length"]
        if is_whole and not state.get("open"):
            self._resume_at = 0
            return
        if state["examples_per_batch"] != self._examples_per_batch or state["served"] >= len(self) + is_whole:
            raise UserError(
                f"the checkpoint is from the middle of an epoch of {state['length']} batches of "
                f"{state['examples_per_batch']} examples, and now they are {len(self)} of {self._examples_per_batch} "
                f"(data.batch_size={self.batch_size} × {self.world_size} processes; of a stream of texts "
                "data.text_batch_size): some would be trained on twice, or never. Set what it was, or resume from the "
                "end of an epoch."
            )
        weights = state.get("weights", [1.0])  # checkpoints of one source had none
        if weights != list(self.mixture.weights):
            raise UserError(
                f"the checkpoint is from the middle of an epoch of sources with the weights {weights}, and "
                f"now they are {list(self.mixture.weights)}. Set what they were, or resume from the end of an epoch."
            )
        if state["tokens"] != self._tokens:
            raise UserError(
                f"the checkpoint is from the middle of an epoch over {state['tokens']} tokens of data, and now there "
                f"are {self._tokens}: the data have changed, and some would be trained on twice, or never. Give it the "
                "data of before, or resume from the end of an epoch."
            )
        self._resume_at = state["served"]

    @cached_property
    def _tokens(self) -> int:
        """Number of tokens of all examples, which identifies the data."""
        return sum(example.tokens for example in self.examples)

    @property
    def _examples_per_batch(self) -> int:
        """Examples per batch of all processes together: a checkpoint may move between one process and several."""
        return self.batch_size * self.world_size
