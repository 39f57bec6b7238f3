"""4-bit weights under a LoRA adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), stored by bitsandbytes.

The linear layers of the base model are kept as 4-bit NormalFloat numbers, in blocks of 64 with a scale each, and are
unpacked for each product; embeddings, norms and the output head stay as they are. Whatever needs whole weights
(sampling, export, copies) gets them unpacked, with the adapter merged: an adapter is never merged into 4 bits, which
would round the update away.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_align.errors import UserError

Quantization = Literal["nf4"]


def quantization_config(dtype: torch.dtype) -> Any:
    """transformers' configuration for NF4 weights with quantized scales.

    Args:
        dtype: Type that the weights are unpacked to for computation.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "model.policy.quantize=nf4 needs bitsandbytes, which is not installed. Run pip install "
            "'lit-align[quantize]'"
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is stored in 4 bits; its own shape and type then say nothing about the layer's."""
    return getattr(weight, "quant_state", None) is not None


def holds_quantized(module: nn.Module) -> bool:
    """Whether some weights of a module are stored in 4 bits."""
    return any(is_quantized(weight) for weight in module.parameters())


def keep_layout(module: nn.Module) -> None:
    """Keep quantized weights in one layout.

    On some processors, bitsandbytes repacks them at the first forward pass in eval mode. The product with repacked
    weights has no gradient, so that training after a validation would stand still.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def unpacked(weight: Any) -> Tensor:
    """A weight in its layer's shape: a quantized one in its computation's type, another as it is."""
    if not is_quantized(weight):
        return weight
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, weight.quant_state)


def packed_bytes(numbers: int) -> int:
    """Memory of a layer's weights in 4 bits, in bytes.

    Each block of 64 has a scale of one byte, and 256 scales share one of four bytes. Two tables hold the codes' values.
    """
    blocks = -(-numbers // 64)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256)


def size_of(weight: Any) -> int:
    """How many numbers a weight stands for."""
    return weight.quant_state.shape.numel() if is_quantized(weight) else weight.numel()


def scales_of(name: str, weight: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the tensors with which a quantized weight is unpacked; none of another."""
    if is_quantized(weight):
        for key, value in weight.quant_state.as_dict(packed=True).items():
            yield f"{name}.{key}", value
