"""The RMSNorm that computes a few rows at a time gives transformers' numbers."""

import pytest
import torch
from architectures import MODELS, build
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_align import row_norm
from lit_align.policy import Policy, PolicyConfig
from lit_align.row_norm import RowNorm, RowNormProduct, keep_norms_in_cache

D = 40
ROWS = 5
"""Computed at once in these tests."""


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_norm, "AT_ONCE", ROWS * D // torch.get_num_threads())


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms(dtype: torch.dtype = torch.bfloat16) -> tuple[LlamaRMSNorm, RowNorm]:
    """A norm of transformers and ours, with the same weight."""
    model = nn.Sequential(LlamaRMSNorm(D, eps=1e-3))
    model[0].weight.data = draw(D, dtype=dtype)
    theirs = model[0]
    keep_norms_in_cache(model)
    ours = model[0]
    assert isinstance(theirs, LlamaRMSNorm)
    assert isinstance(ours, RowNorm)
    return theirs, ours


@pytest.mark.parametrize("tokens", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_its_output_is_that_of_transformers_to_the_bit(tokens: int, dtype: torch.dtype) -> None:
    theirs, ours = norms(dtype)
    x = draw(2, tokens, D, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))


def test_the_input_need_not_be_contiguous() -> None:
    theirs, ours = norms()
    x, grad = (draw(1, 3, D, 7).transpose(2, 3) for _ in range(2))  # heads of a query, as in Qwen3
    grads = []
    for each in (x, x.contiguous()):
        each.requires_grad_()
        y = ours(each)
        assert torch.equal(y, theirs(each))
        grads += torch.autograd.grad(y, each, grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("tokens", [1, ROWS, 3 * ROWS + 1])
def test_its_gradients_are_those_of_float64(tokens: int) -> None:
    _, ours = norms()
    x, grad = draw(tokens, D).requires_grad_(), draw(tokens + 1, D)[1:]
    ours(x).backward(grad)
    wide, weight = (each.detach().double().requires_grad_() for each in (x, ours.weight))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ours.eps)
    (weight * normed).backward(grad.double())
    for given, expected in ((x.grad, wide.grad), (ours.weight.grad, weight.grad)):
        assert given is not None
        assert expected is not None
        torch.testing.assert_close(given.double(), expected, rtol=2**-8, atol=2**-16)


def test_a_frozen_weight_gets_no_gradient() -> None:
    _, ours = norms()
    ours.requires_grad_(False)
    x = draw(3, D).requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None
    assert ours.weight.grad is None


def test_it_keeps_one_bfloat16_number_for_each_of_the_input() -> None:
    _, ours = norms()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = draw(100, D).requires_grad_()
        ours(x)
    assert sum(each.nbytes for each in kept) == 2 * 100 * D + 2 * D + 4 * 100


def test_norms_of_other_numbers_stay() -> None:
    model = nn.Sequential(Gemma2RMSNorm(D), nn.RMSNorm(D, eps=1e-6), nn.LayerNorm(D))  # w + 1; other rounding
    before = list(model)
    keep_norms_in_cache(model)
    assert list(model) == before


def test_a_loaded_policy_has_them_and_its_names_stay(tiny_model: str) -> None:
    policy = Policy.load(PolicyConfig(tiny_model, dtype="bfloat16"))
    copied = policy.merged_copy()
    for model in (policy.model, copied):
        assert isinstance(model.get_submodule("model.norm"), RowNorm)
        assert isinstance(model.get_submodule("model.layers.0.input_layernorm"), RowNorm)
    assert policy.model.state_dict().keys() == type(policy.model)(policy.model.config).state_dict().keys()


@pytest.mark.parametrize("name", list(MODELS))
def test_every_architecture_computes_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.bfloat16).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        keep_norms_in_cache(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    has_them = any(isinstance(layer, RowNorm) for layer in model.modules())
    ran: list[Tensor] = []
    monkeypatch.setattr(
        RowNormProduct, "apply", lambda x, *rest, apply=RowNormProduct.apply: ran.append(x) or apply(x, *rest)
    )
    model(input_ids=ids)
    assert bool(ran) == has_them == (name.split()[0] in ("llama", "qwen2", "qwen3", "mistral", "granite"))
