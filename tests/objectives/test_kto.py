import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in
from tiny import adamw, fit, on_policy, sgd, write_pairs
from torch.testing import assert_close

from lit_align.data import Listwise, OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import kto
from lit_align.objectives.anchor import effective_anchor
from lit_align.objectives.kto import KTO, kto_loss, kto_z0
from lit_align.policy import PolicyConfig

GOOD, BAD = torch.tensor([True]), torch.tensor([False])


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.33, 0.5)])
def test_value_and_slopes_where_the_policy_is_its_anchor(beta, desirable, undesirable):
    weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
    anchor = torch.tensor([-40.0], dtype=torch.float64)
    for label, weight, sign in ((GOOD, desirable, -1), (BAD, undesirable, +1)):
        logps = anchor.clone().requires_grad_()
        loss = kto_loss(logps, anchor, label, beta=beta, z0=0.0, **weights)
        loss.sum().backward()
        assert loss.item() == pytest.approx(weight / 2, rel=1e-14)
        assert logps.grad.item() == pytest.approx(sign * weight * beta / 4, rel=1e-14)


def test_both_kinds_worked_by_hand():
    # desirable: a = 3, 1 − σ(0.5(3 − 1)) = σ(−1);  undesirable: b = 2, 1 − σ(0.5(1 − 2)) = σ(0.5)
    logps, anchor = torch.tensor([-10.0, -8.0]).double(), torch.tensor([-13.0, -10.0]).double()
    loss = kto_loss(
        logps,
        anchor,
        torch.tensor([True, False]),
        beta=0.5,
        z0=torch.tensor(1.0).double(),
        desirable_weight=2,
        undesirable_weight=3,
    )
    expected = [2 * 0.2689414213699951, 3 * 0.6224593312018546]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_labels_may_be_bools_numbers_or_probabilities(random):
    logps, anchor, labels = random(6), random(6), torch.arange(6) % 2 == 0
    loss = kto_loss(logps, anchor, labels, beta=0.7, z0=0.1)
    assert torch.equal(kto_loss(logps, anchor, labels.long(), beta=0.7, z0=0.1), loss)
    p = torch.rand(6, dtype=torch.float64)
    mixed = p * kto_loss(logps, anchor, torch.ones(6), beta=0.7, z0=0.1)
    mixed = mixed + (1 - p) * kto_loss(logps, anchor, torch.zeros(6), beta=0.7, z0=0.1)
    assert_close(kto_loss(logps, anchor, p, beta=0.7, z0=0.1), mixed)


def test_each_loss_is_between_zero_and_its_weight_and_saturates():
    logps = torch.tensor([-900.0, -40.0, 900.0], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(logps, torch.zeros(3).double(), torch.ones(3), beta=1.0, z0=0.0, desirable_weight=1.5)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([1.5, 1.5, 0.0]).double())
    assert logps.grad.abs().max() < 1e-15


def test_z0_is_the_mean_log_ratio_and_never_negative(random):
    ratios = random(8)
    above = ratios * ratios.mean().sign()
    assert_close(kto_z0(above), ratios.mean().abs())
    assert kto_z0(-above).item() == 0.0


def test_z0_is_averaged_before_it_is_clamped():
    # log-ratios −1 and 3: their mean is 1; clamped first it would be 1.5
    assert kto_z0(torch.tensor([-1.0, 3.0])).item() == 1.0


def test_no_gradient_flows_through_z0(random):
    logps, anchor = random(4).requires_grad_(), random(4)
    mismatched = (anchor + 1).requires_grad_()
    z0 = kto_z0(mismatched - anchor)
    assert z0.item() == pytest.approx(1)
    assert not z0.requires_grad
    kto_loss(logps, anchor, torch.ones(4), beta=0.1, z0=z0).sum().backward()
    assert logps.grad is not None
    assert mismatched.grad is None


def test_the_mean_log_ratio_over_ranks_may_be_passed_as_a_number(random):
    logps, anchor = random(4, 3), random(4, 3) - 5  # four ranks, three responses on each
    of_all = kto_z0((logps - anchor).flatten())
    assert_close(kto_z0((logps.mean() - anchor.mean())[None]), of_all)


def test_the_proximal_form_takes_the_effective_anchor_in_z0_too(random):
    policy, reference, sampler = random(4) + 1, random(4), random(4)
    anchor, beta = effective_anchor(reference, sampler, 0.1, 0.3)
    loss = kto_loss(policy, anchor, torch.ones(4), beta=beta, z0=kto_z0(policy - anchor))
    log_ratios = 0.25 * (policy - reference) + 0.75 * (policy - sampler)
    z0 = max(0.0, log_ratios.mean().item())
    assert z0 > 0
    assert_close(loss, 1 - torch.sigmoid(0.4 * (log_ratios - z0)))


