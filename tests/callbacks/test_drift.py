"""When the drift is measured, over what, and what a checkpoint has of it."""

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, fit, on_policy

from lit_align.callbacks import Drift
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig


def adaptive(tiny_model: str) -> DPO:
    return DPO(PolicyConfig(tiny_model), proximal=0.1, proximal_target=0.05, optimizer=adamw(3e-3))


def test_the_checkpoint_of_a_rounds_last_step_has_the_lambda_of_the_next(tiny_model, in_tmp):
    """Three rounds of three steps."""

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> DPO:
        module = adaptive(tiny_model)
        options = {"enable_checkpointing": bool(callbacks), "max_epochs": 3, "ckpt_path": ckpt_path}
        fit(module, on_policy(in_tmp), *callbacks, Drift(), **options)
        return module

    whole = run(ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    assert whole.proximal not in (0.1, 0.1 * 1.5, 0.1 * 1.5**2), "three rounds move λ three times"
    for step in (2, 3, 6):
        resumed = run(ckpt_path=f"checkpoints/step={step}.ckpt")
        assert resumed.proximal == whole.proximal
        for name, weight in whole.named_parameters():
            assert torch.equal(resumed.get_parameter(name), weight), (step, name)


def test_a_round_that_ends_before_its_last_batch_moves_lambda_too(tiny_model, in_tmp):
    module = adaptive(tiny_model)
    fit(module, on_policy(in_tmp), Drift(), max_steps=2)
    assert module.proximal != 0.1
