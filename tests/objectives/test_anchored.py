"""Objectives with an anchor on a real model: the reference and its refresh, the proximal weight and its target."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Watch, adamw, fit, on_policy, round_store, same, sgd, weights, write_pairs

from lit_align.callbacks import Drift, ReferenceRefresh
from lit_align.data import Listwise, OfflinePairs, Sampling
from lit_align.data.batches import Example, record_logps
from lit_align.errors import UserError
from lit_align.metrics import kl_from_sampler
from lit_align.objectives import DPO, SPPO, AnchoredObjective
from lit_align.policy import LoRAConfig, PolicyConfig

LORA = LoRAConfig(r=4)


def run(
    tiny_model: str, pairs: OfflinePairs, *callbacks: Callback, trainer: dict[str, Any] | None = None, **options: Any
):
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw(), **options)
    watch = Watch()
    fit(module, pairs, *callbacks, watch, **({"max_epochs": 2} | (trainer or {})))
    return weights(module), watch


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_a_refresh_that_never_comes_leaves_the_base_method_bit_for_bit(tiny_model, pairs, lora):
    base, _ = run(tiny_model, pairs, lora=lora)
    assert same(base, run(tiny_model, pairs, ReferenceRefresh(1.0, 1000), lora=lora)[0])
    assert not same(base, run(tiny_model, pairs, ReferenceRefresh(1.0, 1), lora=lora)[0])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_a_reference_replaced_each_step_keeps_the_loss_at_ln_2(tiny_model, pairs, lora):
    start = DPO(PolicyConfig(tiny_model), lora=lora)
    start.configure_model()
    moved, watch = run(tiny_model, pairs, ReferenceRefresh(1.0, 1), lora=lora)
    assert watch["train/loss"] == [pytest.approx(math.log(2), rel=1e-6)] * 4
    assert watch["train/reward_margin"] == [0.0] * 4
    assert not same(moved, weights(start))
    assert watch["reference/refreshes"] == [1, 2, 3, 4]


def test_after_a_sync_the_gradient_is_half_beta_times_the_margins(tiny_model, pairs):
    """dL/dh = −β/2 at h = 0, and −βσ(−βh) before, by autograd through the real path."""
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw(1e-2), beta=0.3)
    fit(module, pairs, ReferenceRefresh(1.0, 1000))
    assert module.policy is not None
    assert module.reference is not None
    batch = next(iter(pairs.train_dataloader()))

    def gradient() -> torch.Tensor:
        logps = module.policy(batch).detach().requires_grad_()
        anchor, beta = module.anchor(batch)
        module.loss(logps, anchor, beta, batch).sum().backward()
        return logps.grad[:, 0]

    assert not torch.allclose(gradient(), torch.tensor(-0.15), atol=1e-4)
    module.reference.mix(module.policy, 1.0)
    assert torch.allclose(gradient(), torch.tensor(-0.15), atol=1e-7)


def test_the_reference_moves_by_optimizer_steps_not_by_batches(tiny_model, in_tmp):
    """One batch of 8 and eight of 1, accumulated, are one step, one refresh, and equal weights within rounding."""
    path = write_pairs(in_tmp, 8)
    results = []
    for batch_size, accumulate in ((8, 1), (1, 8)):
        module = DPO(PolicyConfig(tiny_model), optimizer=sgd())
        watch = Watch()
        data = OfflinePairs(path, batch_size=batch_size, seed=1)
        fit(module, data, ReferenceRefresh(0.5, 1), watch, accumulate_grad_batches=accumulate, max_epochs=2)
        assert watch["reference/refreshes"][-1] == 2
        results.append({**weights(module), **dict(module.reference.model.named_parameters())})
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_reference_stays_in_eval_mode_and_out_of_the_optimizer(tiny_model, pairs):
    module = DPO(PolicyConfig(tiny_model))
    trainer = fit(module, pairs)
    module.train()
    assert module.policy is not None
    assert module.policy.training
    assert not any(m.training for m in module.reference.modules())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for _, p in module.policy.trainable_weights()}
    assert not optimized & {id(p) for p in module.reference.parameters()}


def test_lambda_zero_is_the_base_objective_bit_for_bit_also_on_policy(tiny_model, in_tmp):
    module, other = DPO(PolicyConfig(tiny_model), proximal=0.0), DPO(PolicyConfig(tiny_model))
    fit(module, on_policy(in_tmp))
    fit(other, on_policy(in_tmp))
    assert same(weights(module), weights(other))


@pytest.mark.parametrize(
    ("module", "pairing"),
    [(lambda p: DPO(p, proximal=0.1), None), (lambda p: SPPO(p, estimate_baseline=True), Listwise())],
    ids=["proximal", "estimated baseline"],
)
def test_offline_data_without_sampler_logps_are_refused_at_setup(in_tmp, tiny_model, module, pairing):
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "rewards": [1.0, 2.0, 0.5]} for i in range(4)]
    (in_tmp / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = module(PolicyConfig(tiny_model))
    with pytest.raises(UserError, match=r"reads log π_s .*model\.proximal.* OfflinePairs .*Use OnPolicyPairs"):
        fit(objective, OfflinePairs("ranked.jsonl", pairing=pairing))
    assert objective.policy is None, "before a model is loaded"


class Adapt(Callback):
    """At each round's end, λ follows the KL over all responses of the round; keeps each λ and KL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[float, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rows = round_store(trainer.datamodule).samples.read(0) or []
        examples = [Example(row.prompt_ids, row.response_ids, row.source) for row in rows]
        logps = torch.tensor(record_logps(pl_module.policy, pl_module.policy, examples, 8))
        assert logps.shape == (8, 4), "all K responses, not the pairs"
        distance = kl_from_sampler(logps, torch.tensor([row.sampler_logps for row in rows])).item()
        before = pl_module.proximal
        pl_module.adapt_proximal(distance)
        self.seen.append((before, distance))


