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

CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Integers that are summed at once: few enough for float64 to hold Σ b² exactly, and on CPUs for the cache."""


def weight_sums(weights: Iterable[Tensor]) -> Sums:
    """The sums of all weights.

    Exact, and independent of how an engine stacks weights, orders their rows, or pads them with zeros.
    """
    total = squares = 0
    buffer = torch.empty(0, dtype=torch.float64)  # kept, since new memory for each chunk takes longer than its sums
    for weight in weights:
        bits = weight.detach().contiguous().view(-1).view(torch.int16)
        size = CHUNK[bits.device.type]
        if buffer.device != bits.device or len(buffer) != size:
            buffer = torch.empty(size, dtype=torch.float64, device=bits.device)
        sums = []
        for chunk in bits.split(size):
            wide = buffer[: len(chunk)].copy_(chunk)
            sums += [wide.sum(), wide.dot(wide)]
        exact = torch.stack(sums).long()
        total += int(exact[::2].sum())  # wraps modulo 2⁶⁴
        squares += int(exact[1::2].sum())
    return total % 2**64, squares % 2**64


def add_sums(parts: Iterable[Sequence[int]]) -> Sums:
    """The sums of a whole model from those of its parts."""
    totals, squares = zip(*parts, strict=True)
    return sum(totals) % 2**64, sum(squares) % 2**64
