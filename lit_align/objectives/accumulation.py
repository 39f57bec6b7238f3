"""Gradient accumulation: the weights of a step's micro-batches, and the logged means over them.

With A = `accumulate_grad_batches`, Lightning divides the loss of each micro-batch by A and adds up the gradients. The
mean loss of n out of the step's N examples is therefore multiplied by A·n/N. So the step equals a step on one batch
of N examples, even if micro-batches differ in size or fewer than A are left at the end of an epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


@runtime_checkable
class KnowsSizes(Protocol):
    """A loader that knows the sizes of its batches in advance."""

    def size_of(self, batch: int) -> int:
        """Examples of one of the epoch's batches, on this process."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """The place of a batch in its optimizer step.

    Args:
        number: Number of the batch in its epoch.
        first: Number of the step's first batch.
        end: Number of the batch after the step's last.
        accumulated: `accumulate_grad_batches`.
        loaders: The loader of the batches, or loaders by name.
    """

    number: int
    first: int
    end: int
    accumulated: int
    loaders: Any

    @classmethod
    def of(cls, trainer: Trainer, number: int) -> "MicroBatch":
        """The place of a batch of this epoch."""
        accumulated = trainer.accumulate_grad_batches
        first = number // accumulated * accumulated
        end = min(first + accumulated, trainer.num_training_batches)  # infinite where it is unknown
        return cls(number, first, int(end), accumulated, trainer.train_dataloader)

    @property
    def is_first(self) -> bool:
        """Whether it is the first of its step."""
        return self.number == self.first

    def weight(self, stream: str = "preferences") -> float:
        """The factor of its mean loss; its examples weigh the same as all others of the step.

        Args:
            stream: The stream of examples. Batches of a loader that does not know their sizes count as equal.
        """
        loader = self.loaders.get(stream) if isinstance(self.loaders, Mapping) else self.loaders
        if not isinstance(loader, KnowsSizes):
            return self.accumulated / (self.end - self.first)
        sizes = [loader.size_of(number) for number in range(self.first, self.end)]
        return self.accumulated * sizes[self.number - self.first] / sum(sizes)


class StepMeans:
    """Means over the examples of an optimizer step, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._examples: dict[str, int] = {}

    def reset(self) -> None:
        """Begin a step."""
        self._sums.clear()
        self._examples.clear()

    def add(self, name: str, mean: Tensor, examples: int) -> None:
        """Add the mean over the examples of one micro-batch."""
        self._sums[name] = self._sums.get(name, 0) + mean.detach().double() * examples
        self._examples[name] = self._examples.get(name, 0) + examples

    def compute(self, trainer: Trainer) -> dict[str, Tensor]:
        """The means, over all processes, which have equal numbers of examples."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._examples[name] for name, total in self._sums.items()])
        reduced: Any = trainer.strategy.reduce(means, reduce_op="mean")
        return dict(zip(self._sums, reduced.unbind(), strict=True))
