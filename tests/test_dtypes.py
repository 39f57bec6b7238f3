"""`auto` is bfloat16 where it is fast and float32 elsewhere; what a run resolved it to stays with its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, fit, on_policy, write_pairs
from transformers import AutoModelForCausalLM

from lit_align.callbacks import FSDPSharding
from lit_align.data import GenerateSampler, OfflinePairs
from lit_align.data.samplers.generate import sampling_copy
from lit_align.dtypes import dtype_name, fast_dtype, is_fast
from lit_align.errors import UserError
from lit_align.export import export
from lit_align.loading import resolve_dtype
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.provenance import check

LORA = LoRAConfig(r=2)
SLOW, FAST = False, True
SetKernels = Callable[[bool], None]

# --- what is fast ---


def test_half_precision_is_as_fast_as_its_kernels(set_kernels: SetKernels, monkeypatch: pytest.MonkeyPatch):
    set_kernels(SLOW)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [is_fast(dtype) for dtype in dtypes] == [False, False, True, True]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert [is_fast(dtype) for dtype in dtypes] == [True, False, True, True]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_fast(torch.bfloat16)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert all(map(is_fast, dtypes))


def test_torch_says_which_kernels_it_has():
    """The two operators are private: another torch may lack them."""
    if torch.backends.mkldnn.is_available():
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)
        assert torch.ops.mkldnn._is_mkldnn_fp16_supported() in (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_name_is_that_of_the_option(dtype):
    assert PolicyConfig("model", dtype=dtype_name(dtype)).dtype == dtype_name(dtype)  # type: ignore[arg-type]
    assert getattr(torch, dtype_name(dtype)) is dtype


# --- what auto means ---


@pytest.mark.parametrize(("kernels", "dtype"), [(FAST, torch.bfloat16), (SLOW, torch.float32)])
def test_auto_is_half_precision_only_where_it_is_fast(tiny_model, in_tmp, set_kernels: SetKernels, kernels, dtype):
    set_kernels(kernels)
    assert fast_dtype(torch.bfloat16) == dtype
    assert resolve_dtype(PolicyConfig("model"), LORA) == dtype
    assert resolve_dtype(PolicyConfig("model"), None) == torch.float32
    assert resolve_dtype(PolicyConfig("model", dtype="bfloat16"), LORA) == torch.bfloat16
    policy = Policy.load(PolicyConfig(tiny_model), LORA)
    assert policy.dtype == dtype
    assert {weight.dtype for _, weight in policy.trainable_weights()} == {torch.float32}
    with sampling_copy(policy) as sampler:
        assert isinstance(sampler, GenerateSampler)
        assert sampler.model.dtype == dtype


class Seen(GenerateSampler):
    """Keeps the types that its weights had."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        super().load(policy, dtype, longest)
        self.dtypes |= {weight.dtype for weight in self.model.parameters()}


@pytest.mark.parametrize(
    ("kernels", "options", "dtype"),
    [
        (FAST, {}, torch.bfloat16),
        (SLOW, {}, torch.float32),
        (SLOW, {"sampling_dtype": "bfloat16"}, torch.bfloat16),
        (FAST, {"sampling_dtype": "float32"}, torch.float32),
        (FAST, {"sampling_dtype": "policy"}, torch.float32),
    ],
)
def test_rounds_are_sampled_in_the_faster_type(tiny_model, in_tmp, set_kernels: SetKernels, kernels, options, dtype):
    set_kernels(kernels)
    sampler = Seen()
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), on_policy(in_tmp, sampler=sampler, **options))
    assert sampler.dtypes == {dtype}


# --- the header ---


@pytest.mark.parametrize(
    ("policy", "data", "trainer", "warnings"),
    [
        ({"dtype": "bfloat16"}, {}, {}, ["this CPU multiplies bfloat16 slowly; model.policy.dtype=float32 is faster"]),
        ({}, {}, {"precision": "bf16-mixed"}, ["this CPU multiplies bfloat16 slowly; trainer.precision=32-true is"]),
        ({}, {"sampling_dtype": "bfloat16"}, {}, ["this CPU multiplies bfloat16 slowly; data.sampling_dtype=float32"]),
        ({}, {}, {}, []),
    ],
    ids=["policy", "precision", "sampling", "auto"],
)
def test_the_header_warns_of_a_slow_type(tiny_model, in_tmp, set_kernels: SetKernels, policy, data, trainer, warnings):
    def header() -> list[str]:
        module, rounds = DPO(PolicyConfig(tiny_model, **policy), lora=LORA), on_policy(in_tmp, **data)
        fit(module, rounds, max_steps=1, **trainer)
        return [text for _, text in (*module.describe(), *rounds.describe()) if "slowly" in text]

    set_kernels(SLOW)
    shown = header()
    assert len(shown) == len(warnings)
    assert all(text.startswith(warning) for text, warning in zip(shown, warnings, strict=True)), shown
    set_kernels(FAST)
    assert header() == []


