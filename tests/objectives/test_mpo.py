import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, fit, on_policy, write_pairs
from torch.testing import assert_close

from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import CPO, DPO, KTO, ORPO, SFT
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.mpo import MPO, mpo_loss
from lit_align.policy import PolicyConfig


def slope(margin, **options):
    d = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    loss = mpo_loss(torch.stack([d, torch.zeros_like(d)], -1), **options)
    return torch.autograd.grad(loss.sum(), d)[0].item()


def test_the_loss_of_a_pair_worked_by_hand():
    logps = torch.tensor([[0.5, 0.125]], dtype=torch.float64).log()  # odds 4 : 1
    assert mpo_loss(logps).item() == pytest.approx(-0.8, rel=1e-14)
    assert mpo_loss(logps, log_form=True).item() == pytest.approx(-math.log(0.8), rel=1e-14)
    assert mpo_loss(logps, labels=torch.tensor([0.75])).item() == pytest.approx(-0.65, rel=1e-14)


def test_the_slope_on_an_even_pair_is_a_quarter_or_for_logs_a_half():
    assert slope(0.0) == pytest.approx(-1 / 4, rel=1e-15)
    assert slope(0.0, log_form=True) == pytest.approx(-1 / 2, rel=1e-15)


@pytest.mark.parametrize("margin", [-800.0, -30.0, -1.0, -1e-3, 1e-3, 1.0, 30.0, 800.0])
def test_the_slope_is_bounded_and_never_pushes_the_winner_down(margin):
    assert -1 / 4 <= slope(margin) <= 0
    if abs(margin) >= 800:
        assert slope(margin) == 0  # long won or badly lost: the pair is left alone


def test_the_log_form_keeps_pushing_at_a_pair_that_is_badly_lost():
    assert slope(-800.0, log_form=True) == -1


def two_armed_optimum(p, q, beta, solve):
    """Probability of the winner, where it wins with probability p and is written by the reference with q."""
    reference = torch.tensor([q, 1 - q], dtype=torch.float64)
    label = torch.tensor([p], dtype=torch.float64)

    def loss(logps):
        likelihood = (reference * sft_loss(logps, torch.ones(2))).sum()
        return mpo_loss(logps[None], labels=label).sum() + beta * likelihood

    return solve(loss, reference.log()).exp()[0].item()


