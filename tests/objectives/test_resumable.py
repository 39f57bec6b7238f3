"""Checkpoints of objectives: what they hold, and modules that are loaded from them."""

import dataclasses
import zipfile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, fit, same, weights, write_pairs

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig

LORA = LoRAConfig(r=4)


def test_a_lora_checkpoint_holds_only_the_adapter(tiny_model):
    for lora in (None, LORA):
        module = DPO(PolicyConfig(tiny_model), lora=lora)
        module.configure_model()
        names = module.state_dict().keys()
        assert names
        assert not any(name.startswith("reference.") for name in names)
        assert lora is None or all(".lora_" in name for name in names)


def test_a_module_is_loaded_from_its_checkpoint_outside_a_trainer(tiny_model, pairs, tmp_path):
    module = DPO(PolicyConfig(tiny_model), lora=LORA, beta=0.3, optimizer=adamw(), label_smoothing=0.1)
    trainer = fit(module, pairs)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = DPO.load_from_checkpoint(tmp_path / "run.ckpt")
    assert (loaded.beta, loaded.label_smoothing) == (0.3, 0.1)
    assert same(weights(module), weights(loaded))
    with pytest.raises(UserError, match="this checkpoint belongs to another model or configuration"):
        DPO.load_from_checkpoint(tmp_path / "run.ckpt", lora=None)


def test_a_module_from_a_checkpoint_trains_on(tiny_model, pairs, tmp_path):
    """Its policy is not its reference any more, so the step-0 check does not apply."""
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw(0.1))
    fit(module, pairs).save_checkpoint(tmp_path / "run.ckpt")
    loaded = DPO.load_from_checkpoint(tmp_path / "run.ckpt", optimizer=adamw(0.1))
    fit(loaded, pairs)
    assert not same(weights(module), weights(loaded))


@pytest.mark.parametrize(
    ("lora", "policy", "alpha"),
    [
        (LORA, {}, 1.0),  # one past adapter
        (LORA, {}, 0.9),  # a ring
        (LORA, {}, 0.1),  # dense updates
        (None, {}, 0.5),
        (None, {"dtype": "bfloat16"}, 0.5),  # a float32 accumulator
    ],
    ids=["LoRA, hard", "LoRA, ring", "LoRA, dense", "full", "bfloat16, soft"],
)
def test_a_module_with_a_moved_reference_is_loaded_from_its_checkpoint(
    tiny_model, pairs, tmp_path, lora, policy, alpha
):
    module = DPO(PolicyConfig(tiny_model, **policy), lora=lora, optimizer=adamw())
    trainer = fit(module, pairs, ReferenceRefresh(alpha, 1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = DPO.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.refresh_rule == module.refresh_rule
    saved, again = module.state_dict(), loaded.state_dict()
    assert same(saved, again)
    batch = next(iter(pairs.train_dataloader()))
    assert torch.equal(loaded.reference.logps(batch), module.reference.logps(batch))


def test_a_checkpoint_holds_plain_values_that_become_dataclasses(tiny_model, pairs, tmp_path):
    reference, lora = ReferenceConfig(form="copy"), LoRAConfig(r=2)
    module = DPO(PolicyConfig(tiny_model, temperature=0.9), lora=lora, reference=reference)
    fit(module, pairs, max_steps=1).save_checkpoint(tmp_path / "run.ckpt")
    with zipfile.ZipFile(tmp_path / "run.ckpt") as archive:
        (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"lit_align" not in pickled
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["policy"] == dataclasses.asdict(module.policy_config)
    loaded = DPO.load_from_checkpoint(tmp_path / "run.ckpt")
    assert (loaded.policy_config, loaded.lora, loaded.reference_config) == (module.policy_config, lora, reference)


class Plain(DPO):
    """A user's own optimizer, without a schedule."""

    def configure_optimizers(self):
        assert self.policy is not None
        return torch.optim.SGD([weight for _, weight in self.policy.trainable_weights()], lr=0.1)


@pytest.mark.parametrize("each_round", [False, True])
def test_a_module_without_a_schedule_resumes_as_the_whole_run(tiny_model, in_tmp, each_round):
    def train(**options) -> Plain:
        module = Plain(PolicyConfig(tiny_model), reset_optimizer_each_round=each_round)
        saving = ModelCheckpoint("ckpt", filename="{step}", every_n_train_steps=2)
        fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=2), saving, enable_checkpointing=True, **options)
        return module

    whole = train(max_epochs=2)
    train(max_epochs=1, max_steps=2)
    assert same(weights(train(max_epochs=2, ckpt_path="ckpt/step=2.ckpt")), weights(whole))
