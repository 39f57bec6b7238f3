"""Mixing of two networks' weights, paired by name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_align.sharding import reshard


@torch.no_grad()
def mix_modules(target: nn.Module, source: nn.Module, alpha: float) -> None:
    """Apply `mix_weights` to all parameters, shard by shard; at α = 1 copy buffers too."""
    reshard(target)
    reshard(source)
    mix_weights(dict(target.named_parameters()), dict(source.named_parameters()), alpha)
    if alpha == 1:
        copy_buffers(target, source)


@torch.no_grad()
def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """target's buffers ← source's, by name."""
    theirs = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(theirs[name])


@torch.no_grad()
def mix_weights(target: Mapping[str, Tensor], source: Mapping[str, Tensor], alpha: float) -> None:
    """target ← alpha·source + (1−alpha)·target in place, paired by name.

    Raises:
        ValueError: a name or a shape differs; no weight has been changed.
    """
    if target.keys() != source.keys():
        raise ValueError(f"weights without a partner of the same name: {sorted(target.keys() ^ source.keys())[:5]}")
    for name, weight in target.items():
        if weight.shape != source[name].shape:
            raise ValueError(f"{name}: shapes {tuple(weight.shape)} and {tuple(source[name].shape)} differ")
    for name, weight in target.items():
        if alpha == 1:
            weight.copy_(source[name])
        else:
            weight.lerp_(source[name].to(device=weight.device, dtype=weight.dtype), alpha)
