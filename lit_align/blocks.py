"""The blocks of a transformers model, and the rows that its last block need not compute.

Nothing reads the last block's output for most of a prompt: only its last token and the response tokens predict a token
of a response. The other tokens give keys and values. So the block's feed-forward layer, most of its arithmetic, leaves
their rows out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The parts that transformers names as the model's blocks, in the order of the model."""
    names = set(model._no_split_modules or [])
    return [part for part in model.modules() if type(part).__name__ in names]


def skip_unread_rows(model: PreTrainedModel) -> None:
    """Let the last block leave out rows that are not read, of a packed row (`packing.py`).

    Does nothing for a model whose last block has no part `mlp` that is called with the hidden states alone.
    """
    blocks = blocks_of(model)
    feed_forward = getattr(blocks[-1], "mlp", None) if blocks else None
    if isinstance(feed_forward, nn.Module):
        _ReadRows().watch(blocks[-1], feed_forward)


class _ReadRows:
    """Hooks of a block and its feed-forward layer, which computes the rows that are read; the others get zeros."""

    rows: Tensor | None = None  # None: all
    tokens = 0

    def watch(self, block: nn.Module, feed_forward: nn.Module) -> None:
        block.register_forward_pre_hook(self._begin, with_kwargs=True)
        feed_forward.register_forward_pre_hook(self._take)
        feed_forward.register_forward_hook(self._put)

    def _begin(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember the rows of this pass; the backward pass, too, begins a block that it computes again."""
        packing = kwargs.get("packing")
        self.rows = None if packing is None or torch.compiler.is_compiling() else packing.read

    def _take(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.rows is None:
            return None
        (hidden,) = args
        self.tokens = hidden.shape[1]
        return (hidden.index_select(1, self.rows),)

    def _put(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.rows is None:
            return None
        return output.new_zeros(1, self.tokens, output.shape[2]).index_copy(1, self.rows, output)
