"""The first step on a real model: the closed form of the loss, and the step-0 check."""

import math
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import Watch, fit, on_policy

from lit_align.callbacks import ReferenceRefresh
from lit_align.errors import UserError
from lit_align.objectives import DPO, IPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig

LORA = LoRAConfig(r=4)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("make", "closed_form"),
    [(DPO, math.log(2)), (lambda *a, **k: DPO(*a, label_smoothing=0.2, **k), math.log(2)), (IPO, 25.0)],
    ids=["DPO", "conservative DPO", "IPO"],
)
def test_the_first_loss_is_the_closed_form_with_margins_of_exactly_zero(
    tiny_model, pairs, lora, make, closed_form, capsys
):
    watch = Watch()
    fit(make(PolicyConfig(tiny_model), lora=lora, beta=0.1), pairs, watch)
    assert watch["train/loss"][0] == pytest.approx(closed_form, rel=1e-6)
    assert watch["train/reward_margin"][0] == 0 == watch["train/reward_accuracy"][0]
    assert "margins exactly 0 ✓ · live reference" in capsys.readouterr().out


def test_a_dtype_that_is_the_policys_own_is_checked_exactly(tiny_model, pairs, capsys):
    reference = ReferenceConfig(dtype="float32")
    fit(DPO(PolicyConfig(tiny_model, dtype="float32"), reference=reference), pairs, max_steps=1)
    assert "margins exactly 0 ✓ · live reference" in capsys.readouterr().out


def test_the_first_step_is_checked_with_recorded_anchors_within_rounding(tiny_model, in_tmp, capsys):
    fit(DPO(PolicyConfig(tiny_model), proximal=0.1), on_policy(in_tmp), max_steps=1)
    said = capsys.readouterr().out
    assert "step-0 check" in said
    assert "≤ 0.001 nats ✓ · recorded anchor" in said.replace("exactly 0", "≤ 0.001 nats")


def test_in_half_precision_the_bound_is_measured_and_said(tiny_model, in_tmp, capsys):
    fit(DPO(PolicyConfig(tiny_model, dtype="bfloat16"), lora=LORA, proximal=0.1), on_policy(in_tmp), max_steps=1)
    (bound,) = re.findall(r"margins (?:exactly 0|[\d.]+ ≤ ([\d.]+) nats) ✓ · recorded anchor", capsys.readouterr().out)
    assert bound == "" or float(bound) > 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "alpha", "exact"),
    [
        ("auto", None, True),
        ("auto", 1.0, True),
        ("auto", 0.9, False),  # a ring
        ("auto", 0.1, False),  # dense updates
        ("copy", None, False),
        ("copy", 1.0, False),
    ],
)
def test_a_run_from_an_adapter_passes_the_step_0_check(tiny_model, pairs, capsys, dtype, form, alpha, exact):
    policy = PolicyConfig(tiny_model, dtype=dtype)
    first = DPO(policy, lora=LoRAConfig(r=2))
    first.configure_model()
    assert first.policy is not None
    assert first.policy.adapter is not None
    torch.manual_seed(1)
    with torch.no_grad():
        for _, weight in first.policy.trainable_weights():
            weight.add_(0.05 * torch.randn_like(weight))
    first.policy.adapter.save_pretrained("adapter")
    refresh = [] if alpha is None else [ReferenceRefresh(alpha, 1)]
    module = DPO(policy, lora=LoRAConfig(adapter="adapter"), reference=ReferenceConfig(form))
    fit(module, pairs, *refresh, max_steps=1)
    said = capsys.readouterr().out
    assert ("margins exactly 0 ✓ · live reference\n" in said) == exact
    assert exact or "live reference that may sum in another order" in said


class Corrupt(Callback):
    """Moves the reference before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            next(pl_module.reference.parameters()).add_(0.05)


def test_a_reference_that_is_not_the_policy_stops_the_first_step(tiny_model, pairs):
    with pytest.raises(UserError, match=r"step-0 check: .* differs by .* and the loss is .* instead of 0.693147"):
        fit(DPO(PolicyConfig(tiny_model)), pairs, Corrupt())


def test_another_model_as_reference_is_not_expected_to_agree(tiny_model, pairs, tmp_path, capsys):
    torch.manual_seed(3)
    other = DPO(PolicyConfig(tiny_model))
    other.configure_model()
    assert other.policy is not None
    with torch.no_grad():
        other.policy.model.lm_head.weight.mul_(1.3)
    other.policy.save(tmp_path / "other")
    watch = Watch()
    fit(DPO(PolicyConfig(tiny_model), reference=ReferenceConfig(path=str(tmp_path / "other"))), pairs, watch)
    assert watch["train/loss"][0] != pytest.approx(math.log(2), abs=1e-4)
    assert "step-0 check" not in capsys.readouterr().out
