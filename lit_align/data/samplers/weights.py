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
"""Σ b and Σ b² over the bits of weights, read as integers of 16 bits, modulo 2⁶⁴."""

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
"""Integers that are summed at once: few enough for float64 to hold Σ b² exactly, and on CPUs for the cache."""


def weight_sums(weights: Iterable[Tensor]) -> Sums:
    """The sums of all weights.

    Exact, and independent of how an engine stacks weights, orders their rows, or pads them with zeros.
    """
    total = squares = 0
    for weight in weights:
        bits = weight.detach().contiguous().view(-1).view(torch.int16)
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)  # wraps modulo 2⁶⁴
        for chunk in bits.split(CHUNK[bits.device.type]):
            wide = chunk.double()
            sums += torch.stack([wide.sum(), wide.dot(wide)]).long()
        total += int(sums[0])
        squares += int(sums[1])
    return total % 2**64, squares % 2**64


def add_sums(parts: Iterable[Sequence[int]]) -> Sums:
    """The sums of a whole model from those of its parts."""
    totals, squares = zip(*parts, strict=True)
    return sum(totals) % 2**64, sum(squares) % 2**64
