"""Weights that stay pages of their file until they are settled. Several processes are in `test_fsdp_sharding.py`."""

from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lit_align.loading import load_weights
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.reference.copied import CopiedReference
from lit_align.sharding import lazy_weights, settle


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> str:
    """A model whose file is in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    policy = Policy.load(PolicyConfig(tiny_model))
    policy.model.bfloat16().save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


def load(path: str, dtype: Any, lora: LoRAConfig | None = None) -> Policy:
    L.seed_everything(1, verbose=False)
    return Policy.load(PolicyConfig(path, dtype=dtype), lora)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(
        weight.dtype == theirs[name].dtype and torch.equal(weight, theirs[name]) for name, weight in ours.items()
    )


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_lazy_weights_are_converted_when_they_are_settled(model, lora):
    eager = load(model, "float32", lora)
    with lazy_weights():
        lazy = load(model, "float32", lora)
        assert lazy.model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert lazy.dtype == torch.float32
        assert lazy.fingerprint() == eager.fingerprint()
        settle(lazy)
    assert same(lazy, eager)
    assert lazy.model.config.dtype == eager.model.config.dtype


def test_a_lazy_copy_takes_every_type_of_what_it_copies(tiny_model):
    """float32 in the file, bfloat16 in the policy and float32 in the copy: the copy has the policy's rounding."""
    eager = CopiedReference(load(tiny_model, "bfloat16"), dtype=torch.float32)
    with lazy_weights():
        policy = load(tiny_model, "bfloat16")
        lazy = CopiedReference(policy, dtype=torch.float32)
        storages = {weight.data_ptr() for weight in policy.parameters()}
        assert {weight.data_ptr() for weight in lazy.parameters()} == storages, "the policy's memory"
        settle(policy)
        settle(lazy)
    assert same(lazy, eager)
    assert not same(lazy.model, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


def test_a_model_that_keeps_weights_in_float32_is_loaded_as_before(tiny_model, monkeypatch):
    """Its other weights alone are in half precision."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    with lazy_weights():
        model = load_weights(AutoModelForCausalLM, PolicyConfig(tiny_model, dtype="bfloat16"), None)
        settle(model)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
