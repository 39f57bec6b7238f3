"""Each objective trains a real model, from a first loss that is known beforehand."""

import json
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import adamw, fit, on_policy, write_pairs

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import Listwise, OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import CPO, DPO, EXO, IPO, MPO, ORPO, SPPO, SimPO
from lit_align.policy import LoRAConfig, PolicyConfig


class First(Callback):
    """Keeps the first loss and its batch, and whether weights moved."""

    loss = math.nan

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.loss, self.batch = float(trainer.callback_metrics["train/loss"]), batch


def kl_of_uniform_to_softmax(rewards: torch.Tensor, temperature: float) -> float:
    logs = (rewards.double() / temperature).log_softmax(-1)
    return float((1 / logs.shape[1] * (-math.log(logs.shape[1]) - logs)).sum(1).mean())


def estimated_sppo(wins: torch.Tensor, beta: float) -> float:
    """At the anchor, with c(x)/β = log of the mean of exp(P/β)."""
    exponents = wins.double() / beta
    return float(((exponents - exponents.exp().mean(1, keepdim=True).log()) ** 2).sum(1).mean())


ANCHORED = {
    "DPO": (lambda p, **k: DPO(p, **k), {}, lambda b: math.log(2)),
    "PR-DPO": (lambda p, **k: DPO(p, proximal=0.2, **k), {}, lambda b: math.log(2)),
    "DPO from rewards": (
        lambda p, **k: DPO(p, reward_temperature=2.0, **k),
        {"pairing": Listwise()},
        lambda b: math.log(4),
    ),
    "PR-IPO": (lambda p, **k: IPO(p, beta=0.1, proximal=0.1, **k), {}, lambda b: 1 / 0.4**2),
    "EXO": (lambda p, **k: EXO(p, label_smoothing=0.1, **k), {}, lambda b: 0.5 * math.log(0.25 / (0.9 * 0.1))),
    "PR-EXO from rewards": (
        lambda p, **k: EXO(p, proximal=0.1, reward_temperature=3.0, **k),
        {"pairing": Listwise()},
        lambda b: kl_of_uniform_to_softmax(b.rewards, 3.0),
    ),
    "SPPO, hard labels": (lambda p, **k: SPPO(p, beta=0.1, hard_labels=True, **k), {}, lambda b: 2 * 5.0**2),
    "PR-SPPO, soft": (
        lambda p, **k: SPPO(p, beta=0.1, proximal=0.1, **k),
        {},
        lambda b: float((((b.win_probabilities - 0.5) / 0.2) ** 2).sum(1).mean()),
    ),
    "SPPO, estimated constant": (
        lambda p, **k: SPPO(p, beta=0.5, estimate_baseline=True, **k),
        {"pairing": Listwise()},
        lambda b: estimated_sppo(b.win_probabilities, 0.5),
    ),
}


@pytest.mark.parametrize("name", ANCHORED)
def test_the_first_loss_has_its_closed_form_and_training_goes_on(tiny_model, in_tmp, name):
    make, data, closed_form = ANCHORED[name]
    first = First()
    module = make(PolicyConfig(tiny_model), optimizer=adamw())
    fit(module, on_policy(in_tmp, **data), first, ReferenceRefresh(0.5, 2), max_epochs=2)
    assert first.loss == pytest.approx(closed_form(first.batch), rel=1e-3)
    assert module.trainer.global_step >= 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p, **k: SimPO(p, beta=2.0, gamma=0.5, **k), "simpo"),
        (lambda p, **k: CPO(p, beta=0.1, alpha=0.5, **k), "cpo"),
        (lambda p, **k: ORPO(p, beta=0.2, **k), "orpo"),
    ],
    ids=["SimPO", "CPO", "ORPO"],
)
def test_without_a_reference_none_is_loaded_and_the_loss_is_that_of_the_policys_logps(
    tiny_model, in_tmp, make, expected
):
    first = First()
    module = make(PolicyConfig(tiny_model), optimizer=adamw(0.0))
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4), first)
    assert not any(name.startswith("reference") for name, _ in module.named_modules())
    with torch.no_grad():
        logps = module.policy(first.batch).double()
    lengths = first.batch.lengths
    mean = logps / lengths
    margin = {
        "simpo": 2.0 * (mean[:, 0] - mean[:, 1]) - 0.5,
        "cpo": 0.1 * (logps[:, 0] - logps[:, 1]),
        "orpo": torch.logit(mean.exp())[:, 0] - torch.logit(mean.exp())[:, 1],
    }[expected]
    loss = (1 + (-margin).exp()).log() * {"simpo": 1, "cpo": 1, "orpo": 0.2}[expected]
    loss = loss - {"simpo": 0, "cpo": 0.5 * logps[:, 0], "orpo": mean[:, 0]}[expected]
    assert first.loss == pytest.approx(float(loss.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "reward"),
    [
        (lambda p, **k: SimPO(p, beta=2.0, **k), lambda logp, length: 2.0 * logp / length),
        (lambda p, **k: CPO(p, beta=0.1, **k), lambda logp, length: 0.1 * logp),
        (lambda p, **k: ORPO(p, **k), lambda logp, length: (logp / length).exp().logit()),
        (lambda p, **k: MPO(p, beta=0.0, **k), lambda logp, length: logp),
        (lambda p, **k: MPO(p, beta=0.0, length_normalize=True, **k), lambda logp, length: logp / length),
    ],
    ids=["SimPO", "CPO", "ORPO", "MPO", "MPO per token"],
)
def test_the_logged_margin_is_that_of_the_rewards_in_the_loss(tiny_model, in_tmp, make, reward):
    first = First()
    module = make(PolicyConfig(tiny_model), optimizer=adamw(0.0))
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=8), first)
    with torch.no_grad():
        logps = module.policy(first.batch).double()
    rewards = reward(logps, first.batch.lengths)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = module.trainer.callback_metrics
    assert float(metrics["train/reward_margin"]) == pytest.approx(float(margins.mean()), rel=1e-4)
    assert float(metrics["train/reward_accuracy"]) == pytest.approx(float((margins > 0).double().mean()))


