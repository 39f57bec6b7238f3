"""A batch as one row without padding, and attention over that row: each prompt once, followed by its responses.

The row holds the tokens of all prompts, then those of all responses. Tokens with which all prompts begin, such as a
system prompt or examples, are there once, if that spares a good part of the row. A prompt's tokens see the earlier
tokens of the prompt. A response's tokens see the prompt and the earlier tokens of the same response; their positions
continue from the prompt's end. Every layer except attention runs on the row as it is, and so does attention
(`attention.py`).

Attention dropout, and sliding windows that do not reach the whole of a sequence, take another way: attention over
prompts and over responses separately, each padded among its kind, under masks. So do types and head sizes for which the
device has no kernel, and on CPUs short rows (`Packing.covers`). Scores that are capped, biased (ALiBi) or have sinks
take neither way, since such models need eager attention, or `enable_prefix_sharing` finds that their output differs.

Under masks, query heads that share keys and values are stacked as more queries of one head (`_grouped`), so that keys
and values need not be repeated for each of them.

This is an attention implementation of transformers (`PACKED`), for all models that use its attention interface and take
position ids. In generation it computes the steps of one token and leaves everything else to `sdpa`.

Shapes as in `logprobs.py`; T is the row's length, N = B·K.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lit_align.attention import Row, RowAttention, has_kernel

PACKED = "lit_align_packed"
FUSED_ATTENTION_DEVICES = {"cuda"}
"""Devices whose own fused attention is the fastest. On others, attention over a prompt runs one block of tokens at a
time, and its backward pass forms all scores of a block at once."""
MASKED_REACH = {"cpu": 256}
"""Most tokens of a prompt and its response together for which masks are faster than `RowAttention`, by device."""
COMMON_SHARE = 1 / 8
"""The row holds the common beginning of its prompts once if this spares at least this share of all tokens."""
PROMPT_BLOCK = 256
"""Prompt tokens in a block, which sees the keys up to its own. Processing a whole prompt at once would waste half the
work on masked positions."""


@dataclass
class Packing:
    """The layout of a packed row."""

    places: Tensor  # [B·P + N·R] place in the row of each token of prompts and responses; T for padding
    inverse: Tensor  # [T] place of each token of the row among those, the first of several
    positions: Tensor  # [T]
    read: Tensor  # places in the row whose output is read: each prompt's last token, and all tokens of responses
    prompt_mask: Tensor  # [B, P] bool
    responses: tuple[int, int]  # K, R
    lengths: tuple[list[int], list[list[int]]]  # of prompts, and of the responses to each
    common: int = 0  # tokens with which all prompts begin and which the row holds once
    windows: set[int | None] = field(default_factory=set)  # sliding windows that layers use
    _masks: dict[tuple[Any, ...], tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def response_places(self) -> Tensor:
        """Places in the row of each prompt's last token and of its responses' tokens, [B, K, 1 + R]."""
        (B, P), (K, R) = self.prompt_mask.shape, self.responses
        prompts, responses = self.places.split([B * P, B * K * R])
        last = prompts.view(B, P).gather(1, self.prompt_mask.sum(-1, keepdim=True) - 1)
        return torch.cat([last[:, None].expand(B, K, 1), responses.view(B, K, R)], dim=-1)

    @classmethod
    def of(cls, prompt_ids: Tensor, prompt_mask: Tensor, response_mask: Tensor) -> "Packing":
        """Lay out a batch.

        Args:
            prompt_ids: [B, P]
            prompt_mask: [B, P], True on tokens.
            response_mask: [B, K, R].
        """
        (B, P), (_, K, R) = prompt_mask.shape, response_mask.shape
        lengths = prompt_mask.sum(-1).tolist(), response_mask.sum(-1).tolist()
        common = _common_beginning(prompt_ids, *lengths)
        first = prompt_mask.clone()
        first[1:, :common] = False
        mask = torch.cat([first.flatten(), response_mask.flatten()])
        inverse = mask.nonzero().squeeze(1)
        places = (mask.cumsum(0) - 1).masked_fill(~mask, len(inverse))
        places[: B * P].view(B, P)[:, :common] = torch.arange(common, device=mask.device)
        prompt_positions = torch.arange(prompt_mask.shape[1], device=mask.device).expand(prompt_mask.shape)
        response_positions = prompt_mask.sum(-1)[:, None, None] + torch.arange(R, device=mask.device).expand(1, K, R)
        positions = torch.cat([prompt_positions.flatten(), response_positions.flatten()])[inverse]
        last = common - 1 + (prompt_mask.sum(-1) - common).cumsum(0)
        start = common + sum(lengths[0]) - B * common  # of the responses
        read = torch.cat([last, torch.arange(start, len(inverse), device=mask.device)])
        return cls(places, inverse, positions, read, prompt_mask, (K, R), lengths, common)

    @cached_property
    def row(self) -> Row:
        """The row's attentions, on its device."""
        return Row.of(*self.lengths, self.places.device, common=self.common)

    def by_prompt(self, x: Tensor) -> Tensor:
        """The prompts' part of a row [1, heads, T, D], each by itself with zeros for padding, [B, heads, P, D]."""
        padded = torch.cat([x[0], x.new_zeros(x.shape[1], 1, x.shape[3])], dim=1)
        places = self.places[: self.prompt_mask.numel()]
        return padded.index_select(1, places).unflatten(1, self.prompt_mask.shape).transpose(0, 1).contiguous()

    def to(self, device: torch.device) -> "Packing":
        """The same layout on a device, which need not wait for it."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> "Packing":
        """The same layout in page-locked memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Packing":
        names = ("places", "inverse", "positions", "read", "prompt_mask")
        tensors = {name: function(getattr(self, name)) for name in names}
        return replace(self, **tensors, windows=set(), _masks={})

    def covers(self, query: Tensor, value: Tensor, window: int | None, dropout: float = 0.0, **kwargs: Any) -> bool:
        """Whether `RowAttention` computes this layer.

        It does not if the layer has dropout, or a window that ends within a sequence, if the device has no kernel for
        it, or where masks are faster.
        """
        P, (_, R) = self.prompt_mask.shape[1], self.responses
        if dropout or (window is not None and window < P + R) or not has_kernel(query, value):
            return False
        return R == 0 or self.common > 0 or MASKED_REACH.get(query.device.type, 0) < P + R

    def masks(self, window: int | None, groups: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Masks that are added to scores: of prompts, [P, P], and of responses, [N, 1, groups·R, P+R]. The first is
        None where it would be causal only and the device's kernel has that built in.

        Args:
            window: Positions that a token sees, including itself; None is all.
            groups: Query heads that share keys and values.
            dtype: Type of the scores.
        """
        if (window, groups, dtype) not in self._masks:
            (_, P), (K, R) = self.prompt_mask.shape, self.responses
            device = self.prompt_mask.device
            prompt, response = torch.arange(P, device=device), torch.arange(R, device=device)
            reach = P + R if window is None else min(window, P + R)

            def near(query: Tensor, key: Tensor) -> Tensor:
                distance = query[..., None] - key
                return (distance >= 0) & (distance < reach)

            def added(seen: Tensor) -> Tensor:
                return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)

            position = self.prompt_mask.sum(-1, keepdim=True) + response  # [B, R]
            before = near(position, prompt) & self.prompt_mask[:, None]
            seen = torch.cat([before, near(response, response).expand(len(before), R, R)], dim=-1)
            self._masks[window, groups, dtype] = (
                None if reach == P + R and device.type in FUSED_ATTENTION_DEVICES else added(near(prompt, prompt)),
                added(seen).repeat_interleave(K, 0).repeat(1, groups, 1)[:, None],
            )
        return self._masks[window, groups, dtype]


class SharedCache(Protocol):
    """Keys and values of every layer, of prompts and of the responses to them (`decoding.py`)."""

    def add_prompts(self, key: Tensor, value: Tensor, packing: Packing) -> None:
        """Keep one layer's keys and values of a packed row of prompts, [1, key heads, T, D]."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The next layer's attention of the present token of each response, [1, A, heads, D]."""
        ...


def _common_beginning(prompt_ids: Tensor, prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
    """The number of tokens that the row holds once for all prompts, fewer than each has.

    Args:
        prompt_ids: [B, P]
        prompts: Tokens of each prompt; responses likewise.
    """
    shortest = min(prompts) - 1
    common = int((prompt_ids == prompt_ids[:1])[:, :shortest].all(0).cumprod(0).sum())
    spared, tokens = (len(prompts) - 1) * common, sum(prompts) + sum(map(sum, responses))
    return common if spared and spared >= COMMON_SHARE * tokens else 0


class _Move(torch.autograd.Function):
    """Rows of x at given places, zeros where a place is past its end; the backward pass uses the inverse places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(places, inverse)
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        places, inverse = ctx.saved_tensors
        return _Move.apply(grads[0], inverse, places), None, None  # type: ignore[return-value]


def _moved(x: Tensor, places: Tensor, inverse: Tensor, common: int) -> Tensor:
    """Rows of x at given places; several places may be one row only if there is a common beginning."""
    if common:
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, places)
    return _Move.apply(x, places, inverse)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """The device's attention, with a backward pass of plain matrix products over recomputed scores.

    The backward kernel of CPUs works block by block, in products too small to be fast: it took 1.4 to 7 times as long.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,), (query, key, value, mask) = grads, ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)  # as the kernels keep scores
        probabilities = ((query.to(wide) * ctx.scale) @ key.to(wide).mT).add_(mask).softmax(-1)
        slope = (grad @ value.mT).to(wide)
        slope = (slope - (slope * probabilities).sum(-1, keepdim=True)).mul_(probabilities).to(query.dtype)
        to_query, to_key = slope @ key * ctx.scale, slope.mT @ query * ctx.scale
        return to_query, to_key, probabilities.to(grad.dtype).mT @ grad, None, None


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention whose query heads that share keys and values are stacked: head over head, each of R tokens.

    Args:
        query: [N, heads, R, size]
        key: [N, key heads, keys, size]; value likewise.
        mask: [N, 1, heads/key heads · R, keys], or one row for all; bool, or added to scores.

    Returns:
        [N, R, heads, size], as `sdpa_attention_forward` gives it.
    """
    stacked = query.reshape(*key.shape[:2], -1, query.shape[-1])
    fused = stacked.device.type in FUSED_ATTENTION_DEVICES
    if stacked.requires_grad and mask is not None and not dropout and not fused:
        attended = _Attention.apply(stacked, key, value, mask, scaling or stacked.shape[-1] ** -0.5)
    else:
        attended = scaled_dot_product_attention(stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return attended.reshape(*query.shape[:3], value.shape[-1]).transpose(1, 2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    shared_cache: SharedCache | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, or of a row of new tokens after a cache; else of any input, as `sdpa` computes it.

    Args:
        query: [1, heads, T, head size]; key and value likewise, perhaps with fewer heads.
        packing: The layout of a packed row.
        shared_cache: Keeps the keys and values of a packed row of prompts; without `packing`, the row's tokens follow
            those in the cache.
        sliding_window: Positions that a token of this layer sees.

    Returns:
        [1, T, heads, head size], and None for the attention weights.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions leave them in float32
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if packing is None and shared_cache is not None:
        return shared_cache.attend(query, key, value, scale), None
    if packing is None:
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _grouped(query, key, value, attention_mask, **kwargs), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    packing.windows.add(sliding_window)
    if shared_cache is not None:
        shared_cache.add_prompts(key, value, packing)
    if packing.covers(query, value, sliding_window, **kwargs):
        by_token = (x[0].transpose(0, 1) for x in (query, key, value))
        return RowAttention.apply(*by_token, packing.row, scale)[None], None  # type: ignore[index]
    return _masked_attention(module, query, key, value, packing, sliding_window, **kwargs), None


def _masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None, **kwargs: Any
) -> Tensor:
    """Attention of a packed row over padded prompts and responses, under masks, [1, T, heads, head size]."""
    groups = query.shape[1] // key.shape[1]
    causal, added = packing.masks(window, groups, query.dtype)
    (B, P), (K, R) = packing.prompt_mask.shape, packing.responses

    def spread(x: Tensor) -> tuple[Tensor, Tensor]:
        """[1, heads, T, size] as prompts [B, heads, P, size] and responses [B·K, heads, R, size]."""
        _, heads, T, size = x.shape
        by_token = x[0].transpose(0, 1).reshape(T, heads * size)
        moved = _moved(by_token, packing.places, packing.inverse, packing.common)
        prompt, response = moved.split([B * P, B * K * R])
        return (
            prompt.view(B, P, heads, size).transpose(1, 2),
            response.view(B * K, R, heads, size).transpose(1, 2),
        )

    (query_p, query_r), (key_p, key_r), (value_p, value_r) = spread(query), spread(key), spread(value)
    if causal is None:
        kwargs["is_causal"] = True
        prompts, _ = sdpa_attention_forward(module, query_p, key_p, value_p, None, **kwargs)
    else:
        blocks = [slice(start, min(start + PROMPT_BLOCK, P)) for start in range(0, P, PROMPT_BLOCK)]
        attended = [
            _grouped(
                query_p[:, :, some],
                key_p[:, :, : some.stop],
                value_p[:, :, : some.stop],
                causal[some, : some.stop].repeat(groups, 1)[None, None],
                **kwargs,
            )
            for some in blocks
        ]
        prompts = torch.cat(attended, dim=1)
    keys = torch.cat([key_p.repeat_interleave(K, 0), key_r], dim=2)
    values = torch.cat([value_p.repeat_interleave(K, 0), value_r], dim=2)
    responses = _grouped(query_r, keys, values, added, **kwargs)
    whole = torch.cat([prompts.flatten(0, 1).flatten(1), responses.flatten(0, 1).flatten(1)])  # [B·P + N·R, heads·size]
    row = _moved(whole, packing.inverse, packing.places, packing.common)
    return row.view(1, len(row), *prompts.shape[2:])


AttentionInterface.register(PACKED, packed_attention)  # type: ignore[arg-type]
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packed_hidden(model: PreTrainedModel, prompt_ids: Tensor, response_ids: Tensor, packing: Packing) -> Tensor:
    """The decoder's output for a packed row, [T, H].

    Args:
        model: With attention implementation `PACKED`.
        prompt_ids: [B, P]
        response_ids: [B, K, R]
    """
    row_ids = torch.cat([prompt_ids.flatten(), response_ids.flatten()])[packing.inverse]
    return row_hidden(model, row_ids, packing.positions, packing=packing)


def row_hidden(model: PreTrainedModel, ids: Tensor, positions: Tensor, **attention: Any) -> Tensor:
    """The decoder's output for a row of tokens, [T, H].

    Args:
        model: With attention implementation `PACKED`.
        ids: [T]; positions likewise.
        attention: `packing` or `shared_cache` of `packed_attention`, or both.
    """
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # four dimensions are left as they are
    output = model.base_model(
        input_ids=ids[None], attention_mask=no_mask, position_ids=positions[None], use_cache=False, **attention
    )
    return output.last_hidden_state[0]
