"""Attention over a packed row, without masks, padding or repeated keys.

The row holds the tokens with which all prompts begin, then the rest of each prompt, then all responses, those to one
prompt side by side. It needs three attentions:

    own:     the beginning, each rest and each response over its own tokens, causal
    shared:  all responses to a prompt over the rest of that prompt, not causal
    common:  all rests and responses over the beginning, not causal

Each gives an output o and the log-sum-exp ℓ of its scores. A token's outputs are merged by their shares of the whole
softmax: two of them by exp(ℓ_own − ℓ) and exp(ℓ_shared − ℓ), with ℓ = log(exp ℓ_own + exp ℓ_shared). In the backward
pass

    P = exp(scale·q kᵀ − ℓ),   dS = P ∘ (dO vᵀ − rowsum(dO ∘ O)),   dq = scale·dS k,   dk = scale·dSᵀ q,   dv = Pᵀ dO

holds for any subset of the keys, as long as O and ℓ are those of all keys. So both backward kernels are given the
merged O and ℓ, and their gradients add up to the exact one.

The kernels are `FlashSegments` on GPUs and `BlockSegments` on CPUs. The tests hold both to a plain softmax in float64,
the first with CUDA's operators replaced by their definition.

Shapes: T tokens of the row, D head size; keys and values may have fewer heads, each for a group of G query heads.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Grads = tuple[Tensor, Tensor, Tensor]
ByQuery = tuple[Tensor, Tensor, Tensor, Tensor]
ByKey = tuple[Tensor, Tensor]
Bounds = Sequence[int]
"""Where each segment begins and the last one ends."""

TILE_SCORES = 1 << 19
"""Scores that a CPU's backward pass forms at once, so that they stay in caches."""
SHORT, NEAR = 128, 16
"""Causal segments of up to SHORT tokens are computed together if their lengths differ by at most NEAR."""
SCORES = 1 << 17
"""Most scores of one head in such a block, so that they stay in caches."""


class Segments(Protocol):
    """Attention in which segment i of the queries sees segment i of the keys."""

    def __init__(self, queries: Bounds, keys: Bounds, causal: bool, device: torch.device): ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output [T, heads, D] and the log-sum-exp [T, heads].

        Args:
            query: [T, heads, D]
            key: [keys, key heads, D]; value likewise.
        """
        ...

    @staticmethod
    def prepare(queries: ByQuery, keys: ByKey, scale: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Whatever `backward` needs of the query tokens [T, ...] and of the keys [keys, ...], once for all segments.

        Args:
            queries: dO, query, O [T, heads, D] and ℓ [T, heads]; O and ℓ may belong to more keys than a segment's.
            keys: Key and value.
        """
        ...

    def backward(self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], scale: float) -> Grads:
        """Gradients of query, key and value, from the rows of `prepare` that belong to these segments."""
        ...


class FlashSegments:
    """The variable-length flash kernels of CUDA devices."""

    def __init__(self, queries: Bounds, keys: Bounds, causal: bool, device: torch.device):
        bounds = (torch.tensor(each, dtype=torch.int32) for each in (queries, keys))
        on_device = (
            each.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else each for each in bounds
        )
        longest = (max(map(int.__sub__, each[1:], each)) for each in (queries, keys))
        self.where = (*on_device, *longest)
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._flash_attention_forward
        out, lse, *_ = flash(query, key, value, *self.where, 0.0, self.causal, False, scale=scale)
        return out, lse.T

    @staticmethod
    def prepare(queries: ByQuery, keys: ByKey, scale: float) -> tuple[ByQuery, ByKey]:
        grad, query, out, lse = queries
        return (grad.contiguous(), query, out, lse), keys

    def backward(self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], scale: float) -> Grads:
        flash = torch.ops.aten._flash_attention_backward
        grad, query, out, lse = queries
        saved = (grad, query, *keys, out, lse.T.contiguous())
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        return flash(*saved, *self.where, 0.0, self.causal, *no_dropout, scale=scale)


@dataclass(frozen=True)
class _Block:
    """Segments of a row that are computed together: one, as it is, or several short ones, padded to the longest."""

    queries: slice
    keys: slice
    places: Tensor | None = None  # [S, longest] in the row, 0 for padding; instead of the slices
    inside: Tensor | None = None  # which of all S · longest are tokens, and which padding
    outside: Tensor | None = None

    def take(self, x: Tensor, where: slice) -> Tensor:
        """[S, tokens, ...] of a tensor [T, ...], zeros for padding."""
        if self.places is None or self.outside is None:
            return x[where][None]
        return x.index_select(0, self.places.flatten()).index_fill_(0, self.outside, 0).unflatten(0, self.places.shape)

    def put(self, x: Tensor, where: slice, rows: Tensor) -> None:
        """Write rows [S, tokens, ...] to x [T, ...]."""
        if self.places is None or self.inside is None:
            x[where] = rows[0]
        else:
            x.index_copy_(0, self.places.flatten()[self.inside], rows.flatten(0, 1).index_select(0, self.inside))