@pytest.mark.parametrize("p", [0.55, 0.8, 1.0])
@pytest.mark.parametrize("q", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_with_its_sft_term_the_optimum_is_the_root_of_its_quadratic(p, q, beta, solve):
    c = 2 * p - 1
    root = ((c - beta) + math.sqrt((c - beta) ** 2 + 4 * c * beta * q)) / (2 * c)
    assert two_armed_optimum(p, q, beta, solve) == pytest.approx(root, abs=1e-7)


@pytest.mark.parametrize(("beta", "limit"), [(1e4, 0.3), (1e-4, 1.0)])
def test_the_two_armed_optimum_moves_with_its_weight(beta, limit, solve):
    assert two_armed_optimum(1.0, 0.3, beta, solve) == pytest.approx(limit, abs=1e-4)


def expected_preference_gradient(logits, sampler, preferences):
    """∇ of E over pairs from the sampler, and over the policy's own choice in each, of its preference P.

    By the score function, choice by choice: Σ π(choice) P(choice) ∇ log π(choice), where the policy chooses i
    over j with probability σ(log π_i − log π_j), so that ∇ log π(choice) = σ(log π_j − log π_i) (e_i − e_j).
    """
    gradient = torch.zeros_like(logits)
    V = len(logits)
    for i in range(V):
        for j in range(V):
            drawn = sampler[i] * sampler[j]
            for chosen, other in ((i, j), (j, i)):
                choice = torch.sigmoid(logits[chosen] - logits[other])
                score = torch.zeros_like(logits)
                score[chosen] += 1 - choice
                score[other] -= 1 - choice
                gradient += drawn * choice * preferences[chosen, other] * score
    return gradient


def preference_data_gradient(logits, sampler, preferences, **options):
    """∇ of −mpo_loss over labelled pairs: y_w≻y_l is in the data with probability 2 μ_w μ_l P(y_w≻y_l)."""
    logits = logits.clone().requires_grad_()
    V = len(logits)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    weights = 2 * sampler[pairs].prod(-1) * preferences.flatten()
    loss = (weights * mpo_loss(logits.log_softmax(0)[pairs], **options)).sum()
    return -torch.autograd.grad(loss, logits)[0]


def test_theorem_4_1_the_gradient_is_estimated_from_preferences(bandit, random):
    logits, sampler = random(5), bandit.sampler.exp()
    expected = expected_preference_gradient(logits, sampler, bandit.preferences)
    assert expected.abs().max() > 1e-3
    assert_close(preference_data_gradient(logits, sampler, bandit.preferences), expected)


def test_theorem_4_1_is_not_true_of_the_log_form(bandit, random):
    logits, sampler = random(5), bandit.sampler.exp()
    expected = expected_preference_gradient(logits, sampler, bandit.preferences)
    log_form = preference_data_gradient(logits, sampler, bandit.preferences, log_form=True)
    assert torch.cosine_similarity(expected, log_form, dim=0) < 0.9999


@pytest.mark.parametrize("log_form", [False, True])
def test_soft_labels_are_an_average_over_who_wins(log_form, random):
    logps, p = random(5, 2), torch.rand(5, dtype=torch.float64)
    there, back = mpo_loss(logps, log_form=log_form), mpo_loss(logps.flip(1), log_form=log_form)
    assert_close(mpo_loss(logps, labels=p, log_form=log_form), p * there + (1 - p) * back)


def test_an_even_label_teaches_the_sigma_form_nothing(random):
    logps = random(5, 2).requires_grad_()
    mpo_loss(logps, labels=torch.full((5,), 0.5)).sum().backward()
    assert logps.grad.abs().max() < 1e-16


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"logps": (3, 3)}, r"`logps` has shape \[3, 3\], but needs \[B, 2\]"),
        ({"logps": (3, 2), "labels": (2,)}, r"`labels` has shape \[2\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        mpo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()})


# --- the module, and the texts that hold it ---


@pytest.fixture
def texts(in_tmp: Path) -> dict[str, str]:
    """Streams of different lengths, none of them that of the pairs."""
    sft = [{"prompt": f"q{i}", "completion": f" answer {i}" * (1 + i % 2)} for i in range(5)]
    plain = [{"text": f"a text about {i}"} for i in range(3)]
    for name, rows in {"sft": sft, "plain": plain}.items():
        (in_tmp / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"sft": "sft.jsonl", "pretraining": "plain.jsonl"}


def test_no_reference_and_no_second_model_is_ever_loaded(tiny_model, in_tmp, texts, monkeypatch):
    loaded: list[Any] = []
    load = torch.nn.Module.__init__

    def fail(*args: Any) -> None:
        raise AssertionError("a reference")

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        loaded.append(type(self).__name__)
        load(self, *args, **kwargs)

    monkeypatch.setattr("lit_align.objectives.anchored.make_reference", fail)
    monkeypatch.setattr(torch.nn.Module, "__init__", count)
    module = MPO(PolicyConfig(tiny_model), optimizer=adamw(), gamma=0.1)
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4, **texts))
    assert loaded.count("LlamaForCausalLM") == 1
    assert "CopiedReference" not in loaded


