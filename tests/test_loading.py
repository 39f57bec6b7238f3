"""Models whose files are damaged, do not fit each other, or would run code: one message that names the model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SIZES
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from lit_align.errors import UserError
from lit_align.loading import turn_off_dropout
from lit_align.policy import LoRAConfig, Policy, PolicyConfig


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Hostile(), folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def configure(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights that run code": (
        as_pickle,
        "cannot load './model': its weights are a pickle that is damaged or would run",
    ),
    "weights cut off": (cut_off, "cannot load './model': SafetensorError: .* incomplete metadata"),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "cannot load './model': Safetens",
    ),
    "weights of another shape": (configure(intermediate_size=999), "cannot load './model': RuntimeError: "),
    "a number of words": (configure(num_hidden_layers="x"), "Validation error for field 'num_hidden_layers'"),
    "heads that do not divide": (configure(num_attention_heads=7), "Class validation error"),
    "a tokenizer's list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "no tokenizer for './mod",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_message(tiny_model: str, in_tmp: Path, damage: str):
    change, message = DAMAGE[damage]
    shutil.copytree(tiny_model, "model")
    change(Path("model"))
    with pytest.raises(UserError, match=rf"^model\.policy\.path: .*{message}"):
        Policy.load(PolicyConfig("./model"), None)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "option", [{"r": 8}, {"alpha": 16}, {"dropout": 0.1}, {"targets": ["q_proj"]}, {"rslora": True}]
)
def test_options_beside_an_adapter_of_ones_own_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"model.lora.{min(option)}=.* has no effect because adapter=mine brings"):
        LoRAConfig(adapter="mine", **option)


def test_dropout_is_off_whatever_its_rate_is_called() -> None:
    config = Starcoder2Config(**SIZES, attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5)
    model, ids = Starcoder2ForCausalLM(config).train(), torch.arange(1, 9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    turn_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
