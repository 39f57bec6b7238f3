"""LoRA layers whose update stays in the processor's cache: peft's layer for bfloat16 weights on a CPU.

peft adds the update of an adapter in float32, y = W·x + s·B(A·x), and writes each of its parts to memory: x in float32,
W·x in float32, B·A·x, and their sum. The layer here computes the same numbers a few rows at a time, and keeps x in
bfloat16 for the backward pass. docs/speed.md has the figures.

Shapes: N rows, I inputs, O outputs, r the rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 128
"""Rows that are computed at once."""


BEYOND_PLAIN = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)
"""Options of peft's adapters that a plain one leaves off."""
REWRITES_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of the names of initializations that also change the base model's weights."""


def beyond_plain_lora(config: PeftConfig) -> str:
    """The option that makes an adapter other than B·A beside unchanged linear layers; empty if there is none."""
    if type(config) is not LoraConfig:
        return f"peft_type={config.peft_type}"
    if config.bias != "none":
        return f"bias={config.bias}"
    if str(config.init_lora_weights).startswith(REWRITES_BASE):
        return f"init_lora_weights={config.init_lora_weights}"
    return next((f"{name}={value}" for name in BEYOND_PLAIN if (value := getattr(config, name, None))), "")


def keep_updates_in_cache(model: nn.Module) -> None:
    """Let the LoRA layers of a model compute their updates by rows, where that gives peft's numbers."""
    for layer in model.modules():
        if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = LoRALinear


class LoRALinear(lora.Linear):
    """peft's layer over a linear layer; it takes its own path for bfloat16 on CPUs, and peft's for all else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slots = [slot for slot in self.active_adapters if slot in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(slots) == 1
        if not (plain and self._has_bfloat16(x) and self._is_vanilla(slots[0])):
            return super().forward(x, *args, **kwargs)
        W, bias = self.base_layer.weight, self.base_layer.bias
        A, B = self.lora_A[slots[0]].weight, self.lora_B[slots[0]].weight
        result: Tensor = LoRAProduct.apply(x, W, bias, A, B, self.scaling[slots[0]])  # type: ignore
        return result

    def _has_bfloat16(self, x: Tensor) -> bool:
        """Whether the layer multiplies frozen bfloat16 weights on a CPU."""
        W: Tensor = self.base_layer.weight  # type: ignore[assignment]
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return x.dtype == W.dtype == torch.bfloat16 and not W.requires_grad

    def _is_vanilla(self, slot: str) -> bool:
        """Whether the update of a slot is s·B·A·x in float32, without dropout, biases or peft's variants."""
        A, B, dropout = self.lora_A[slot], self.lora_B[slot], self.lora_dropout[slot]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        float32 = {A.weight.dtype, B.weight.dtype} == {torch.float32}
        return float32 and B.bias is None and not drops and slot not in self.lora_variant


class LoRAProduct(torch.autograd.Function):
    """y = W·x + b + s·B·A·x, with W, b and x in bfloat16 and the update in float32; W and b are frozen.

    The output is that of peft's layer. The update's gradient of x is added before it is rounded to bfloat16, which peft
    does before and after.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """The output, [*, O].

        Args:
            x: [*, I]; W: [O, I]; bias: [O]; A: [r, I]; B: [O, r]
        """
        y = F.linear(x, W, bias)
        low = x.new_empty(x.shape[:-1].numel(), len(A), dtype=torch.float32)
        for rows, some_x, some_y in _in_rows(x, y):
            torch.mm(some_x.float(), A.T, out=low[rows])
            some_y.copy_((low[rows] @ B.T).mul_(scale).add_(some_y))
        ctx.save_for_backward(x, W, A, B, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W, A, B, low = ctx.saved_tensors
        grad_x = grad @ W if ctx.needs_input_grad[0] else None
        grad_A, grad_B, scaled = torch.zeros_like(A), torch.zeros_like(B), B * ctx.scale
        for rows, some_grad, some_x in _in_rows(grad, x):
            wide = some_grad.float()
            of_low = wide @ scaled
            grad_B.addmm_(wide.T, low[rows])
            grad_A.addmm_(of_low.T, some_x.float())
            if grad_x is not None:
                some_grad_x = grad_x.view(-1, A.shape[1])[rows]
                some_grad_x.copy_((of_low @ A).add_(some_grad_x))
        return grad_x, None, None, grad_A, grad_B.mul_(ctx.scale), None


def _in_rows(first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time of two tensors, with their places."""
    flat = first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])
    for start in range(0, len(flat[0]), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, flat[0][rows], flat[1][rows]
