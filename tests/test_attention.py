"""Attention of a packed row against a plain softmax over a mask of the whole row, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align import attention
from lit_align.attention import BlockSegments, FlashSegments, Row, RowAttention, Segments

HEADS, KEY_HEADS, SIZE, SCALE = 6, 2, 8, 0.4
TILE = 160  # tokens of a segment that is just one tile; longer than `SHORT`
Lengths = tuple[list[int], list[list[int]]]  # of prompts, and of the responses to each
CASES: dict[str, Lengths] = {
    "one token each": ([1], [[1]]),
    "short": ([5, 1, 9], [[3, 1], [7, 2], [4, 4]]),
    "an empty response": ([4, 2], [[3, 0], [0, 0]]),
    "prompts around a tile": ([TILE - 1, TILE, TILE + 1], [[2], [1], [3]]),
    "responses around a tile": ([3, 2], [[TILE - 1, TILE], [TILE + 1, 1]]),
    "families longer than a tile": ([20], [[100, 90, 95, 110, 30]]),
    "more short responses than one block holds": ([4], [[90, 85] * 10]),
    "many short responses": ([6, 11], [[3, 5, 8, 2, 9, 1, 4, 4], [7, 7, 7, 7, 20, 20, 40, 41]]),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_SCORES", HEADS * TILE**2)


def inputs(lengths: Lengths, dtype: torch.dtype = torch.float64, sharpness: float = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    T = sum(lengths[0]) + sum(map(sum, lengths[1]))
    shapes = [(T, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [(torch.randn(shape, generator=generator) * sharpness).to(dtype).requires_grad_() for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, common: int = 0) -> Tensor:
    """The definition: each token sees the earlier tokens of its sequence, and a response's also its prompt."""
    prompts, responses = lengths
    sequence = torch.tensor(
        [(-1, 0, i) for i in range(common)]
        + [(b, 0, i) for b, n in enumerate(prompts) for i in range(common, n)]
        + [(b, 1 + k, i) for b, each in enumerate(responses) for k, n in enumerate(each) for i in range(n)]
    )
    (b, k, i), (other_b, other_k, other_i) = sequence.T[:, :, None], sequence.T[:, None]
    seen = ((b == other_b) | (other_b < 0)) & (((k == other_k) & (other_i <= i)) | ((k > 0) & (other_k == 0)))
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def row_attention(lengths: Lengths, kernels: type[Segments] | None = None, common: int = 0) -> Callable[..., Tensor]:
    row = Row.of(*lengths, torch.device("cpu"), kernels, common)
    return lambda query, key, value: RowAttention.apply(query, key, value, row, SCALE)  # type: ignore[return-value]


def outputs_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


class VarlenKernels:
    """CUDA's two operators, from their definition; here, too, the gradients depend on the given `out` and `lse`.

    They take their arguments in the order of `aten::_flash_attention_forward` and `_backward`.
    """

    def segments(self, bounds: Tensor) -> list[slice]:
        assert bounds.dtype == torch.int32
        return [slice(*pair) for pair in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)]

    def scores(self, query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(HEADS // KEY_HEADS, 1)) * scale
        return scores + torch.full(scores.shape[1:], -torch.inf).triu(1) if causal else scores

    def _flash_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, causal: bool, debug: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, lse = torch.zeros_like(query), query.new_full((HEADS, len(query)), -torch.inf)
        for q, k in zip(self.segments(cum_q), self.segments(cum_k), strict=True):
            assert q.stop - q.start <= max_q
            assert k.stop - k.start <= max_k
            scores = self.scores(query[q], key[k], causal, scale)
            lse[:, q] = scores.logsumexp(-1)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k].repeat_interleave(HEADS // KEY_HEADS, 1))
        return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cum_q: Tensor,
        cum_k: Tensor, max_q: int, max_k: int, dropout_p: float, causal: bool, *no_dropout: Tensor, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query, key, value))
        for q, k in zip(self.segments(cum_q), self.segments(cum_k), strict=True):
            wide_k, wide_v = (x[k].repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
            p = (self.scores(query[q], key[k], causal, scale) - lse[:, q, None]).exp()
            delta = (grad[q] * out[q]).sum(-1).T[..., None]
            slope = p * (torch.einsum("qhd,khd->hqk", grad[q], wide_v) - delta) * scale
            to_query[q] = torch.einsum("hqk,khd->qhd", slope, wide_k)
            to_key[k] = torch.einsum("hqk,qhd->khd", slope, query[q]).unflatten(1, (KEY_HEADS, -1)).sum(2)
            to_value[k] = torch.einsum("hqk,qhd->khd", p, grad[q]).unflatten(1, (KEY_HEADS, -1)).sum(2)
        return to_query, to_key, to_value


@pytest.mark.parametrize("kernels", [BlockSegments, FlashSegments], ids=["CPU", "GPU"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_attends_like_a_plain_softmax(case: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels is FlashSegments:
        monkeypatch.setattr(attention.torch.ops, "aten", VarlenKernels())
    lengths = CASES[case]
    ours = outputs_and_gradients(row_attention(lengths, kernels), inputs(lengths))
    exact = outputs_and_gradients(lambda q, k, v: plain(q, k, v, lengths), inputs(lengths))
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernels", [BlockSegments, FlashSegments], ids=["CPU", "GPU"])
@pytest.mark.parametrize("common", [1, 4, TILE - 1])
def test_a_beginning_that_prompts_share_is_seen_by_all(
    common: int, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels is FlashSegments:
        monkeypatch.setattr(attention.torch.ops, "aten", VarlenKernels())
    lengths = [common + 1, common + 9, common + 1], [[3, 1], [0, 2], [4, 4]]
    leaves = [x[: x.shape[0] - 2 * common].detach().requires_grad_() for x in inputs(lengths)]
    ours = outputs_and_gradients(row_attention(lengths, kernels, common), leaves)
    exact = outputs_and_gradients(lambda q, k, v: plain(q, k, v, lengths, common), leaves)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sharpness", [1, 3], ids=["", "sharp attention"])
def test_bfloat16_is_as_exact_as_the_devices_kernel(sharpness: float) -> None:
    lengths = CASES["families longer than a tile"]
    exact = outputs_and_gradients(lambda q, k, v: plain(q, k, v, lengths), inputs(lengths, sharpness=sharpness))
    ours = outputs_and_gradients(row_attention(lengths), inputs(lengths, torch.bfloat16, sharpness))

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (prompt,), (responses,) = lengths
        places = [*range(prompt, prompt + sum(responses))]
        rows, attended = [[*range(prompt)]], []
        for n in responses:
            rows.append([*range(prompt), *places[:n]])
            places = places[n:]
        for row in rows:
            q, k, v = (x[row].transpose(0, 1)[None] for x in (query, key, value))
            k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
            attended.append(out[0].transpose(0, 1)[0 if row is rows[0] else prompt :])
        return torch.cat(attended)

    theirs = outputs_and_gradients(kernel, inputs(lengths, torch.bfloat16, sharpness))
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert (our - true).norm() < 1.1 * (their - true).norm() < 0.03 * true.norm()


def test_short_responses_are_computed_together() -> None:
    row = Row.of([300, 200], [[30, 31, 20], [25, 300, 3]], torch.device("cpu"))
    blocks = [1 if block.places is None else len(block.places) for block in row.own.blocks]  # type: ignore[attr-defined]
    assert sorted(blocks) == [1, 1, 1, 1, 4]  # two prompts, 300, 3; and 31, 30, 25, 20
