"""Response log-probabilities against one row at a time, computed in the open."""

from dataclasses import replace

import pytest
import torch
from architectures import MODELS, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lit_align import attention, logprobs, packing
from lit_align.data.batches import Example, collate
from lit_align.loading import add_adapter, enable_checkpointing, turn_off_dropout
from lit_align.logprobs import PreferenceBatch, check_logits, enable_prefix_sharing, response_logps
from lit_align.policy import LoRAConfig

CANNOT_SHARE = ("gemma2 (soft-capped)", "bloom (ALiBi)")


@pytest.fixture(autouse=True)
def short_rows_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows, as these tests have them, attend like long ones."""
    monkeypatch.setattr(packing, "MASKED_REACH", {})
    monkeypatch.setattr(packing, "COMMON_SHARE", 0)


def random_examples(seed: int = 0, count: int = 3, branches: int = 2) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 61, (length,), generator=generator).tolist()

    return [Example(tokens(1, 14), [tokens(1, 12) for _ in range(branches)], "") for _ in range(count)]


def with_a_common_beginning(examples: list[Example]) -> list[Example]:
    """The examples after ten tokens that all prompts begin with; two prompts share one more."""
    beginning = [*range(20, 30)]
    return [replace(each, prompt_ids=beginning + [7] * (i < 2) + each.prompt_ids) for i, each in enumerate(examples)]


def one_by_one(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """The definition: sum of log softmax at each response token, a row at a time, from the model's own logits."""
    rows = []
    for example in examples:
        for response in example.response_ids:
            ids = torch.tensor([example.prompt_ids + response])
            logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            places = range(len(example.prompt_ids), ids.shape[1])
            rows.append(torch.stack([logps[place - 1, ids[0, place]] for place in places]).sum())
    return torch.stack(rows).view(len(examples), -1)


@pytest.mark.parametrize(("branches", "common"), [(1, False), (2, False), (5, False), (1, True), (3, True)])
@pytest.mark.parametrize("name", MODELS)
def test_logps_equal_the_definition_in_every_architecture(name: str, branches: int, common: bool) -> None:
    model, examples = build(name), random_examples(branches=branches)
    examples = with_a_common_beginning(examples) if common else examples
    assert collate(examples, range(3)).packing.common == 10 * common
    with torch.no_grad():
        expected = one_by_one(model, examples)
        rows = response_logps(model, collate(examples, range(3)))
        assert enable_prefix_sharing(model) == (name not in CANNOT_SHARE)
        packed = response_logps(model, collate(examples, range(3)))
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)