def adaptive(tiny_model: str, target: float) -> DPO:
    return DPO(PolicyConfig(tiny_model), proximal=0.1, proximal_target=target, optimizer=adamw(3e-3))


@pytest.mark.parametrize("target", [1e-4, 1e9], ids=["beyond its target", "short of it"])
def test_lambda_follows_its_target_round_by_round_and_is_logged(tiny_model, in_tmp, target):
    module, adapt, watch = adaptive(tiny_model, target), Adapt(in_tmp), Watch()
    fit(module, on_policy(in_tmp, sampling_batch_size=32), adapt, watch, max_epochs=3)
    factor = 1.5 if target < 1 else 0.5
    assert [before for before, _ in adapt.seen] == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2], rel=1e-3)
    assert all(distance > 1e-4 for _, distance in adapt.seen)
    assert module.proximal == pytest.approx(0.1 * factor**3, rel=1e-3)
    assert list(dict.fromkeys(watch["train/proximal"])) == pytest.approx([before for before, _ in adapt.seen])


def test_a_lambda_that_moves_resumes_to_the_bit(tiny_model, in_tmp):
    def run(*callbacks: Callback, ckpt_path: str | None = None) -> tuple[float, dict[str, torch.Tensor]]:
        module = adaptive(tiny_model, 0.05)
        options = {"enable_checkpointing": bool(callbacks), "max_epochs": 3, "ckpt_path": ckpt_path}
        fit(module, on_policy(in_tmp, sampling_batch_size=32), Adapt(in_tmp), *callbacks, **options)
        return module.proximal, weights(module)

    keep = ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    last, whole = run(keep, ModelCheckpoint("ends", save_on_train_epoch_end=True, save_top_k=-1, filename="{epoch}"))
    assert last != 0.1
    for path in ("checkpoints/step=2.ckpt", "ends/epoch=0.ckpt", "ends/epoch=1.ckpt", "checkpoints/step=4.ckpt"):
        again, others = run(ckpt_path=path)
        assert again == last, path
        assert same(whole, others), path
    assert DPO.load_from_checkpoint("ends/epoch=1.ckpt").proximal not in (0.1, last)


def test_a_target_without_effect_is_refused(tiny_model, in_tmp):
    for options in ({"proximal": 0.0}, {"proximal": 0.1, "proximal_target": 0.0}):
        with pytest.raises(UserError, match="must be above 0, and so must proximal"):
            DPO(PolicyConfig(tiny_model), **({"proximal_target": 1.0} | options))
    with pytest.raises(
        UserError, match=r"proximal_target=1.0 had no effect in this round because no callback measures"
    ):
        fit(adaptive(tiny_model, 1.0), on_policy(in_tmp))
    with pytest.raises(UserError, match=r"model.proximal_target=3 must be at most log 16 = 2.8 nats"):
        fit(adaptive(tiny_model, 3.0), on_policy(in_tmp), Drift(prompts=4))


@pytest.mark.parametrize("options", [{"every_n_steps": 2}, {"sampling": Sampling()}])
def test_options_of_the_drift_of_offline_pairs_are_refused_for_rounds(tiny_model, in_tmp, options):
    with pytest.raises(UserError, match=rf"drift\.{next(iter(options))}=.* has no effect with OnPolicyPairs"):
        fit(adaptive(tiny_model, 0.1), on_policy(in_tmp), Drift(**options))


def test_recorded_and_live_reference_give_the_same_loss(tiny_model, in_tmp, monkeypatch):
    watches = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(DPO, "recordable_reference", None)
        watch = Watch()
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), on_policy(in_tmp), watch, max_epochs=2)
        watches.append(watch)
    assert watches[0]["train/loss"] == pytest.approx(watches[1]["train/loss"], abs=1e-5)
    assert len(set(watches[0]["train/loss"])) > 2


class Forgetful(AnchoredObjective):
    """Returns the batch's mean, and does not state its loss at the anchor."""

    def loss(self, logps, anchor_logps, beta, batch):
        losses = (logps - anchor_logps)[:, 0]
        return losses.mean() if batch.size == 4 else losses


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (4, r"loss must return one value per example, \[4\], but returns shape \[\]. Leave out its mean or sum"),
        (2, r"Forgetful must define loss_at_anchor\(beta, batch\): the mean loss where the policy equals its anchor"),
    ],
)
def test_what_an_objective_forgets_is_named(tiny_model, in_tmp, batch_size, message):
    pairs = OfflinePairs(write_pairs(in_tmp), batch_size=batch_size)
    with pytest.raises(UserError, match=message):
        fit(Forgetful(PolicyConfig(tiny_model), optimizer=adamw()), pairs, max_epochs=1)
