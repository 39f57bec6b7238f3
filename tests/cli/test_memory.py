"""`doctor --memory` computes what a loaded model takes, without loading it."""

import json
from pathlib import Path

import pytest
import torch

from lit_align.cli import main
from lit_align.cli.memory import weightless_policy
from lit_align.objectives import DPO, PreferenceObjective, RewardModel, SimPO
from lit_align.objectives.memory import memory_parts
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import RefreshRule

MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("objective", "lora", "rule"),
    [
        (DPO, None, None),
        (DPO, None, RefreshRule(0.6, 1)),
        (DPO, LoRAConfig(r=4), RefreshRule(1.0, 8)),
        (DPO, LoRAConfig(r=4), RefreshRule(0.6, 1)),
        (SimPO, LoRAConfig(r=4), None),
        (RewardModel, LoRAConfig(r=4), None),
    ],
)
def test_a_model_without_weights_has_the_memory_of_the_loaded_one(tiny_model, objective, lora, rule):
    def parts(module: PreferenceObjective, device: str) -> dict[str, int]:
        if isinstance(module, DPO):
            module.set_refresh_rule(rule)
        with torch.device(device):
            if device == "meta":
                module.policy = weightless_policy(module)
            module.configure_model()
        return memory_parts(module)

    computed, loaded = (parts(objective(PolicyConfig(tiny_model), lora=lora), device) for device in ("meta", "cpu"))
    assert computed == loaded


def test_a_reference_of_another_shape_is_counted_without_its_weights(in_tmp, capsys):
    """By hand: half the layers, 3.758 billion weights of 2 bytes."""
    for name, layers in {"policy": 32, "reference": 16}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(MISTRAL | {"num_hidden_layers": layers}))
    options = ["--model=DPO", "--model.policy.path=policy", "--model.policy.dtype=bfloat16", "--data=OfflinePairs"]
    main(["doctor", "--memory", *options, "--data.train=x", "--model.reference.path=reference"])
    assert "+ 7.52 reference" in capsys.readouterr().out


def test_a_7b_model_fits_a_gpu_of_24_gb_in_4_bits(in_tmp, capsys, set_kernels):
    """By hand: 6.979 billion packed weights of 0.516 bytes, 0.54 GB of embeddings and head, 41.9 M of the adapter."""
    Path("config.json").write_text(json.dumps(MISTRAL))
    Path("pairs.jsonl").write_text("")
    options = ["--model.policy.path=.", "--model.policy.quantize=nf4", "--model.policy.gradient_checkpointing=true"]
    options += ["--model=DPO", "--model.lora.r=16", "--data=OfflinePairs", "--data.train=x"]

    def shown(*args: str) -> dict[str, str]:
        main(["doctor", "--memory", *options, *args])
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}

    set_kernels(False)
    assert "float32, as auto means on this CPU; for a GPU, add --model.policy.dtype=bfloat16" in shown()["type"]
    lines = shown("--model.policy.dtype=bfloat16")
    set_kernels(True)
    assert shown() == lines
    assert "7.25 billion weights" in lines["model"]
    assert "about 4.81 GB = 4.31 policy + 0.17 gradients + 0.34 AdamW" in lines["training"]
    assert "14.50 GB more while a plain copy samples" in lines["sampling"]
    assert "0.26 GB more for 1,000 tokens" in lines["activations"]


def test_a_model_without_a_config_is_named(in_tmp, capsys):
    with pytest.raises(SystemExit):
        main(
            ["doctor", "--memory", "--model=DPO", "--model.policy.path=./none", "--data=OfflinePairs", "--data.train=x"]
        )
    assert "model.policy.path: there is no folder './none'" in capsys.readouterr().err