@pytest.mark.parametrize("z0", [0.0, 0.3])
@pytest.mark.parametrize(
    "p", [[0.9, 0.8, 0.7, 0.8, 0.95], [0.9, 0.2, 0.7, 0.4, 0.95]], ids=["all liked", "two disliked"]
)
def test_at_beta_1_the_optimum_scales_the_anchor_by_the_preference(p, z0, bandit, solve):
    """Responses drawn from the anchor; y is desirable with probability p(y), so that it is liked by

        κ = λ_D p − λ_U (1 − p),   and the loss is, up to a constant, −Σ ref κ σ(log(π/ref) − z0) = −Σ ref κ π/(π + ρ)

    with ρ = ref e^z0. Where κ > 0 its slopes, ref κ ρ/(π + ρ)², are equal at the optimum: π = ref (C √κ − e^z0), C by
    Σπ = 1. What is not liked gets nothing.
    """
    p = torch.tensor(p, dtype=torch.float64)
    kappa = 1.3 * p - 0.9 * (1 - p)
    reference = bandit.reference

    def loss(logps):
        options = {"beta": 1.0, "z0": z0, "desirable_weight": 1.3, "undesirable_weight": 0.9}
        return (reference.exp() * kto_loss(logps, reference, p, **options)).sum()

    liked = kappa > 0
    ref = reference.exp() * liked
    root = kappa.clamp(min=0).sqrt()
    optimum = ref * ((1 + math.exp(z0) * ref.sum()) / (ref * root).sum() * root - math.exp(z0))
    assert (optimum[liked] > 0).all()
    assert_close(solve(loss, reference).exp(), optimum, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3, 2)}, r"`logps` has shape \[3, 2\], but needs \[N\]"),
        ({"anchor_logps": (1,)}, r"`anchor_logps` has shape \[1\], but needs \[3\]"),
        ({"labels": (3, 1)}, r"`labels` has shape \[3, 1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3,), "anchor_logps": (3,), "labels": (3,)} | change
    with pytest.raises(ValueError, match=message):
        kto_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1, z0=0.0)


def test_a_z0_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`mismatched_log_ratios` has shape \[0\], but needs \[M>=1\]"):
        kto_z0(torch.zeros(0))


# --- the module ---


