"""4-bit weights under an adapter: each number equals that of the same model with its weights unpacked."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes", reason="`test_quantized.py` runs these tests in a process that has it")

import lightning as L
import torch
from tiny import adamw, byte_tokenizer, fit, llama_config, on_policy, write_pairs
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.export import export
from lit_align.objectives import DPO, RewardModel
from lit_align.objectives.memory import size_in_bytes
from lit_align.policy import LoRAConfig, Policy, PolicyConfig
from lit_align.quantization import Quantization, holds_quantized, is_quantized, packed_bytes, size_of

LORA = LoRAConfig(r=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and what is left of it in 4 bits, unpacked.

    In float32, since peft rounds the sum of a bfloat16 layer and its adapter once more on quantized weights.
    """
    whole, unpacked = (str(tmp_path_factory.mktemp(name)) for name in ("whole", "unpacked"))
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(hidden_size=64, intermediate_size=128)).save_pretrained(whole)
    byte_tokenizer().save_pretrained(whole)
    policy_of(whole, "nf4").save(unpacked)
    return whole, unpacked


def config(path: str, quantize: Quantization | None = None) -> PolicyConfig:
    return PolicyConfig(path, quantize=quantize, dtype="float32")


def policy_of(path: str, quantize: Quantization | None = None) -> Policy:
    return Policy.load(config(path, quantize), LORA)


def test_linear_layers_are_quantized_and_counted_in_full(models):
    policy = policy_of(models[0], "nf4")
    plain = policy_of(models[1])
    quantized = [name for name, weight in policy.model.named_parameters() if is_quantized(weight)]
    assert len(quantized) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in quantized)
    assert sum(map(size_of, policy.parameters())) == sum(weight.numel() for weight in plain.parameters())
    assert policy.dtype == torch.float32


def test_an_unpacked_copy_computes_the_same_and_is_a_plain_model(models):
    policy = policy_of(models[0], "nf4")
    copy = policy.merged_copy()
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.evaluating():
        assert torch.equal(policy.model(ids).logits, copy(ids).logits)
    saved = AutoModelForCausalLM.from_pretrained(models[1])
    assert not holds_quantized(saved)
    assert not hasattr(saved.config, "quantization_config")
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, copy.state_dict()[name]), name


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize(
    "refresh",
    [None, {"alpha": 1.0, "tau": 2}, {"alpha": 0.9, "tau": 1}, {"alpha": 0.3, "tau": 1}],
    ids=["fixed", "hard", "past adapters", "dense"],
)
def test_a_run_is_that_of_the_unpacked_model_to_the_bit(models, in_tmp, refresh):
    def run(path: str, quantize: Quantization | None = None) -> tuple[list[float], dict[str, float], str]:
        L.seed_everything(3, verbose=False)
        losses = Losses()
        module = DPO(config(path, quantize), lora=LORA, optimizer=adamw(1e-2))
        pairs = write_pairs(in_tmp)
        callbacks = [losses, *([ReferenceRefresh(**refresh)] if refresh else [])]
        data = OfflinePairs(pairs, batch_size=4, validation=pairs)
        fit(module, data, *callbacks, max_epochs=3, limit_val_batches=1, num_sanity_val_steps=1)
        metrics = {name: value.item() for name, value in module.trainer.callback_metrics.items()}
        return losses.losses, metrics, str(module.reference)

    quantized, plain = run(models[0], "nf4"), run(models[1])
    assert quantized[0][0] == pytest.approx(0.6931472, abs=1e-6)
    assert quantized == plain
    assert len(set(quantized[0])) > 3  # it learns after a validation, too


def test_rounds_sample_from_unpacked_weights(models, in_tmp):
    def responses(path: str, quantize: Quantization | None = None) -> list[Any]:
        L.seed_everything(3, verbose=False)
        module = DPO(config(path, quantize), lora=LORA, proximal=0.1, optimizer=adamw(1e-2))
        data = on_policy(in_tmp, store=f"rounds {quantize}")
        fit(module, data, max_epochs=2)
        return [(group.response_ids, group.sampler_logps) for group in data.current_round.groups]

    assert responses(models[0], "nf4") == responses(models[1])


def test_a_run_resumes_on_the_same_base_and_exports(models, in_tmp):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def module() -> DPO:
        return DPO(config(models[0], "nf4"), lora=LORA, optimizer=adamw(1e-2))

    def data() -> OfflinePairs:
        return OfflinePairs(write_pairs(in_tmp), batch_size=4)

    keep = ModelCheckpoint("checkpoints", filename="{epoch}", save_top_k=-1)
    whole = module()
    fit(whole, data(), keep, max_epochs=2, enable_checkpointing=True)
    resumed = module()
    fit(resumed, data(), max_epochs=2, ckpt_path="checkpoints/epoch=0.ckpt")
    assert whole.policy is not None
    assert resumed.policy is not None
    assert whole.policy.fingerprint() == resumed.policy.fingerprint()
    export("checkpoints/epoch=1.ckpt", "exported")
    exported = AutoModelForCausalLM.from_pretrained("exported")
    assert not holds_quantized(exported)
    for name, weight in whole.policy.merged_copy().state_dict().items():
        assert torch.equal(weight, exported.state_dict()[name]), name


def test_the_memory_of_4_bits_is_counted(models):
    quantized, plain = policy_of(models[0], "nf4"), policy_of(models[1])
    packed = [weight for weight in quantized.parameters() if is_quantized(weight)]
    numbers = sum(map(size_of, packed))
    saved = size_in_bytes(plain.parameters()) - size_in_bytes(quantized.parameters())
    # 4 bytes become half a byte, and a scale of 8 bits for 64 of them; each tensor has tables of 1.3 kB at most
    tables = (4 - 0.5 - 1 / 64) * numbers - saved
    assert 0 < tables < 1300 * len(packed)
    for weight in packed:
        assert 0 <= size_in_bytes([weight]) - packed_bytes(size_of(weight)) < 200  # bitsandbytes' notes on the layer


def test_a_reward_model_keeps_its_new_head_whole(models):
    module = RewardModel(config(models[0], "nf4"), lora=LORA)
    module.configure_model()
    heads = [weight for name, weight in module.policy.named_parameters() if "score" in name and "lora" not in name]
    assert [is_quantized(weight) for weight in heads] == [False]


def test_full_training_of_quantized_weights_is_refused(models):
    with pytest.raises(UserError, match=r"weights of 4 bits cannot be trained themselves. Train an adapter"):
        Policy.load(config(models[0], "nf4"))


def test_a_gguf_file_is_refused(in_tmp):
    Path("model.gguf").touch()
    with pytest.raises(UserError, match=r"quantize=nf4 cannot be used with the GGUF file"):
        Policy.load(PolicyConfig("model.gguf", quantize="nf4"), LORA, byte_tokenizer())


def test_without_bitsandbytes_the_message_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"needs bitsandbytes, which is not installed. Run pip install 'lit-align\[quantize\]'"
    ):
        Policy.load(config(models[0], "nf4"), LORA)
