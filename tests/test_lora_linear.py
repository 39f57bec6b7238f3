"""The LoRA layer that computes its update by rows gives peft's numbers."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

from lit_align import lora_linear
from lit_align.lora_linear import LoRALinear, LoRAProduct, keep_updates_in_cache

INPUTS, OUTPUTS, RANK, SCALE = 24, 40, 4, 0.75
TOKENS = [1, lora_linear.ROWS - 1, lora_linear.ROWS, lora_linear.ROWS + 1, 3 * lora_linear.ROWS + 5]


def layers(
    bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, nn.Module]:
    """A layer of peft's and one of ours with the same weights."""
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)).requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"], lora_dropout=dropout)  # type: ignore
        inject_adapter_in_model(config, model)
        for weight in factors(model.get_submodule("0")):
            weight.data = draw(*weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        both.append(model)
    keep_updates_in_cache(both[1])
    assert type(both[0][0]) is lora.Linear
    assert type(both[1][0]) is LoRALinear
    return both[0], both[1]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs for which the product by rows has run."""
    ran: list[Tensor] = []
    monkeypatch.setattr(
        LoRAProduct, "apply", lambda x, *rest, apply=LoRAProduct.apply: ran.append(x) or apply(x, *rest)
    )
    return ran


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_its_output_is_that_of_peft(tokens: int, bias: bool, products: list[Tensor]) -> None:
    theirs, ours = layers(bias)
    x = draw(2, tokens, INPUTS)
    off = (theirs(x).float() - ours(x).float()).abs()
    assert len(products) == 1
    # float32 sums may differ in their last bit, and bfloat16 rounds a few of them the other way
    assert (off > 0).float().mean() < 0.002
    assert (off <= 2**-7 * theirs(x).float().abs()).all()


@pytest.mark.parametrize("tokens", TOKENS)
def test_its_gradients_are_those_of_float64(tokens: int, products: list[Tensor]) -> None:
    _, ours = layers()
    layer = ours.get_submodule("0")
    assert isinstance(layer, LoRALinear)
    x, grad = draw(1, tokens, INPUTS).requires_grad_(), draw(1, tokens, OUTPUTS)
    ours(x).backward(grad)
    W, A, B = (w.detach().double() for w in (layer.base_layer.weight, *factors(layer)))  # type: ignore
    g, x64 = grad[0].double(), x.detach()[0].double()
    assert len(products) == 1
    assert x.grad is not None
    assert layer.base_layer.weight.grad is None
    torch.testing.assert_close(x.grad[0].double(), g @ (W + SCALE * B @ A), rtol=2**-7, atol=2**-5)
    for weight, expected in zip(factors(layer), (SCALE * (g @ B).T @ x64, SCALE * g.T @ (x64 @ A.T)), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-4)


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore


def test_an_input_without_gradient_gets_none() -> None:
    _, ours = layers()
    ours(draw(3, INPUTS)).sum().backward()
    assert all(weight.grad is not None for weight in factors(ours.get_submodule("0")))


@pytest.mark.parametrize("case", ["float32", "dropout", "disabled", "merged", "no rank", "two slots", "autocast"])
def test_other_cases_take_the_path_of_peft(case: str, products: list[Tensor]) -> None:
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    both = layers(dropout=0.5 if case == "dropout" else 0.0, dtype=dtype)
    outputs = []
    for model in both:
        layer = model.get_submodule("0")
        assert isinstance(layer, lora.Linear)
        if case == "disabled":
            layer._disable_adapters = True
        if case == "merged":
            layer.merge()
        if case == "no rank":
            layer._active_adapter = ["another"]
        if case == "two slots":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "second")
            layer._active_adapter = ["default", "second"]
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            outputs.append(model(draw(5, INPUTS, dtype=dtype)))
    assert not products
    assert torch.equal(*outputs)


def test_dropout_is_off_in_evaluation(products: list[Tensor]) -> None:
    theirs, ours = layers(dropout=0.5)
    x = draw(5, INPUTS)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))
    assert len(products) == 1
