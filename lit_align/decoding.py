"""Sampling token by token, with the keys and values of a prompt kept once for all its responses.

The prompts are computed as one packed row (`packing.py`); then each step computes one token of every response, again as
one row. A response's attention has two parts, over its prompt and over its own tokens, merged by their log-sum-exp
(`attention.py`). Responses that have ended leave the row.

Shapes: n prompts, K responses to each, P tokens of the longest prompt, A responses that are still computed, H hidden
units, V vocabulary, D head size, G query heads that share keys and values.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lit_align.logprobs import next_token_logits
from lit_align.packing import PACKED, Packing, row_hidden

KEPT_SHARE = 7 / 8
"""Ended responses leave the row once at most this share of it has not ended; each departure copies the others' keys."""

Choose = Callable[[Tensor, Tensor, int], Tensor]
Ended = Callable[[Sequence[list[int]]], Sequence[bool]]


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` runs the model: it shares prefixes, on a CPU."""
    return model.config._attn_implementation == PACKED and model.device.type == "cpu"


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    steps: int,
    choose: Choose,
    have_ended: Ended,
) -> list[list[int]] | None:
    """Sample `count` responses to each prompt.

    Args:
        model: In eval mode; `can_decode` is true of it.
        prompts: Token ids of each of n prompts.
        steps: Most tokens of a response.
        choose: The next tokens [A], from their logits [A, V], the numbers [A] of their responses, and the step.
        have_ended: Which of some responses have ended, from their tokens so far.

    Returns:
        Token ids of all n·K responses; None if a layer has a window that ends within a sequence, or values of another
        size than keys.
    """
    cache = SharedCache([len(prompt) for prompt in prompts], count, steps)
    hidden = _prompts_hidden(model, prompts, cache)
    if hidden is None:
        return None
    logits = next_token_logits(model, hidden).repeat_interleave(count, 0)
    positions = torch.tensor(cache.lengths).repeat_interleave(count)
    responses: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    ended = [False] * len(responses)
    for cache.step in range(steps):
        tokens, rows = choose(logits, cache.rows, cache.step), cache.rows.tolist()
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not ended[row]:
                responses[row].append(token)
        for row, end in zip(rows, have_ended([responses[row] for row in rows]), strict=True):
            ended[row] = end
        going = [place for place, row in enumerate(rows) if not ended[row]]
        if not going or cache.step == steps - 1:
            break
        if len(going) <= KEPT_SHARE * len(rows):
            cache.keep(torch.tensor(going))
            tokens = tokens[going]
        row_of_tokens = row_hidden(model, tokens, positions[cache.rows] + cache.step, shared_cache=cache)
        logits = next_token_logits(model, row_of_tokens)
    return responses


def _prompts_hidden(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: "SharedCache") -> Tensor | None:
    """The decoder's output for the last token of each prompt, [n, H]; None if `decode` does not run the model."""
    lengths = torch.tensor(cache.lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    packing = Packing.of(ids, mask, mask.new_zeros(len(prompts), 1, 0))
    row = ids.flatten()[packing.inverse]
    hidden = row_hidden(model, row, packing.positions, packing=packing, shared_cache=cache)
    longest = mask.shape[1] + cache.steps
    if any(window is not None and window < longest for window in packing.windows) or not cache.fits:
        return None
    return hidden[packing.read]


class SharedCache:
    """Keys and values of every layer, of n prompts and of K responses to each.

    Args:
        lengths: Tokens of each prompt.
        count: K.
        steps: Most tokens of a response.
    """

    def __init__(self, lengths: Sequence[int], count: int, steps: int):
        self.lengths = list(lengths)
        self.shape = len(lengths), count
        self.steps = steps
        self.step = 0  # tokens of each response before the present one
        self.rows = torch.arange(len(lengths) * count)  # [A], of all n·K responses
        self._prompts: list[tuple[Tensor, Tensor]] = []  # by layer, [n, key heads, P, D]
        self._responses: list[tuple[Tensor, Tensor]] = []  # by layer, [A, key heads, steps, D]
        self.fits = True  # whether values are of the size of keys, as the kernel needs
        self._layer = 0
        self._mask: Tensor | None = None  # added to scores, [n, 1, 1, P]

    def add_prompts(self, key: Tensor, value: Tensor, packing: Packing) -> None:
        """Keep one layer's keys and values of a packed row of prompts, [1, key heads, T, D]."""
        self.fits &= key.shape[-1] == value.shape[-1]
        if not self._prompts and len(set(self.lengths)) > 1:
            padding = torch.arange(max(self.lengths)) >= torch.tensor(self.lengths)[:, None]
            self._mask = torch.zeros(padding.shape, dtype=key.dtype).masked_fill(padding, -torch.inf)[:, None, None]
        padded = [packing.by_prompt(x) for x in (key, value)]
        self._prompts.append((padded[0], padded[1]))
        shapes = [(len(self.rows), x.shape[1], self.steps, x.shape[3]) for x in padded]
        self._responses.append((key.new_zeros(shapes[0]), value.new_zeros(shapes[1])))

    def keep(self, places: Tensor) -> None:
        """Keep some of the responses only, by their places among the present ones."""
        self.rows = self.rows[places]
        self._responses = [(keys[places], values[places]) for keys, values in self._responses]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The next layer's attention of the present token of each response, [1, A, heads, D].

        Args:
            query: [1, heads, A, D]
            key: [1, key heads, A, D]; value likewise.
        """
        prompts, responses = self._prompts[self._layer], self._responses[self._layer]
        self._layer = (self._layer + 1) % len(self._prompts)
        seen = slice(0, self.step + 1)
        for kept, new in zip(responses, (key, value), strict=True):
            kept[:, :, self.step] = new[0].transpose(0, 1)
        by_row = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))  # [A, key heads, G, D]
        keys, values = (kept[:, :, seen] for kept in responses)
        own, own_lse = _attention(by_row, keys, values, None, scale)
        shared, shared_lse = self._over_prompts(by_row, *prompts, scale)
        share = torch.sigmoid(shared_lse - own_lse)[..., None]
        merged = torch.lerp(own.to(share.dtype), shared.to(share.dtype), share)
        return merged.to(query.dtype).flatten(1, 2)[None]

    def _over_prompts(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over the prompts, for queries [A, key heads, G, D]."""
        (n, K), (_, heads, G, D) = self.shape, query.shape
        whole = query
        if len(query) < n * K:
            whole = query.new_zeros(n * K, heads, G, D).index_copy_(0, self.rows, query)
        stacked = whole.view(n, K, heads, G, D).transpose(1, 2).reshape(n, heads, K * G, D)
        mask = None if self._mask is None else self._mask.expand(-1, 1, K * G, -1)
        out, lse = _attention(stacked, keys, values, mask, scale)
        by_row = (x.unflatten(2, (K, G)).transpose(1, 2).flatten(0, 1) for x in (out, lse))
        out, lse = by_row if len(query) == n * K else (x.index_select(0, self.rows) for x in by_row)
        return out, lse


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, tokens, D] and log-sum-exp [batch, heads, tokens] of the CPU's flash kernel."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
