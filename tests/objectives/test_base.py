"""The base class of objectives on a real model: the first step, the log, the schedule, the checkpoint."""

import dataclasses
import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import adamw, byte_tokenizer, fit, llama_config, on_policy, sgd, write_pairs
from torch.utils.data import DataLoader
from transformers import LlamaForSequenceClassification

from lit_align.callbacks import Drift, ReferenceRefresh
from lit_align.callbacks.run_report import memory_line
from lit_align.data import Listwise, OfflinePairs, Sampling
from lit_align.data.batches import Example, record_logps
from lit_align.errors import UserError
from lit_align.metrics import kl_from_sampler
from lit_align.objectives import DPO, IPO, SPPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig

LORA = LoRAConfig(r=4)


class Watch(Callback):
    """Keeps the logged values of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


@pytest.fixture
def pairs(in_tmp: Path) -> OfflinePairs:
    return OfflinePairs(write_pairs(in_tmp), batch_size=4)


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


def test_the_first_step_is_checked_with_recorded_anchors_within_rounding(tiny_model, in_tmp, capsys):
    fit(DPO(PolicyConfig(tiny_model), proximal=0.1), on_policy(in_tmp), max_steps=1)
    said = capsys.readouterr().out
    assert "step-0 check" in said
    assert "≤ 0.001 nats ✓ · recorded anchor" in said.replace("exactly 0", "≤ 0.001 nats")


def test_in_half_precision_the_bound_is_measured_and_said(tiny_model, in_tmp, capsys):
    fit(DPO(PolicyConfig(tiny_model), lora=LORA, proximal=0.1), on_policy(in_tmp), max_steps=1)
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
    assert exact or "live reference that sums otherwise" in said


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


def weights(module: Any) -> dict[str, torch.Tensor]:
    assert module.policy is not None
    return {name: weight.detach().clone() for name, weight in module.policy.trainable_weights()}


def run(
    tiny_model: str, pairs: OfflinePairs, *callbacks: Callback, trainer: dict[str, Any] | None = None, **options: Any
):
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw(), **options)
    watch = Watch()
    fit(module, pairs, *callbacks, watch, **({"max_epochs": 2} | (trainer or {})))
    return weights(module), watch


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


class Counting(DPO):
    """Counts the calls of `after_loss`."""

    calls = 0

    def after_loss(self, logps: Any, anchor_logps: Any, batch: Any) -> None:
        assert logps.requires_grad
        assert not anchor_logps.requires_grad
        assert logps.shape == anchor_logps.shape == batch.response_ids.shape[:2]
        self.calls += 1


def test_after_loss_is_called_once_per_training_step(tiny_model, in_tmp):
    path = write_pairs(in_tmp)
    module = Counting(PolicyConfig(tiny_model), sft_weight=0.1)
    data = OfflinePairs(path, batch_size=4, validation=path, sft=path)
    fit(module, data, max_epochs=2, accumulate_grad_batches=2)
    assert module.calls == 4  # batches: neither the step-0 check, nor gradient_scale, nor validation counts


class Adapt(Callback):
    """At each round's end, λ follows the KL over all responses of the round; keeps each λ and KL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[float, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rows = trainer.datamodule.round_store.samples.read(0)
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


@pytest.mark.parametrize(("epochs", "steps"), [(2, 100), (100, 6), (2, -1), (None, 6)])
def test_a_schedule_ends_where_the_run_ends_first(tiny_model, in_tmp, epochs, steps):
    """Eight pairs in batches of three: three steps an epoch."""
    module, watch = DPO(PolicyConfig(tiny_model), optimizer=adamw(1e-3), schedule="linear"), Watch()
    fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=3), watch, max_epochs=epochs, max_steps=steps)
    assert len(watch["train/learning_rate"]) == 6
    assert module.progress() == 1


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


def test_logged_metrics_match_their_definitions(tiny_model, pairs):
    module, watch = DPO(PolicyConfig(tiny_model), beta=0.2), Watch()
    fit(module, pairs, watch, ReferenceRefresh(1.0, 1000))
    batch, step = watch.batches[0], watch.steps[0]
    assert step["train/length_chosen"] == batch.lengths[:, 0].double().mean()
    assert step["train/length_rejected"] == batch.lengths[:, 1].double().mean()
    assert step["train/logp_chosen"] < 0
    assert step["train/log_ratio_chosen"] == 0
    later = watch.steps[1]
    margin = 0.2 * (later["train/log_ratio_chosen"] - later["train/log_ratio_rejected"])
    assert later["train/reward_margin"] == pytest.approx(margin, abs=1e-7)