def logps_and_gradients(model: PreTrainedModel, logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probabilities, and the gradients of a weighted sum of them."""
    weights = torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype, device=logps.device).view(logps.shape)
    model.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("branches", "common"), [(2, True), (5, False)], ids=["a common beginning", ""])
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "activations recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_definition(
    name: str, lora: bool, recomputed: bool, branches: int, common: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.LOGITS_CHUNK_BYTES, "cpu", 5 * 61 * 8)
    monkeypatch.setitem(logprobs.KEPT_BYTES, "cpu", 11 * 61 * 8)
    monkeypatch.setattr(packing, "PROMPT_BLOCK", 5)
    monkeypatch.setattr(attention, "TILE_SCORES", 100)
    monkeypatch.setattr(attention, "SHORT", 6)
    model, examples = build(name), random_examples(branches=branches)
    examples = with_a_common_beginning(examples) if common else examples
    if lora:
        model = add_adapter(model, LoRAConfig(r=2)).double().get_base_model()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    expected, exact = logps_and_gradients(model, one_by_one(model, examples))
    if recomputed:
        enable_checkpointing(model)
        model.train()
        turn_off_dropout(model)
    bound = 1e-10 if name in ("gpt_neox", "gpt2", "opt", "phi") else 1e-6  # norms of the others are in float32
    for _ in range(2):  # a row for each response; then, where the model can, all in one
        logps, gradients = logps_and_gradients(model, response_logps(model, collate(examples, range(3))))
        torch.testing.assert_close(logps, expected, rtol=bound, atol=bound)
        assert gradients.keys() == exact.keys()
        for weight, gradient in gradients.items():
            assert (gradient - exact[weight]).norm() <= bound * exact[weight].norm() + 1e-10, weight
        assert enable_prefix_sharing(model) == (name not in CANNOT_SHARE)


@pytest.mark.parametrize("kernels", [set(), {"cpu"}], ids=["", "the device's kernels"])
@pytest.mark.parametrize("common", [False, True], ids=["", "a common beginning"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral (window)"])
def test_float32_gradients_under_masks_are_within_rounding(
    name: str, common: bool, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "FUSED_ATTENTION_DEVICES", kernels)
    monkeypatch.setattr(packing.Packing, "covers", lambda *args, **kwargs: False)
    model, examples = build(name, torch.float32), random_examples()
    examples = with_a_common_beginning(examples) if common else examples
    _, single = logps_and_gradients(model, response_logps(model, collate(examples, range(3))))
    assert enable_prefix_sharing(model)
    _, packed = logps_and_gradients(model, response_logps(model, collate(examples, range(3))))
    for weight, gradient in packed.items():
        assert (gradient - single[weight]).norm() <= 1e-5 * single[weight].norm() + 1e-9, weight


def test_a_common_beginning_is_computed_once_where_this_spares_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "COMMON_SHARE", 0.2)

    def tokens_computed(*prompts: list[int]) -> int:
        return len(
            collate([Example(prompt, [[1, 2]], "") for prompt in prompts], range(len(prompts))).packing.positions
        )

    beginning = [*range(10)]
    assert tokens_computed([*beginning, 4], [*beginning, 5, 6]) == 10 + 1 + 2 + 4
    assert tokens_computed([*beginning], [*beginning, 5, 6]) == 9 + 1 + 3 + 4, "each prompt keeps a token of its own"
    assert tokens_computed(beginning, beginning) == 9 + 1 + 1 + 4
    assert tokens_computed([1, 2, 3, 4, 5], [1, 2, 8, 9, 9]) == 5 + 5 + 4, "2 of 14 tokens are few"
    assert tokens_computed(beginning) == 10 + 2


def test_only_dropout_and_windows_within_a_sequence_need_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mistral (window)")  # of 5
    assert enable_prefix_sharing(model)
    long, short = (collate([Example([5, 6, 7], [[3] * n, [4]], "")], [0]) for n in (3, 2))
    monkeypatch.setattr(packing.Packing, "masks", lambda self, *args: 1 / 0)
    response_logps(model, short)
    with pytest.raises(ZeroDivisionError):
        response_logps(model, long)
    model.train().model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ZeroDivisionError):
        response_logps(model, short)


def test_short_rows_take_masks_where_these_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    assert enable_prefix_sharing(model)
    monkeypatch.setattr(packing, "MASKED_REACH", {"cpu": 5})
    long, short = (collate([Example([5, 6, 7], [[3] * n, [4]], "")], [0]) for n in (3, 2))
    expected = response_logps(model, short)
    monkeypatch.setattr(packing.Packing, "masks", lambda self, *args: 1 / 0)
    response_logps(model, long)
    with pytest.raises(ZeroDivisionError):
        response_logps(model, short)
    monkeypatch.setattr(packing, "MASKED_REACH", {"cuda": 5})
    torch.testing.assert_close(response_logps(model, short), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sharpness", [1, 3], ids=["", "sharp attention"])
def test_bfloat16_attention_goes_back_as_exactly_as_the_devices_kernels(
    sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 6, 40, 16), (2, 2, 50, 16), (2, 2, 50, 16)]  # of query, key, value
    inputs = [(torch.randn(size, generator=generator) * sharpness).bfloat16() for size in sizes]
    mask = torch.zeros(2, 1, 120, 50).masked_fill(torch.rand(2, 1, 120, 50, generator=generator) < 0.3, -torch.inf)

    def gradients(dtype: torch.dtype, kernels: set[str]) -> list[Tensor]:
        monkeypatch.setattr(packing, "FUSED_ATTENTION_DEVICES", kernels)
        leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
        attended = packing._grouped(*leaves, mask.to(dtype))
        return [each.double() for each in torch.autograd.grad(attended.square().sum(), leaves)]

    exact = gradients(torch.float64, {"cpu"})
    torch.testing.assert_close(gradients(torch.float64, set()), exact, rtol=1e-12, atol=1e-12)
    of_bfloat16 = gradients(torch.bfloat16, set()), gradients(torch.bfloat16, {"cpu"})
    for ours, kernels, true in zip(*of_bfloat16, exact, strict=True):
        assert (ours - true).norm() < 1.5 * (kernels - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CANNOT_SHARE])
def test_gradients_under_autocast(name: str) -> None:
    model, batch = build(name, torch.float32), collate(random_examples(), range(3))
    assert enable_prefix_sharing(model)
    _, exact = logps_and_gradients(model, response_logps(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        logps = response_logps(model, batch)
    _, gradients = logps_and_gradients(model, logps)
    whole, half = (torch.cat([each.flatten() for each in named.values()]) for named in (exact, gradients))
    assert (half - whole).norm() < 0.2 * whole.norm()


@pytest.mark.parametrize("packed", [True, False])
def test_padding_batch_order_and_company_change_nothing(packed: bool) -> None:
    model, examples = build("gpt_neox"), random_examples(count=4)
    assert not packed or enable_prefix_sharing(model)

    def logps_of(batch: PreferenceBatch) -> Tensor:
        return response_logps(model, batch)

    with torch.no_grad():
        together = logps_of(collate(examples, range(4)))
        backwards = logps_of(collate(examples[::-1], range(4))).flip(0)
        alone = torch.cat([logps_of(collate([example], [0])) for example in examples])
        wide = collate(examples, range(4))
        for field, dims in (("prompt", 5), ("response", 7)):
            for part in ("ids", "mask"):
                name = f"{field}_{part}"
                setattr(wide, name, torch.nn.functional.pad(getattr(wide, name), (0, dims)))
        padded = logps_of(wide)
    for other in (backwards, alone, padded):
        torch.testing.assert_close(other, together, rtol=1e-12, atol=1e-12)


def test_layers_other_than_attention_see_no_padding_and_each_prompt_once() -> None:
    model, examples = build("llama"), random_examples(count=4, branches=3)
    assert enable_prefix_sharing(model)
    seen: list[torch.Size] = []
    model.model.layers[0].mlp.register_forward_hook(lambda layer, args, output: seen.append(args[0].shape))
    response_logps(model, collate(examples, range(4)))
    tokens = sum(len(e.prompt_ids) + sum(map(len, e.response_ids)) for e in examples)
    assert seen == [(1, tokens, model.config.hidden_size)]


def test_a_batch_with_its_layout_makes_no_device_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has shapes only: it cannot say what a GPU would have to wait for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # refused for that device
    model, batch = build("llama"), collate(random_examples(), range(3))
    assert enable_prefix_sharing(model)
    expected = response_logps(model, batch)  # computes the layout
    logps = response_logps(model.to("meta"), batch.to("meta"))
    assert logps.shape == expected.shape
    logps.sum().backward()
    with pytest.raises(NotImplementedError):
        response_logps(model, replace(batch).to("meta"))


def test_rows_that_are_not_packed_go_through_sdpa() -> None:
    model = build("qwen2 (window)")
    ids = torch.arange(1, 15)[None]
    expected = model(input_ids=ids).logits
    assert enable_prefix_sharing(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_prompt_tokens_never_contribute() -> None:
    """log π(y|x) for a prompt that is its own continuation differs from log π(x, y) by exactly log π(x)."""
    model = build("gpt_neox")
    first, second, third = [7], [9, 11, 4], [3, 5]
    with torch.no_grad():
        whole = response_logps(model, collate([Example(first, [second + third], "")], [0]))
        begin = response_logps(model, collate([Example(first, [second], "")], [0]))
        rest = response_logps(model, collate([Example(first + second, [third], "")], [0]))
    torch.testing.assert_close(whole, begin + rest, rtol=1e-12, atol=1e-12)


def test_mean_logp_is_the_sum_divided_by_the_number_of_response_tokens() -> None:
    examples = random_examples()
    batch = collate(examples, range(3))
    assert batch.lengths.tolist() == [[len(ids) for ids in example.response_ids] for example in examples]


def test_an_empty_response_has_logp_zero() -> None:
    batch = collate([Example([5, 6], [[3, 4], []], "")], [0])
    assert response_logps(build("llama"), batch)[0, 1] == 0


class SizesOfLogits(TorchDispatchMode):
    """Collects the number of rows of each product with the output head's 61 columns."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and made.shape[1] == 61:
            self.seen.append(len(made))
        return made


def test_logits_of_the_whole_batch_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (logprobs.LOGITS_CHUNK_BYTES, logprobs.KEPT_BYTES):
        monkeypatch.setitem(limit, "cpu", 4 * 61 * 4)
    model = build("llama", torch.float32)
    batch = collate(random_examples(count=4), range(4))
    with SizesOfLogits() as sizes:
        response_logps(model, batch).sum().backward()
    assert max(sizes.seen) <= 4
    # response tokens only: once forwards and once again backwards, but for the 4 whose gradient is kept
    assert sum(sizes.seen) == 2 * int(batch.lengths.sum()) - 4


def test_a_bfloat16_model_sums_in_float32() -> None:
    logps = response_logps(build("llama", torch.bfloat16), collate(random_examples(), range(3)))
    assert logps.dtype == torch.float32


def test_an_architecture_with_other_logits_is_refused() -> None:
    model = build("llama", torch.float32)
    check_logits(model)
    forward = model.forward

    def odd(*args: object, **kwargs: object):
        output = forward(*args, **kwargs)
        return replace(output, logits=output.logits * 1.5)

    model.forward = odd
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM computes its logits in a way"):
        check_logits(model)


def test_select_keeps_every_field_in_step() -> None:
    batch = collate(random_examples(count=3), [10, 11, 12])
    batch = replace(batch, rewards=torch.arange(6.0).view(3, 2))
    part = batch.select(slice(1, 2))
    assert isinstance(part, PreferenceBatch)
    assert (part.size, part.index.tolist(), part.rewards.tolist()) == (1, [11], [[2.0, 3.0]])


@pytest.mark.parametrize("packed", [True, False])
def test_the_tempered_policys_logits_are_divided(packed: bool):
    torch.manual_seed(0)
    model = MODELS["llama"]().double()
    batch = collate([Example([5, 6], [[7, 8, 9], [10, 11]], "")], [0])
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 1:4] / 0.8
    expected = logits.log_softmax(-1)[range(3), [7, 8, 9]].sum()
    assert not packed or enable_prefix_sharing(model)
    torch.testing.assert_close(response_logps(model, batch, temperature=0.8)[0, 0], expected)


