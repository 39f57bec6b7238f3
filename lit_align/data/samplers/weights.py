"""Comparing weights bit by bit."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def _bits(weight: Tensor) -> Tensor:
    """A weight's bits, read as integers."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().contiguous().view(integer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal in type, shape and every bit."""
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


Sums = tuple[int, int]
"""Σ b and Σ b² over the bits of weights, modulo 2⁶⁴."""


def add_sums(parts: Iterable[Sequence[int]]) -> Sums:
    """The sums of a whole model from those of its parts."""
    totals, squares = zip(*parts, strict=True)
    return sum(totals) % 2**64, sum(squares) % 2**64


def weight_sums(weights: Iterable[Tensor]) -> Sums:
    """Σ b and Σ b² over the bits of all weights, read as integers, modulo 2⁶⁴.

    Exact, and independent of how an engine stacks weights, orders their rows, or pads them with zeros.
    """
    total = squares = 0
    for weight in weights:
        for chunk in _bits(weight).view(-1).split(1 << 18):  # fits into the CPU's cache
            wide = chunk.long()
            total += int(wide.sum())
            squares += int((wide * wide).sum())
    return total % 2**64, squares % 2**64
