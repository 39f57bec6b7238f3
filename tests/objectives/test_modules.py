"""Each objective trains a real model, from a first loss that is known beforehand; each option is in its loss."""

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
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import CPO, DPO, EXO, IPO, KTO, MPO, ORPO, SFT, SPPO, RewardModel, SimPO
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
def test_the_first_loss_has_its_closed_form_and_training_continues(tiny_model, in_tmp, name):
    make, data, closed_form = ANCHORED[name]
    first = First()
    module = make(PolicyConfig(tiny_model), optimizer=adamw())
    fit(module, on_policy(in_tmp, **data), first, ReferenceRefresh(0.5, 2), max_epochs=2)
    assert first.loss == pytest.approx(closed_form(first.batch), rel=1e-3)
    assert module.trainer.global_step >= 3


def test_an_estimated_constant_tolerates_rounded_log_probabilities(tiny_model, in_tmp, capsys):
    module = SPPO(PolicyConfig(tiny_model), lora=LoRAConfig(r=4), beta=0.05, proximal=0.05, estimate_baseline=True)
    fit(module, on_policy(in_tmp, pairing=Listwise()), max_steps=1)
    assert "step-0 check" in capsys.readouterr().out


# --- each option, in the loss of a batch: by formulas of the test's own, at β_eff = 0.3 ---


def nll(z: torch.Tensor) -> torch.Tensor:
    """−log σ(z)."""
    return torch.log1p((-z).exp())


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


def soft(z: torch.Tensor) -> torch.Tensor:
    return z.exp() / z.exp().sum(-1, keepdim=True)


