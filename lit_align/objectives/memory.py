"""Memory of a model in training: weights, gradients, optimizer and reference, without activations."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from lit_align.allocation import keeps_freed_memory
from lit_align.objectives.base import PreferenceObjective
from lit_align.quantization import scales_of
from lit_align.reference.build import own_weights, reference_weights
from lit_align.sharding import local_shard


def memory_line(module: PreferenceObjective) -> str:
    """Memory of the weights, gradients, AdamW's two moments and the reference in this process, without activations."""
    kept = ", and freed memory stays with the process" if keeps_freed_memory() else ""
    return f"{listed_memory(memory_parts(module))}; activations come on top{kept}"


def memory_parts(module: PreferenceObjective) -> dict[str, int]:
    """Bytes of the weights, gradients, AdamW's two moments and the reference in this process."""
    assert module.policy is not None
    trained = size_in_bytes(weight for _, weight in module.policy.trainable_weights())
    return {
        "policy": size_in_bytes(own_weights(module.policy)),
        "gradients": trained,
        "AdamW": 2 * trained,
        "reference": size_in_bytes(reference_weights(module.policy, module.reference)),
    }


def listed_memory(parts: Mapping[str, int]) -> str:
    """The sum of some parts of memory, and what it is made of."""
    listed = " + ".join(f"{size / 1e9:.2f} {name}" for name, size in parts.items() if size)
    return f"about {sum(parts.values()) / 1e9:.2f} GB = {listed}"


def size_in_bytes(weights: Iterable[Tensor]) -> int:
    """Memory of this process's part of weights, with the scales of quantized ones."""
    parts = [part for weight in weights for part in (weight, *(scale for _, scale in scales_of("", weight)))]
    return sum(local_shard(part).numel() * part.element_size() for part in parts)