class Watch(Callback):
    """Records the metrics and the batch of each step, and the log ratios of all branches before it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.batches: list[Any] = []
        self.ratios: list[torch.Tensor] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.ratios.append(pl_module.policy(batch) - pl_module.anchor(batch)[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def write_labelled(folder: Path) -> str:
    rows = [{"prompt": f"p{i}:", "completion": f" yes {i}" * (1 + i % 3), "label": i % 4 > 0} for i in range(8)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "labelled.jsonl")


def test_each_step_uses_the_z0_of_the_last_steps_mismatched_responses(tiny_model, in_tmp):
    watch = Watch()
    module = KTO(PolicyConfig(tiny_model), optimizer=adamw(3e-3), beta=0.5)
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4), watch, max_epochs=4)
    z0 = 0.0
    for ratios, logged in zip(watch.ratios, watch.logged, strict=True):
        a, b = ratios[:, 0], ratios[:, 1]
        loss = (torch.sigmoid(-0.5 * (a - z0)) + torch.sigmoid(0.5 * (b - z0))).mean() / 2
        assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        z0 = max(0.0, ratios[:, 2].mean().item())
        assert logged["train/z0"] == pytest.approx(z0, rel=1e-4, abs=1e-5)
    assert max(logged["train/z0"] for logged in watch.logged) > 0.1


def test_no_gradient_goes_through_a_mismatched_branch(tiny_model, in_tmp):
    module, data = KTO(PolicyConfig(tiny_model), optimizer=adamw()), OfflinePairs(write_pairs(in_tmp))
    fit(module, data)
    batch = next(iter(data.train_dataloader()))
    logps = module.policy(batch).detach().requires_grad_()
    module.loss(logps, logps.detach() + 0.3, 0.1, batch).sum().backward()
    assert logps.grad[:, :2].abs().min() > 0
    assert logps.grad[:, 2].abs().max() == 0
    assert not module._mismatched, "computing the loss is not a step"


def test_one_batch_of_eight_and_eight_of_one_accumulated_are_one_step(tiny_model, in_tmp):
    path, results = write_pairs(in_tmp), []
    for batch_size, accumulate in ((8, 1), (1, 8)):
        module, watch = KTO(PolicyConfig(tiny_model), optimizer=sgd(0.3), beta=0.5), Watch()
        data = OfflinePairs(path, batch_size=batch_size, seed=1)
        fit(module, data, watch, accumulate_grad_batches=accumulate, max_epochs=3)
        assert max(logged.get("train/z0", 0) for logged in watch.logged) > 0.01
        results.append(module.state_dict())
    for name, value in results[0].items():
        if "metrics" not in name:
            assert_close(value, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


class Interrupted(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise RuntimeError("between two micro-batches")


def test_a_step_that_was_interrupted_does_not_enter_z0(tiny_model, in_tmp, monkeypatch):
    sizes: list[int] = []
    monkeypatch.setattr(kto, "kto_z0", lambda ratios, weights: sizes.append(len(ratios)) or kto_z0(ratios, weights))
    module, data = KTO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp), batch_size=4)
    with pytest.raises(RuntimeError, match="between two micro-batches"):
        fit(module, data, Interrupted(), accumulate_grad_batches=2)
    fit(module, data, accumulate_grad_batches=2)
    assert sizes == [8]


def test_single_responses_are_weighed_by_their_label_and_logged_by_side(tiny_model, in_tmp):
    watch = Watch()
    module = KTO(PolicyConfig(tiny_model), optimizer=adamw(), desirable_weight=2.0, undesirable_weight=0.5)
    fit(module, OfflinePairs(write_labelled(in_tmp), batch_size=8), watch)
    (batch,), (logged,) = watch.batches, watch.logged
    assert batch.labels.shape == (8, 1)
    assert logged["train/loss"] == pytest.approx((6 * 2.0 + 2 * 0.5) / 8 / 2)
    lengths = batch.lengths[:, 0]
    assert logged["train/length_chosen"] == pytest.approx(lengths[batch.labels[:, 0] == 1].double().mean().item())
    assert logged["train/length_rejected"] == pytest.approx(lengths[batch.labels[:, 0] == 0].double().mean().item())


def test_a_round_records_the_mismatched_branch_and_resumes_to_the_bit(tiny_model, in_tmp):
    def run(folder: str, *callbacks: Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module = KTO(PolicyConfig(tiny_model), optimizer=adamw(3e-3), proximal=0.1)
        data = on_policy(in_tmp, store=f"{folder}/rounds")
        checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        fit(module, data, *callbacks, ckpt_path=ckpt_path, max_epochs=2, enable_checkpointing=checkpoints)
        return {name: value for name, value in module.state_dict().items() if "metrics" not in name}

    watch = Watch()
    keep = ModelCheckpoint("whole/checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = run("whole", keep, watch)
    first, ratios = watch.batches[0], watch.ratios[0]
    assert first.mismatched
    assert first.sampler_logps.shape == first.reference_logps.shape == (3, 3)
    assert ratios.abs().max() < 1e-4, "the policy that drew them"
    assert "z0" in whole
    for step in (1, 4, 5):
        shutil.copytree("whole/rounds", "again/rounds", dirs_exist_ok=True)
        again = run("again", ckpt_path=f"whole/checkpoints/step={step}.ckpt")
        assert all(torch.equal(whole[name], again[name]) for name in whole), step


def test_data_without_labels_or_with_groups_is_refused(tiny_model, in_tmp):
    class Plain(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            vars(batch).update(vars(replace(batch, labels=None)))

    class Flat(Callback):
        """One response and one mismatched branch, with a label each in one dimension."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            ids, mask = batch.response_ids[:, 1:], batch.response_mask[:, 1:]
            vars(batch).update(
                vars(replace(batch, response_ids=ids, response_mask=mask, labels=batch.labels[:, 0], rewards=None))
            )

    with pytest.raises(UserError, match="KTO needs labels"):
        fit(KTO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)), Plain())
    with pytest.raises(UserError, match=r"labels"):
        fit(KTO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)), Flat())
    with pytest.raises(UserError, match=r"data.pairing=Listwise: KTO, as configured, compares two responses"):
        fit(KTO(PolicyConfig(tiny_model)), on_policy(in_tmp, pairing=Listwise()))


def test_z0_is_one_number_on_all_processes_and_that_of_a_single_one(tiny_model, in_tmp):
    write_pairs(in_tmp)

    def z0_of_each_step(processes: int) -> list[float]:
        watch = Watch()
        module = KTO(PolicyConfig(tiny_model), optimizer=sgd(0.3), beta=0.5)
        data = OfflinePairs("pairs.jsonl", batch_size=8 // processes)
        options = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
        fit(module, data, watch, max_epochs=3, **options)
        return [logged["train/z0"] for logged in watch.logged]

    single = z0_of_each_step(1)
    both = run_in(2, lambda: z0_of_each_step(2))
    assert both[0] == both[1]
    assert both[0] == pytest.approx(single, rel=1e-4)
    assert single[-1] > 0.1
