"""Compilation of a model's blocks by `torch.compile`.

A block is compiled as a whole, apart from its attention over a packed row, which has kernels of its own. All blocks
share one compiled form, and so does a reference of the same architecture. The row's length may change. Fused operations
round where the plain ones do, so that the values with gradients and those without agree to the bit.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel

from lit_align.blocks import blocks_of
from lit_align.errors import UserError
from lit_align.packing import PACKED, packed_attention


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile the parts that transformers names as the model's blocks, in place, when they first compute.

    Raises:
        UserError: transformers names none.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(
            f"model.policy.compile=true has no effect because transformers names no blocks of {type(model).__name__}. "
            "Leave it out."
        )
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for block in blocks:
        block.compile(dynamic=True, options={"emulate_precision_casts": True})


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model's blocks are compiled."""
    return any(part._compiled_call_impl is not None for part in model.modules())