def averaged(loss: Any, z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return p * loss(z) + (1 - p) * loss(-z)


def robust(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    there, back = (0.9 * nll(z) - 0.1 * nll(-z)) / 0.8, (0.9 * nll(-z) - 0.1 * nll(z)) / 0.8
    return p * there + (1 - p) * back


def odds(logps: torch.Tensor) -> torch.Tensor:
    return (logps.exp() / (1 - logps.exp())).log()


# of log π x and log anchor a [B, K], lengths n, and the batch's rewards r, win probabilities w and labels p
OPTIONS: dict[str, tuple[Any, Any]] = {
    "DPO": (lambda c: DPO(c), lambda x, a, n, b: averaged(nll, 0.3 * pair(x - a), b.labels)),
    "DPO, smoothed": (
        lambda c: DPO(c, label_smoothing=0.1),
        lambda x, a, n, b: averaged(nll, 0.3 * pair(x - a), 0.9 * b.labels + 0.1 * (1 - b.labels)),
    ),
    "DPO, robust": (
        lambda c: DPO(c, label_smoothing=0.1, robust=True),
        lambda x, a, n, b: robust(0.3 * pair(x - a), b.labels),
    ),
    "DPO, rewards": (
        lambda c: DPO(c, reward_temperature=0.5),
        lambda x, a, n, b: -(soft(b.rewards / 0.5) * soft((x - a) * 0.3 / 0.5).log()).sum(-1),
    ),
    "DPO, per token": (
        lambda c: DPO(c, length_normalize=True, label_smoothing=0.1),
        lambda x, a, n, b: averaged(nll, 0.3 * pair(x / n - a / n), 0.9 * b.labels + 0.1 * (1 - b.labels)),
    ),
    "DPO, rewards, per token": (
        lambda c: DPO(c, length_normalize=True, reward_temperature=0.5),
        lambda x, a, n, b: -(soft(b.rewards / 0.5) * soft((x - a) / n * 0.3 / 0.5).log()).sum(-1),
    ),
    "IPO": (lambda c: IPO(c), lambda x, a, n, b: averaged(lambda h: (h - 1 / 0.6) ** 2, pair(x - a), b.labels)),
    "IPO, per token": (
        lambda c: IPO(c, length_normalize=True),
        lambda x, a, n, b: averaged(lambda h: (h - 1 / 0.6) ** 2, pair(x / n - a / n), b.labels),
    ),
    "EXO": (
        lambda c: EXO(c, label_smoothing=0.2),
        lambda x, a, n, b: kl(soft(0.3 * (x - a)), torch.tensor([0.8, 0.2], dtype=torch.float64)),
    ),
    "EXO, rewards": (
        lambda c: EXO(c, reward_temperature=0.5),
        lambda x, a, n, b: kl(soft((x - a) * 0.3 / 0.5), soft(b.rewards / 0.5)),
    ),
    "SPPO": (lambda c: SPPO(c), lambda x, a, n, b: ((x - a - (b.win_probabilities - 0.5) / 0.3) ** 2).sum(-1)),
    "SPPO, hard": (
        lambda c: SPPO(c, hard_labels=True),
        lambda x, a, n, b: (x - a)[:, 0].sub(0.5 / 0.3) ** 2 + (x - a)[:, 1].add(0.5 / 0.3) ** 2,
    ),
    "SPPO, estimated constant": (
        lambda c: SPPO(c, estimate_baseline=True),
        lambda x, a, n, b: (x - a - b.win_probabilities / 0.3 + sppo_log_z(a, b)).square().sum(-1),
    ),
    "MPO": (lambda c: MPO(c), lambda x, a, n, b: averaged(lambda d: -1 / (1 + (-d).exp()), pair(x), b.labels)),
    "MPO, log": (lambda c: MPO(c, log_form=True), lambda x, a, n, b: averaged(nll, pair(x), b.labels)),
    "MPO, log, per token": (
        lambda c: MPO(c, log_form=True, length_normalize=True),
        lambda x, a, n, b: averaged(nll, pair(x / n), b.labels),
    ),
    "SimPO": (lambda c: SimPO(c, beta=2.5, gamma=0.7), lambda x, a, n, b: nll(2.5 * pair(x / n) - 0.7)),
    "CPO": (
        lambda c: CPO(c, beta=0.2, alpha=0.6),
        lambda x, a, n, b: averaged(nll, 0.2 * pair(x), b.labels) - 0.6 * x[:, 0],
    ),
    "CPO, per token": (
        lambda c: CPO(c, beta=0.2, alpha=0.6, length_normalize=True),
        lambda x, a, n, b: averaged(nll, 0.2 * pair(x), b.labels) - 0.6 * x[:, 0] / n[:, 0],
    ),
    "ORPO": (
        lambda c: ORPO(c, beta=0.2),
        lambda x, a, n, b: 0.2 * averaged(nll, pair(odds(x / n)), b.labels) - x[:, 0] / n[:, 0],
    ),
    "SFT": (lambda c: SFT(c), lambda x, a, n, b: -x[:, 0] / n[:, 0]),
    "RewardModel": (lambda c: RewardModel(c, margin=0.4), lambda x, a, n, b: nll(pair(x) - 0.4)),
    "RewardModel, rows' margin": (
        lambda c: RewardModel(c, margin="rewards"),
        lambda x, a, n, b: nll(pair(x) - pair(b.rewards)),
    ),
}


def pair(values: torch.Tensor) -> torch.Tensor:
    return values[:, 0] - values[:, 1]


def sppo_log_z(anchor: torch.Tensor, batch: PreferenceBatch) -> torch.Tensor:
    """log of the mean of anchor/π_s · exp(P/β), [B, 1]."""
    return ((anchor - batch.sampler_logps).exp() * (batch.win_probabilities / 0.3).exp()).mean(-1, keepdim=True).log()


def batch_of(random: Any, K: int) -> PreferenceBatch:
    lengths = torch.tensor([[3, 7, 2], [5, 1, 4], [6, 6, 1]])[:, :K]
    return PreferenceBatch(
        prompt_ids=torch.zeros(3, 1, dtype=torch.int64),
        prompt_mask=torch.ones(3, 1, dtype=torch.bool),
        response_ids=torch.zeros(3, K, 7, dtype=torch.int64),
        response_mask=torch.arange(7) < lengths[:, :, None],
        index=torch.arange(3),
        sampler_logps=-random(3, K).exp() - 2,
        rewards=random(3, K),
        labels=torch.tensor([1.0, 0.7, 0.2]).double(),
        win_probabilities=torch.sigmoid(random(3, K)),
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_module_is_in_its_loss(name, random):
    make, formula = OPTIONS[name]
    module, batch = make(PolicyConfig("none")), batch_of(random, 3 if name.endswith(("rewards", "constant")) else 2)
    logps, anchor = -random(*batch.rewards.shape).exp() - 1, -random(*batch.rewards.shape).exp() - 1
    loss = module.loss(logps, anchor, 0.3, batch)
    torch.testing.assert_close(loss, formula(logps, anchor, batch.lengths, batch), rtol=1e-12, atol=1e-12)


def test_kto_weighs_both_kinds_against_the_reference_point(random):
    batch = batch_of(random, 3)
    batch.labels, batch.mismatched = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double(), True
    logps, anchor = -random(3, 3).exp() - 1, -random(3, 3).exp() - 1
    module = KTO(PolicyConfig("none"), desirable_weight=1.3, undesirable_weight=0.6)
    module.z0 = torch.tensor(0.4, dtype=torch.float64)
    gains = 0.3 * ((logps - anchor)[:, :2] - 0.4)
    expected = torch.where(batch.labels == 1, 1.3 / (1 + gains.exp()), 0.6 / (1 + (-gains).exp())).mean(1)
    torch.testing.assert_close(module.loss(logps, anchor, 0.3, batch), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p, **k: SimPO(p, beta=2.0, gamma=0.5, **k), "simpo"),
        (lambda p, **k: CPO(p, beta=0.1, alpha=0.5, **k), "cpo"),
        (lambda p, **k: ORPO(p, beta=0.2, **k), "orpo"),
    ],
    ids=["SimPO", "CPO", "ORPO"],
)
def test_without_a_reference_none_is_loaded(tiny_model, in_tmp, make, expected):
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


@pytest.mark.parametrize("make", [DPO, IPO])
def test_with_length_normalize_logged_margins_are_per_token(make):
    logged = []
    for length_normalize in (False, True):
        module = make(PolicyConfig("none"), length_normalize=length_normalize)
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
def test_data_without_rewards_is_refused_with_the_fix(tiny_model, in_tmp, make, message):
    with pytest.raises(UserError, match=message):
        fit(make(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DPO(p, reward_temperature=0.1, label_smoothing=0.1), "label_smoothing and robust have no effect"),
        (lambda p: DPO(p, robust=True), "model.robust=true has no effect because label_smoothing=0"),
        (lambda p: DPO(p, label_smoothing=0.5), r"model.label_smoothing=0.5 must be in \[0, ½\)"),
        (lambda p: DPO(p, reward_temperature=0.0), "model.reward_temperature=0.0 must be above 0"),
        (lambda p: EXO(p, reward_temperature=0.1, label_smoothing=0.1), "label_smoothing=0.1 has no effect"),
        (lambda p: EXO(p, label_smoothing=0.0), r"model.label_smoothing=0.0 must be in \(0, ½\)"),
        (lambda p: EXO(p, reward_temperature=-1.0), "model.reward_temperature=-1.0 must be above 0"),
        (lambda p: SPPO(p, hard_labels=True, estimate_baseline=True), "Leave hard_labels out"),
        (lambda p: CPO(p, alpha=0.0, length_normalize=True), "length_normalize=true has no effect because alpha=0"),
        (lambda p: KTO(p, undesirable_weight=-1.0), "model.undesirable_weight=-1.0 must be above 0"),
    ],
)
def test_options_without_effect_are_refused_before_loading(make, message):
    with pytest.raises(UserError, match=message):
        make(PolicyConfig("none"))


