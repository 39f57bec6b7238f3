"""Names of weight types, and which half-precision types this machine multiplies quickly.

CPUs without AVX-512 (most laptops) multiply matrices of bfloat16 and float16 many times slower than of float32
(docs/speed.md has the figures), so `auto` means float32 there.
"""

from collections.abc import Iterator
from typing import Final

import torch

# torch's own question before it takes oneDNN's kernels; without them it multiplies element by element
_KERNELS: Final = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_FLOAT64: Final = {"cpu", "cuda", "meta"}


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the GPU, or without one the CPU, multiplies matrices of this type at least as fast as of float32."""
    if dtype not in _KERNELS or torch.accelerator.is_available():
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _KERNELS[dtype])())


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type for sums over many examples: float64, or float32 on devices without it, such as Apple's GPUs."""
    return torch.float64 if device.type in _FLOAT64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The type's name as in options, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def has_full_precision(dtype: torch.dtype, precision: object) -> bool:
    """Whether weights of a type, and computation under Trainer's precision, have at least 32 bits."""
    return dtype.itemsize >= 4 and "16" not in str(precision)


def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type itself, or float32 where this machine multiplies it slowly."""
    return dtype if is_fast(dtype) else torch.float32


def warn_if_slow(dtype: torch.dtype, instead: str) -> Iterator[tuple[str, str]]:
    """A line of a run's header if this machine multiplies a type slowly that its options ask for.

    Args:
        instead: The option that is faster.
    """
    if not is_fast(dtype):
        yield "", f"this CPU multiplies {dtype_name(dtype)} slowly; {instead} is faster"