# --- on another machine ---


def run(model: str, ckpt_path: str | None = None, dtype: Any = "auto", data: Any = None, **options: Any) -> DPO:
    module = DPO(PolicyConfig(model, dtype=dtype), lora=LORA, optimizer=adamw())
    saving = ModelCheckpoint("ckpt", save_last=True)
    data = data or OfflinePairs("pairs.jsonl", batch_size=2)
    fit(module, data, saving, ckpt_path=ckpt_path, enable_checkpointing=True, **options)
    return module


def test_a_run_continues_in_the_type_that_it_began_in(tiny_model, in_tmp, set_kernels: SetKernels):
    write_pairs(in_tmp)
    set_kernels(FAST)
    run(tiny_model)
    assert torch.load("ckpt/last.ckpt", weights_only=True)["identity"]["model.policy.dtype"] == "bfloat16"
    set_kernels(SLOW)
    with pytest.raises(UserError, match=r"model\.policy\.dtype: bfloat16 → float32\n.*Resume with what the run had"):
        run(tiny_model, "ckpt/last.ckpt", max_epochs=2)
    resumed = run(tiny_model, "ckpt/last.ckpt", dtype="bfloat16", max_epochs=2)
    assert resumed.trainer.current_epoch == 2
    assert resumed.policy is not None
    assert resumed.policy.dtype == torch.bfloat16


def test_rounds_continue_in_the_type_that_they_began_in(tiny_model, in_tmp, set_kernels: SetKernels):
    set_kernels(FAST)
    run(tiny_model, dtype="float32", data=on_policy(in_tmp))
    set_kernels(SLOW)
    with pytest.raises(UserError, match=r"\(then → now\):\n  data\.sampling_dtype: bfloat16 → float32\nResume"):
        run(tiny_model, "ckpt/last.ckpt", dtype="float32", data=on_policy(in_tmp), max_epochs=2)
    run(tiny_model, "ckpt/last.ckpt", "float32", on_policy(in_tmp, sampling_dtype="bfloat16"), max_epochs=2)


@pytest.mark.parametrize(("lora", "dtype"), [({"model.lora": None}, "float32"), ({"model.lora.r": 2}, "bfloat16")])
@pytest.mark.parametrize("saved", [{"model.policy.dtype": "auto"}, {}], ids=["auto", "older"])
def test_auto_of_an_earlier_version_did_not_depend_on_the_machine(saved, lora, dtype):
    then, defaults = {**saved, **lora}, {"model.policy.dtype": "auto"}
    check(then, {**lora, "model.policy.dtype": dtype}, [], defaults)
    with pytest.raises(UserError, match=rf"model\.policy\.dtype: {dtype} → float64"):
        check(then, {**lora, "model.policy.dtype": "float64"}, [], defaults)


def test_an_export_has_the_type_of_its_run(tiny_model, in_tmp, set_kernels: SetKernels):
    """The adapter fits the weights that it was trained on, whose fingerprint depends on their type."""
    write_pairs(in_tmp)
    set_kernels(FAST)
    run(tiny_model)
    export("ckpt/last.ckpt", "there")
    set_kernels(SLOW)
    export("ckpt/last.ckpt", "here")
    models = [AutoModelForCausalLM.from_pretrained(Path(name)) for name in ("there", "here")]
    assert {model.dtype for model in models} == {torch.bfloat16}
    weights = (dict(model.named_parameters()) for model in models)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_header_warns_of_a_slow_type_on_shards(set_kernels: SetKernels):
    sharding = FSDPSharding(compute_dtype="bfloat16")
    set_kernels(FAST)
    assert list(sharding.describe()) == [("sharded", "computes in bfloat16")]
    set_kernels(SLOW)
    _, (_, warning) = sharding.describe()
    assert warning == "this CPU multiplies bfloat16 slowly; fsdp_sharding.compute_dtype=null is faster"