def test_groups_from_files_have_one_size_and_others_are_counted(tiny_model, in_tmp):
    rows = [{"prompt": f"p{i}", "responses": [f"a{i}", "b", "c"], "rewards": [1.0, i, 0.5]} for i in range(2, 6)]
    rows.append({"prompt": "p", "responses": ["a", "b", "c", "d"], "rewards": [1, 2, 3, 4]})
    (in_tmp / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = OfflinePairs("ranked.jsonl", pairing=Listwise())
    first = First()
    fit(EXO(PolicyConfig(tiny_model), reward_temperature=0.5, optimizer=adamw()), data, first)
    assert first.batch.response_ids.shape[:2] == (4, 3)
    assert first.loss == pytest.approx(kl_of_uniform_to_softmax(first.batch.rewards, 0.5), rel=1e-4)
    assert "4 groups" in data.summary
    assert "1 group of other than 3 responses" in data.summary


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_the_tempered_policy_is_its_own_anchor_at_the_start(tiny_model, in_tmp, lora, capsys):
    module = EXO(PolicyConfig(tiny_model, temperature=0.8), lora=lora, optimizer=adamw())
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4), ReferenceRefresh(1.0, 1))
    assert "margins exactly 0 ✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "pairing", "message"),
    [
        (lambda p: DPO(p), Listwise(), "DPO, as configured, compares two responses"),
        (lambda p: SPPO(p, hard_labels=True), Listwise(), "SPPO, as configured, compares two responses"),
        (lambda p: SPPO(p, estimate_baseline=True), None, "data.pairing=BestWorst: SPPO's constant is estimated"),
    ],
)
def test_a_pairing_that_the_objective_cannot_use_is_refused_first(tiny_model, in_tmp, make, pairing, message):
    with pytest.raises(UserError, match=message):
        fit(make(PolicyConfig(tiny_model)), on_policy(in_tmp, pairing=pairing))
    assert not (in_tmp / "rounds").exists()