def test_validation_logs_the_same_metrics_over_the_whole_set(tiny_model, in_tmp):
    path = write_pairs(in_tmp, 7)
    data = OfflinePairs(path, validation=path, batch_size=3)
    trainer = fit(DPO(PolicyConfig(tiny_model)), data, limit_train_batches=1)
    values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    assert {"val/loss", "val/reward_accuracy", "val/reward_margin", "val/logp_chosen"} <= values.keys()
    loader = data.val_dataloader()
    assert [len(batch.index) for batch in loader] == [3, 3, 1]
    with torch.no_grad():
        logps = torch.cat([trainer.lightning_module.policy(batch) for batch in loader])
    assert values["val/logp_chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_schedule_warms_up_and_follows_the_progress_of_the_run(tiny_model, in_tmp, schedule, expected):
    watch = Watch()
    module = DPO(PolicyConfig(tiny_model), optimizer=sgd(1.0), schedule=schedule, warmup_steps=2)
    fit(module, OfflinePairs(write_pairs(in_tmp, 6), batch_size=3), watch, max_epochs=3)
    assert watch["train/learning_rate"] == pytest.approx(expected)


def test_the_end_of_warm_up_survives_a_resume_of_a_longer_run(tiny_model, in_tmp):
    """Two of four steps of warm-up; resumed at the third, of six by now."""
    data, keep = (
        write_pairs(in_tmp, 6),
        ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    )

    def rates(*callbacks: Callback, **options: Any) -> list[float]:
        watch = Watch()
        module = DPO(PolicyConfig(tiny_model), optimizer=sgd(1.0), warmup_steps=2)
        fit(module, OfflinePairs(data, batch_size=3), watch, *callbacks, **options)
        return watch["train/learning_rate"]

    assert rates(keep, max_epochs=2, enable_checkpointing=True) == pytest.approx([0.5, 1, 1, 0.5])
    resumed = rates(max_epochs=3, ckpt_path="kept/step=3.ckpt")
    assert resumed == pytest.approx([0.5, 1 / 2, 1 / 4])  # the first was set at the end of the step before


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tiny_model, pairs):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch.labels = torch.tensor([1.0, float("nan"), 1.0, 1.0])
            self.row = batch.index[1].item()

    spoil = Spoil()
    with pytest.raises(UserError, match=r"the loss of step 0 is nan, from examples \[\d+\]") as caught:
        fit(DPO(PolicyConfig(tiny_model)), pairs, spoil)
    assert f"[{spoil.row}]" in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda p: DPO(p, beta=-0.1), lambda p: DPO(p, beta=0.0), lambda p: DPO(p, proximal=-1)]
)
def test_weights_that_hold_nothing_are_refused_at_once(tiny_model, make: Callable[[PolicyConfig], DPO]):
    with pytest.raises(UserError, match="must both be ≥ 0, and one of them > 0"):
        make(PolicyConfig(tiny_model))


def test_a_model_folder_that_does_not_exist_is_named(pairs):
    with pytest.raises(UserError, match=r"model.policy.path: there is no folder './no/such/model'"):
        fit(DPO(PolicyConfig("./no/such/model")), pairs)


def test_a_name_neither_here_nor_on_the_hub_is_an_error(pairs):
    with pytest.raises(UserError, match=r"no tokenizer for 'nope': this folder does not exist, and as a hub name"):
        fit(DPO(PolicyConfig("nope")), pairs)


def test_a_reward_model_is_not_a_policy(pairs, tmp_path):
    folder = str(tmp_path / "rewards")
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"is a classifier or reward model, which gives no responses"):
        fit(DPO(PolicyConfig(folder)), pairs)


def test_an_optimizer_that_cannot_be_is_named(tiny_model, pairs):
    with pytest.raises(UserError, match=r"model.optimizer: Invalid learning rate: -1"):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(-1.0)), pairs)


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