def test_the_loss_is_the_preferences_plus_weighted_texts(tiny_model, in_tmp, texts):
    class Losses(Callback):
        steps: list[tuple[float, float]] = []  # noqa: RUF012

        @torch.no_grad()
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pairs, sft, plain = (pl_module.policy(batch[name]) for name in ("preferences", "sft", "pretraining"))
            lengths = {name: part.lengths for name, part in batch.items()}
            means = pairs / lengths["preferences"]
            self.expected = -torch.sigmoid(means[:, 0] - means[:, 1]).mean()
            self.expected = self.expected - 0.3 * (sft / lengths["sft"]).mean()
            self.expected = self.expected - 0.2 * (plain / lengths["pretraining"]).mean()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.steps.append((outputs["loss"].item(), self.expected.item()))

    losses = Losses()
    module = MPO(PolicyConfig(tiny_model), optimizer=adamw(), beta=0.3, gamma=0.2, length_normalize=True)
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=3, **texts), losses, max_epochs=2)
    assert len(losses.steps) == 6
    for value, expected in losses.steps:
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rounds", [False, True], ids=["offline", "on-policy"])
def test_streams_resume_within_an_epoch_at_their_positions(tiny_model, in_tmp, texts, rounds):
    pairs = write_pairs(in_tmp)

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        data = on_policy(in_tmp, **texts) if rounds else OfflinePairs(pairs, batch_size=2, **texts)
        module = MPO(PolicyConfig(tiny_model), optimizer=adamw(), gamma=0.1)
        options = {"enable_checkpointing": bool(callbacks), "max_epochs": 2, "ckpt_path": ckpt_path}
        fit(module, data, *callbacks, **options)
        return {name: value for name, value in module.state_dict().items() if "metrics" not in name}

    whole = run(ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    for step in (1, 2, 3, 5):
        again = run(ckpt_path=f"checkpoints/step={step}.ckpt")
        assert all(torch.equal(whole[name], again[name]) for name in whole), step


class Total(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"].item()


@pytest.mark.parametrize("objective", [DPO, KTO, CPO, ORPO])
def test_any_objective_takes_texts_beside_its_preferences(tiny_model, in_tmp, texts, objective):
    module, total = (
        objective(PolicyConfig(tiny_model), optimizer=adamw(), sft_weight=0.1, pretraining_weight=0.3),
        Total(),
    )
    logged = fit(module, OfflinePairs(write_pairs(in_tmp), **texts), total).callback_metrics
    assert logged["train/nll_sft"] > 1
    expected = logged["train/loss"] + 0.1 * logged["train/nll_sft"] + 0.3 * logged["train/nll_pretraining"]
    assert total.loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_text_with_a_likelihood_of_nan_is_named(tiny_model, in_tmp, texts, monkeypatch):
    def spoilt(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(logps)) == 1, torch.nan, sft_loss(logps, lengths))

    monkeypatch.setattr("lit_align.objectives.base.sft_loss", spoilt)
    with pytest.raises(UserError, match=r"the loss of step 0 is nan, from examples \[\d\] of data.sft"):
        fit(MPO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp), sft=texts["sft"]))


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (MPO, [], r"model.beta=0.1 has no effect: data.sft is not set. Set it, or use model.beta=0"),
        (MPO, ["sft", "pretraining"], r"data.pretraining has no effect: its weight is 0. Set model.gamma"),
        (DPO, ["sft"], r"data.sft has no effect: its weight is 0. Set model.sft_weight"),
        (lambda p: DPO(p, sft_weight=-1), [], r"model.sft_weight=-1 must be at least 0"),
        (lambda p: MPO(p, beta=-1), [], r"model.beta=-1 must be at least 0"),
    ],
)
def test_a_weight_without_texts_and_texts_without_a_weight_are_refused(tiny_model, in_tmp, texts, make, given, message):
    with pytest.raises(UserError, match=message):
        fit(make(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp), **{name: texts[name] for name in given}))


def test_a_split_of_no_texts_is_refused():
    with pytest.raises(UserError, match=r"data.sft_split=train has no effect without data.sft"):
        OfflinePairs("pairs.jsonl", sft_split="train")


@pytest.mark.parametrize(
    "make",
    [
        lambda policy: MPO(policy, gamma=0.3),
        lambda policy: SFT(policy, pretraining_weight=0.5),
        lambda policy: DPO(policy, sft_weight=0.2),
    ],
)
def test_a_module_with_its_text_weights_is_loaded_from_its_checkpoint(tiny_model, tmp_path, make):
    module = make(PolicyConfig(tiny_model))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert type(module).load_from_checkpoint(tmp_path / "run.ckpt").text_weights == module.text_weights