def test_ipo_per_token_logs_margins_per_token(tiny_model, in_tmp):
    logged = []
    for length_normalize in (False, True):
        module = IPO(PolicyConfig(tiny_model), length_normalize=length_normalize)
        logps, lengths = torch.tensor([[-6.0, -9.0]]), torch.tensor([[2, 3]])
        logged.append(module.implicit_rewards(logps, torch.tensor([[-8.0, -6.0]]), 0.5, lengths))
    assert logged[0].tolist() == [[1.0, -1.5]]
    assert logged[1].tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("make", [SimPO, CPO, ORPO])
def test_a_refresh_without_a_reference_and_a_beta_of_zero_are_refused(tiny_model, in_tmp, make):
    with pytest.raises(UserError, match="has no reference to refresh"):
        fit(make(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)), ReferenceRefresh(1.0))
    with pytest.raises(UserError, match=r"model.beta=0 must be above 0"):
        make(PolicyConfig(tiny_model), beta=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SPPO(p), "SPPO needs win probabilities"),
        (lambda p: EXO(p, reward_temperature=0.1), "learns from rewards, but the data has none"),
        (lambda p: DPO(p, reward_temperature=0.1), "learns from rewards, but the data has none"),
    ],
)
def test_data_without_rewards_is_refused_with_the_mend(tiny_model, in_tmp, make, message):
    with pytest.raises(UserError, match=message):
        fit(make(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)))


def test_options_that_would_have_no_effect_are_refused(tiny_model):
    with pytest.raises(UserError, match="label_smoothing and robust have no effect"):
        DPO(PolicyConfig(tiny_model), reward_temperature=0.1, label_smoothing=0.1)
    with pytest.raises(UserError, match="leave hard_labels out"):
        SPPO(PolicyConfig(tiny_model), hard_labels=True, estimate_baseline=True)


def test_groups_come_from_files_too_all_of_one_size_and_the_others_counted(tiny_model, in_tmp):
    rows = [{"prompt": f"p{i}", "responses": [f"a{i}", "b", "c"], "rewards": [1.0, i, 0.5]} for i in range(2, 6)]
    rows.append({"prompt": "p", "responses": ["a", "b", "c", "d"], "rewards": [1, 2, 3, 4]})
    (in_tmp / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = OfflinePairs("ranked.jsonl", pairing=Listwise())
    first = First()
    fit(EXO(PolicyConfig(tiny_model), reward_temperature=0.5, optimizer=adamw()), data, first)
    assert first.batch.response_ids.shape[:2] == (4, 3)
    assert first.loss == pytest.approx(kl_of_uniform_to_softmax(first.batch.rewards, 0.5), rel=1e-4)
    assert "4 groups" in data._line
    assert "1 groups of other than 3 responses" in data._line


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_the_tempered_policy_is_its_own_anchor_at_the_start(tiny_model, in_tmp, lora, capsys):
    module = EXO(PolicyConfig(tiny_model, temperature=0.8), lora=lora, optimizer=adamw())
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4), ReferenceRefresh(1.0, 1))
    assert "margins exactly 0 ✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "pairing", "message"),
    [
        (lambda p: DPO(p), Listwise(), "DPO, as it is set, compares two responses"),
        (lambda p: SPPO(p, hard_labels=True), Listwise(), "SPPO, as it is set, compares two responses"),
        (lambda p: SPPO(p, estimate_baseline=True), None, "data.pairing=BestWorst: SPPO's constant is estimated"),
    ],
)
def test_a_pairing_that_the_objective_cannot_use_is_refused_before_a_round_is_drawn(
    tiny_model, in_tmp, make, pairing, message
):
    with pytest.raises(UserError, match=message):
        fit(make(PolicyConfig(tiny_model)), on_policy(in_tmp, pairing=pairing))
    assert not (in_tmp / "rounds").exists()
