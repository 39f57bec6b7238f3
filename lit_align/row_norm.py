"""RMSNorm whose intermediate results stay in the processor's cache: for bfloat16 activations on a CPU.

transformers computes y = w · x̂ with x̂ = x/√(mean(x²) + ε) in float32, writes each of its parts to memory, and keeps two
of them in float32 for the backward pass. The layer here computes the same numbers a few rows at a time, and keeps x in
bfloat16 and one factor for each row. docs/speed.md has the figures.

Shapes: N rows, D numbers in each.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AT_ONCE = 1 << 16
"""Numbers that a thread computes at once."""


def keep_norms_in_cache(model: nn.Module) -> None:
    """Replace the norms of a model by `RowNorm`, where that gives the same numbers."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if (eps := _eps_of(layer)) is not None and _is_plain(type(layer), eps):
                setattr(parent, name, RowNorm(layer.weight, eps))  # type: ignore[arg-type]


def _eps_of(layer: nn.Module) -> float | None:
    """ε of a norm by a weight alone; None for any other layer."""
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    norm = type(layer).__name__.endswith("RMSNorm") and [name for name, _ in layer.named_parameters()] == ["weight"]
    return eps if norm else None


@cache
def _is_plain(kind: type[nn.Module], eps: float) -> bool:
    """Whether `RowNorm` gives the numbers of a class of norms, to the bit."""
    with torch.device("cpu"):  # also where a model without weights is built on the meta device
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 64), (64,)))
        try:
            theirs = kind(64, eps=eps)
        except TypeError:  # it is made of other arguments
            return False
        ours = RowNorm(nn.Parameter(weight), eps)
        theirs.weight = ours.weight
        dtypes = torch.float64, torch.float32, torch.bfloat16
        return all(torch.equal(theirs.to(dtype)(x.to(dtype)), ours.to(dtype)(x.to(dtype))) for dtype in dtypes)


class RowNorm(nn.Module):
    """transformers' RMSNorm, by rows for bfloat16 on CPUs."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """y, like x: [*, D]."""
        bfloat16 = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.bfloat16
        if bfloat16 and not torch.compiler.is_compiling():
            result: Tensor = RowNormProduct.apply(x, self.weight, self.eps)  # type: ignore
            return result
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class RowNormProduct(torch.autograd.Function):
    """y = w · x̂ in bfloat16. Gradients are sums in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
        factors = torch.empty(len(flat_x), 1)  # 1/√(mean(x²) + ε)
        for rows in _row_slices(flat_x):
            wide = flat_x[rows].float()
            factors[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            torch.mul(weight, wide.mul_(factors[rows]).to(x.dtype), out=flat_y[rows])
        ctx.save_for_backward(x, weight, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, factors = ctx.saved_tensors
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat_x, grad, flat_to_x = (
            x.reshape(-1, x.shape[-1]),
            grads[0].reshape(-1, x.shape[-1]),
            to_x.view(-1, x.shape[-1]),
        )
        to_weight, wide_weight = torch.zeros_like(weight, dtype=torch.float32), weight.float()
        for rows in _row_slices(flat_x):
            normed, slope = flat_x[rows].float().mul_(factors[rows]), grad[rows].float()
            product = slope * normed
            if ctx.needs_input_grad[1]:
                to_weight += product.sum(0)
            slope.mul_(wide_weight).sub_(normed.mul_(product.mul_(wide_weight).mean(-1, keepdim=True)))
            flat_to_x[rows] = slope.mul_(factors[rows])
        return to_x, to_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _row_slices(flat: Tensor) -> Iterator[slice]:
    step = max(1, AT_ONCE * torch.get_num_threads() // flat.shape[1])
    return (slice(start, start + step) for start in range(0, len(flat), step))
