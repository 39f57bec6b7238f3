"""Gradient accumulation: the weights of a step's micro-batches, and the logged means over them.

A step's loss is Σ w·loss / Σ w over the examples of all its micro-batches and processes, where w is the weight of an
example, or 1. With A = `accumulate_grad_batches`, Lightning divides the loss of each micro-batch by A and adds up the
gradients, and P processes average theirs. So the mean loss of a micro-batch is multiplied by A·P·n/N, if its weights
sum to n, and those of the step to N. The step then equals a step on one batch of all its examples. Micro-batches may
differ in size and weight, and fewer than A may be left at the end of an epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_align.dtypes import exact_dtype
from lit_align.logprobs import PreferenceBatch


@runtime_checkable
class KnowsWeights(Protocol):
    """A loader that knows the weights of its batches in advance."""

    def weight_of(self, batch: int) -> float:
        """The sum of the weights of the examples of one of the epoch's batches, on this process."""
        ...

    def mean_weight_of(self, batch: int) -> float:
        """The mean of `weight_of` over all processes."""
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
        """The factor of its mean loss, with which its examples weigh as much as all others of the step.

        Args:
            stream: The stream of examples. Batches of a loader that does not know their weights count as equal.
        """
        loader = self.loaders.get(stream) if isinstance(self.loaders, Mapping) else self.loaders
        if not isinstance(loader, KnowsWeights):
            return self.accumulated / (self.end - self.first)
        step = sum(loader.mean_weight_of(number) for number in range(self.first, self.end))
        return self.accumulated * loader.weight_of(self.number) / step


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over examples, a scalar; equal weights give the plain mean to the bit.

    Args:
        values: [B].
        weights: [B] float32; None weighs all equally.
    """
    if weights is None:
        return values.mean()
    exact = weights.to(exact_dtype(weights.device))
    return (values * (exact / exact.mean()).to(values)).mean()


def total_weight(batch: PreferenceBatch) -> Tensor | int:
    """The sum of the weights of a batch's examples."""
    weights = batch.weights
    return batch.size if weights is None else weights.to(exact_dtype(weights.device)).sum()


class StepMeans:
    """Weighted means over the examples of an optimizer step, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | int] = {}

    def reset(self) -> None:
        """Begin a step."""
        self._sums.clear()
        self._weights.clear()

    def add(self, name: str, mean: Tensor, weight: Tensor | int) -> None:
        """Add the mean over the examples of one micro-batch, and the sum of their weights."""
        self._sums[name] = self._sums.get(name, 0) + mean.detach().to(exact_dtype(mean.device)) * weight
        self._weights[name] = self._weights.get(name, 0) + weight

    def compute(self, trainer: Trainer) -> dict[str, Tensor]:
        """The means, over all processes."""
        if not self._sums:
            return {}
        sums = torch.stack([*self._sums.values()])
        weights = torch.stack([torch.as_tensor(weight).to(sums) for weight in self._weights.values()])
        totals: Any = trainer.strategy.reduce(torch.stack([sums, weights]), reduce_op="sum")
        return dict(zip(self._sums, (totals[0] / totals[1]).unbind(), strict=True))