def test_bfloat16_gradients_of_the_head_are_as_exact_as_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(random_examples(count=20, branches=4), range(20))
    _, exact = logps_and_gradients(model := build("llama"), response_logps(model, batch))

    def off() -> list[Tensor]:
        model = build("llama", torch.bfloat16)
        _, gradients = logps_and_gradients(model, response_logps(model, batch))
        return [(gradient - exact[name]).norm() / exact[name].norm() for name, gradient in gradients.items()]

    ours = off()
    monkeypatch.setattr(logprobs, "_plain_head", lambda *args: None)
    assert all(our < 1.05 * their < 0.1 for our, their in zip(ours, off(), strict=True))


def test_what_the_head_keeps_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.LOGITS_CHUNK_BYTES, "cpu", 2 * 61 * 8)
    monkeypatch.setitem(logprobs.KEPT_BYTES, "cpu", 4 * 61 * 8)
    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        kept.extend([len(saved)] if saved.shape[1:] == (61,) else [])
        return saved

    batch = collate([Example([5, 6], [[7, 8, 9, 3, 2], [4, 3, 2, 1]], "")], [0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        response_logps(build("llama"), batch)
    assert kept == [4]


def test_without_gradients_the_head_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the logits, which training keeps, is made in place of their exponentials."""
    model, batch = build("llama"), collate(random_examples(), range(3))
    expected = response_logps(model, batch)
    monkeypatch.setattr(Tensor, "exp_", lambda self: pytest.fail("the gradient is formed"))
    with torch.no_grad():
        assert torch.equal(response_logps(model, batch), expected)
    with pytest.raises(pytest.fail.Exception):
        response_logps(model, batch)