class Optimizer(Callback):
    """Keeps, before each step, the learning rate and how many steps Adam remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        remembered = max((float(state["step"]) for state in optimizer.state.values()), default=0.0)
        self.seen.append((trainer.current_epoch, remembered, optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_optimizer_and_schedule_restart_each_round_if_set(tiny_model, in_tmp, warmup_steps):
    data = OfflinePairs(write_pairs(in_tmp, 16), batch_size=4)
    options = {"optimizer": adamw(0.01), "warmup_steps": warmup_steps}
    restarted, continued = Optimizer(), Optimizer()
    fit(DPO(PolicyConfig(tiny_model), reset_optimizer_each_round=True, **options), data, restarted, max_epochs=3)
    fit(DPO(PolicyConfig(tiny_model), **options), data, continued, max_epochs=3)
    rounds = [[seen[1:] for seen in restarted.seen if seen[0] == number] for number in range(3)]
    rates = [0.005, 0.01, 0.01, 0.005] if warmup_steps else [0.01, 0.0075, 0.005, 0.0025]
    assert rounds[0] == rounds[1] == rounds[2] == [(step, pytest.approx(rate)) for step, rate in enumerate(rates)]
    assert [seen[1] for seen in continued.seen] == list(range(12))


def test_a_run_with_optimizer_resets_resumes_bit_for_bit(tiny_model, in_tmp):
    def run(*callbacks: Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        module = DPO(
            PolicyConfig(tiny_model),
            proximal=0.1,
            optimizer=adamw(),
            warmup_steps=1,
            reset_optimizer_each_round=True,
        )
        data, saves = on_policy(in_tmp), bool(callbacks)
        fit(module, data, *callbacks, max_epochs=3, ckpt_path=ckpt_path, enable_checkpointing=saves)
        return weights(module)

    keep = ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    ends = ModelCheckpoint("ends", save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}")
    whole = run(keep, ends)
    saved = sorted(Path("kept").glob("*.ckpt")) + sorted(Path("ends").glob("*.ckpt"))
    assert len(saved) >= 9
    for checkpoint in saved:
        again = run(ckpt_path=str(checkpoint))
        assert all(torch.equal(whole[name], again[name]) for name in whole), checkpoint


def test_an_objective_without_a_policy_annotation_is_refused(tiny_model):
    class Bare(DPO):
        def __init__(self, policy, **kwargs):  # the command line then passes what it parsed
            super().__init__(policy, **kwargs)

    with pytest.raises(UserError, match=r"Bare must pass a PolicyConfig to its base class, which got list. Write `def"):
        Bare(["path", tiny_model])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batch: vars(batch), r"must be a PreferenceBatch .*, and is of type dict. Make a PreferenceBatch"),
        (lambda batch: {"preferences": vars(batch)}, r"batch of 'preferences' must be a PreferenceBatch .* dict"),
        (
            lambda batch: dataclasses.replace(batch, response_ids=batch.response_ids[:, 0]),
            r"`response_ids` has shape \[4, \d+\], but needs \[B>=1, K>=1, R\]",
        ),
        (
            lambda batch: dataclasses.replace(batch, prompt_mask=batch.prompt_mask[:, 1:]),
            r"`prompt_mask` has shape .* needs \[4, \d+\]\. Change it in the data module",
        ),
        (
            lambda batch: dataclasses.replace(batch, response_mask=batch.response_mask.long()),
            "`response_mask` is of type torch.int64, but needs torch.bool",
        ),
        (
            lambda batch: dataclasses.replace(batch, rewards=torch.zeros(4)),
            r"`rewards` has shape .4., but needs .4, 2",
        ),
    ],
    ids=["dict", "named dict", "2-D responses", "prompt mask", "type of mask", "rewards"],
)
def test_a_batch_of_other_type_or_shape_is_named(tiny_model, pairs, spoil, message):
    fit(DPO(PolicyConfig(tiny_model)), pairs, max_steps=1)
    loader: Any = DataLoader([spoil(next(iter(pairs.train_dataloader())))], batch_size=None)
    with pytest.raises(UserError, match=message):
        fit(DPO(PolicyConfig(tiny_model)), loader)


def test_the_header_counts_the_weights_of_policy_and_reference_apart(tiny_model, pairs):
    def lines(*callbacks: Callback) -> dict[str, str]:
        module = DPO(PolicyConfig(tiny_model), lora=LORA)
        fit(module, pairs, *callbacks, max_steps=1)
        return dict(module.describe()) | {"memory": memory_line(module)}

    still, moving = lines(), lines(ReferenceRefresh(0.9, 1))
    assert still["policy"] == moving["policy"]
    assert "weights of its own" not in still["reference"]
    assert re.search(r" MB \(0\.\d M weights of its own\)", moving["reference"])
    assert still["memory"].partition(" = ")[2].partition(";")[0] in moving["memory"]
    assert "reference" in moving["memory"]
    assert "reference" not in still["memory"]