class BlockSegments:
    """The CPU's flash kernel forward; backward, plain matrix products over the scores of one block at a time.

    The kernel shares keys among heads since torch 2.9. Its backward pass works in products too small to be fast: it
    took 1.4 to 7 times as long. Ours keeps scores and probabilities in float32 and rounds only the factors of products
    to bfloat16, which loses nothing of queries, keys and values in that type.
    """

    def __init__(self, queries: Bounds, keys: Bounds, causal: bool, device: torch.device):
        self.causal = causal
        self.blocks: list[_Block] = []
        short: list[tuple[int, int]] = []  # length and start
        for start, end, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
            if causal and end - start <= SHORT:
                short.append((end - start, start))
            elif end > start:
                self.blocks.append(_Block(slice(start, end), slice(first, last)))
        short = sorted((each for each in short if each[0]), reverse=True)
        while short:
            longest = short[0][0]
            near = [each for each in short if longest - each[0] <= NEAR][: max(1, SCORES // longest**2)]
            short = short[len(near) :]
            self.blocks.append(_together(near))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for block in self.blocks:
            q = block.take(query, block.queries).transpose(1, 2)
            k, v = (block.take(x, block.keys).transpose(1, 2) for x in (key, value))
            attended, sums = flash(q, k, v, 0.0, self.causal, scale=scale)
            block.put(out, block.queries, attended.transpose(1, 2))
            block.put(lse, block.queries, sums.transpose(1, 2))
        return out, lse

    @staticmethod
    def prepare(queries: ByQuery, keys: ByKey, scale: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        grad, query, out, lse = queries
        grad = grad.to(lse.dtype)
        delta = (grad * out).sum(-1)
        by_query = tuple(x.unflatten(1, (keys[0].shape[1], -1)) for x in (query.to(lse.dtype), grad, lse, delta))
        return by_query, tuple(x.to(lse.dtype) for x in keys)

    def backward(self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], scale: float) -> Grads:
        (query, *_), (key, _) = queries, keys
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(key)
        for block in self.blocks:
            q, g = (_by_key_head(block.take(x, block.queries)) for x in queries[:2])
            lse, delta = (_by_key_head(block.take(x, block.queries)[..., None]) for x in queries[2:])
            k, v = (_by_key_head(block.take(x, block.keys)[:, :, :, None])[:, 0] for x in keys)
            dq, dk, dv = _block_backward((q, g, lse, delta), k, v, scale, self.causal)
            block.put(to_query, block.queries, _by_token(dq, key.shape[1]))
            for whole, part in (to_key, dk), (to_value, dv):
                block.put(whole, block.keys, _by_token(part[:, None], key.shape[1])[:, :, :, 0])
        return to_query.flatten(1, 2), to_key, to_value


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Within this context, CPUs that multiply bfloat16 round the factors of float32 products to it, if `dtype` is it.

    The sums stay in float32.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch sets it when it is imported
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _together(segments: Sequence[tuple[int, int]]) -> _Block:
    """One block of causal segments, each (length, start); the first is the longest."""
    if len(segments) == 1:
        ((length, start),) = segments
        return _Block(slice(start, start + length), slice(start, start + length))
    lengths, starts = (torch.tensor(each)[:, None] for each in zip(*segments, strict=True))
    steps = torch.arange(segments[0][0])
    real = steps < lengths
    inside, outside = (each.flatten().nonzero()[:, 0] for each in (real, ~real))
    return _Block(slice(0), slice(0), torch.where(real, starts + steps, 0), inside, outside)


def _by_key_head(x: Tensor) -> Tensor:
    """[S, n, key heads, G, D] as [S·key heads, G, n, D]."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 1)


def _by_token(x: Tensor, key_heads: int) -> Tensor:
    """[S·key heads, G, n, D] as [S, n, key heads, G, D]."""
    return x.unflatten(0, (-1, key_heads)).permute(0, 3, 1, 2, 4)


def _block_backward(
    queries: tuple[Tensor, ...], key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [heads, G, n, D], keys and values [heads, m, D] of one block, a tile of queries at a time.

    Args:
        queries: Query and dO [heads, G, n, D], log-sum-exp and rowsum(dO ∘ O) [heads, G, n, 1].
        key: [heads, m, D]; value likewise.
    """
    to_query, to_key, to_value = torch.empty_like(queries[0]), torch.zeros_like(key), torch.zeros_like(key)
    heads, G, n, _ = to_query.shape
    step = max(1, TILE_SCORES // (heads * G * key.shape[1]))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        q, g, lse, delta = (x[:, :, rows].flatten(1, 2) for x in queries)
        m = rows.stop if causal else key.shape[1]
        k, v = key[:, :m], value[:, :m]
        scores = torch.baddbmm(q.new_empty(heads, q.shape[1], m), q, k.mT, beta=0, alpha=scale)
        if causal:
            size = rows.stop - start
            future = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
            scores.unflatten(1, (G, size))[..., start:] += future
        probabilities = scores.sub_(lse).exp_()
        slope = torch.bmm(g, v.mT).sub_(delta).mul_(probabilities)
        to_query[:, :, rows] = torch.bmm(slope, k).mul_(scale).unflatten(1, (G, -1))
        to_key[:, :m].baddbmm_(slope.mT, q, alpha=scale)
        to_value[:, :m].baddbmm_(probabilities.mT, g)
    return to_query, to_key, to_value


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the device has kernels for these heads and this type."""
    if query.shape[-1] != value.shape[-1]:
        return False  # values of another size than keys
    if query.is_cuda:
        return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and not query.shape[-1] % 8
    return query.device.type == "cpu"


@dataclass(frozen=True)
class CrossAttention:
    """An attention beside the tokens' own: some queries of the row over keys of other tokens."""

    queries: slice
    keys: slice
    segments: Segments


@dataclass(frozen=True)
class Row:
    """The attentions of a packed row."""

    own: Segments
    beside: Sequence[CrossAttention]

    @classmethod
    def of(
        cls,
        prompt_lengths: Sequence[int],
        response_lengths: Sequence[Sequence[int]],
        device: torch.device,
        kernels: type[Segments] | None = None,
        common: int = 0,
    ) -> "Row":
        """Lay out a row.

        Args:
            prompt_lengths: Tokens of each of B prompts.
            response_lengths: Tokens of the K responses to each.
            kernels: The device's by default.
            common: Tokens with which all prompts begin, fewer than each has; the row holds them once.
        """
        kernels = kernels or (FlashSegments if device.type == "cuda" else BlockSegments)
        beginning, rests = [common] if common else [], [length - common for length in prompt_lengths]
        own = _bounds([*beginning, *rests, *chain(*response_lengths)])
        start, end = own[len(beginning) + len(rests)], own[-1]  # of the responses
        beside = []
        if start < end:
            families = kernels(_bounds(map(sum, response_lengths)), _bounds(rests), False, device)
            beside.append(CrossAttention(slice(start, end), slice(common, start), families))
        if common:
            others = kernels([0, end - common], [0, common], False, device)
            beside.append(CrossAttention(slice(common, end), slice(0, common), others))
        return cls(kernels(own, own, True, device), beside)


def _bounds(lengths: Iterable[int]) -> Bounds:
    return [0, *accumulate(lengths)]


class RowAttention(torch.autograd.Function):
    """Attention of a packed row: query [T, heads, D], key and value [T, key heads, D]; the output is like the query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float) -> Tensor:
        out, lse = row.own.forward(query, key, value, scale)
        for part in row.beside:
            q, k = part.queries, part.keys
            more, more_lse = part.segments.forward(query[q], key[k], value[k], scale)
            share = torch.sigmoid(more_lse - lse[q])[..., None]
            out[q] = out[q].to(share.dtype).lerp_(more.to(share.dtype), share)
            lse[q] = torch.logaddexp(lse[q], more_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,), (query, key, value, out, lse) = grads, ctx.saved_tensors
        own: Segments = ctx.row.own
        queries, keys = own.prepare((grad, query, out, lse), (key, value), ctx.scale)
        with _products_in(query.dtype):
            to_query, to_key, to_value = own.backward(queries, keys, ctx.scale)
            for part in ctx.row.beside:
                q, k = part.queries, part.keys
                more = part.segments.backward(tuple(x[q] for x in queries), tuple(x[k] for x in keys), ctx.scale)
                for whole, of_part in zip((to_query[q], to_key[k], to_value[k]), more, strict=True):
                    whole += of_part
        return *(x.to(query.dtype) for x in (to_query, to_key, to_value)), None, None
