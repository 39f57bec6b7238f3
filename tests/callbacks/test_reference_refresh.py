"""When the reference moves, by driving the callback's hooks; how, in tests/test_reference.py."""

import copy
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from tiny import adamw, fit, write_pairs

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import DPO, SimPO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference import CopiedReference


def refreshes(callback: ReferenceRefresh, steps: list[int], batches: int = 4) -> list[int]:
    """At which of the batches the callback mixes; `steps` is the optimizer's step after each batch."""
    mixed: list[int] = []
    for number, step in enumerate(steps):
        module = SimpleNamespace(log=lambda *a: None)
        callback.refresh = lambda module, n=number: mixed.append(n)  # type: ignore[method-assign]
        trainer = SimpleNamespace(
            global_step=step, is_last_batch=number % batches == batches - 1, current_epoch=number // batches
        )
        callback.on_train_batch_end(trainer, module, None, None, number)  # type: ignore[arg-type]
    return mixed


def test_it_comes_every_tau_optimizer_steps():
    assert refreshes(ReferenceRefresh(1.0, 3), [1, 2, 3, 4, 5, 6, 7]) == [2, 5]


def test_batches_of_an_accumulation_do_not_count():
    assert refreshes(ReferenceRefresh(0.5, 1), [0, 0, 1, 1, 1, 2, 2, 2]) == [2, 5]


def test_by_round_it_comes_at_the_last_batch_of_every_tau_th_epoch():
    assert refreshes(ReferenceRefresh(1.0, 1, "round"), list(range(1, 13))) == [3, 7, 11]
    assert refreshes(ReferenceRefresh(1.0, 2, "round"), list(range(1, 13))) == [7]


def test_its_state_goes_through_a_checkpoint():
    first = ReferenceRefresh(1.0, 2)
    refreshes(first, [1, 2])
    second = ReferenceRefresh(1.0, 2)
    second.load_state_dict(first.state_dict())
    assert refreshes(second, [2, 3, 4]) == [2]
    assert second.count == 2


def test_an_objective_without_a_reference_is_refused(tiny_model):
    with pytest.raises(UserError, match=r"reference_refresh: SimPO has no reference to refresh.*=null"):
        fit(SimPO(PolicyConfig(tiny_model)), None, ReferenceRefresh(1.0))


def test_a_reference_without_weight_is_refused(tiny_model):
    with pytest.raises(
        UserError, match=r"reference_refresh has no effect because model\.beta=0 .* Set beta above 0, or .*=null"
    ):
        fit(DPO(PolicyConfig(tiny_model), beta=0.0, proximal=0.1), None, ReferenceRefresh(1.0))


def pairs_of(folder: Path) -> OfflinePairs:
    return OfflinePairs(write_pairs(folder), batch_size=2)


def test_a_callback_starts_again_with_another_trainer(tiny_model, in_tmp):
    callback = ReferenceRefresh(1.0, tau=2)
    for _ in range(2):
        module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
        trainer = fit(module, pairs_of(in_tmp), callback, max_steps=2)
        assert (callback.count, trainer.global_step) == (1, 2)
        assert module.reference.fingerprint() == CopiedReference(module.policy).fingerprint()


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"lora": LoRAConfig(r=2)}, [], 1.0),
        ({"lora": LoRAConfig(r=2)}, [ReferenceRefresh(1.0)], 0.5),
        ({"dtype": "bfloat16"}, [], 0.01),
    ],
    ids=["no adapter kept", "too few adapters", "no accumulator"],
)
def test_a_built_reference_that_cannot_follow_is_refused(tiny_model, in_tmp, options, before, after):
    lora = options.pop("lora", None)
    module = DPO(PolicyConfig(tiny_model, **options), lora=lora)
    fit(module, pairs_of(in_tmp), *before, max_steps=1)
    with pytest.raises(UserError, match=r"built by an earlier Trainer.*cannot follow this rule .*Make a new module"):
        fit(module, pairs_of(in_tmp), ReferenceRefresh(after), max_steps=1)


def test_a_built_reference_that_can_follow_moves(tiny_model, in_tmp):
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    fit(module, pairs_of(in_tmp), max_steps=1)
    callback = ReferenceRefresh(0.5)
    fit(module, pairs_of(in_tmp), callback, max_steps=1)
    assert callback.count == 1


def test_a_later_trainer_without_it_does_not_state_its_rule(tiny_model, in_tmp):
    module, stated = DPO(PolicyConfig(tiny_model), optimizer=adamw()), []
    watch = LambdaCallback(on_fit_start=lambda trainer, module: stated.append(dict(module.describe())["refresh"]))
    for callbacks in ([ReferenceRefresh(0.5)], [], [ReferenceRefresh(1.0)]):
        fit(module, pairs_of(in_tmp), *callbacks, watch, max_steps=1)
    earlier = "← 0.5·policy + 0.5·reference, every step"
    left = f"none now: the reference stays where the rule of an earlier Trainer ({earlier}) left it"
    assert stated == [earlier, left, "← policy, every step"]


class Foreign(L.LightningModule):
    """A module of somebody else's, that learns to give 1 and keeps an average of itself."""

    def configure_model(self):
        torch.manual_seed(0)
        self.policy = torch.nn.Linear(3, 2)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.policy(torch.ones(4, 3)) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.policy.parameters(), lr=0.1)


def test_a_foreign_module_is_refreshed_by_name(in_tmp):
    module, policies = Foreign(), []
    keep = LambdaCallback(on_train_batch_end=lambda *a: policies.append(module.policy.weight.detach().clone()))
    first = Foreign()
    first.configure_model()
    expected = first.policy.weight.detach()
    fit(module, range(3), ReferenceRefresh(0.25), keep)
    for policy in policies:
        expected = 0.25 * policy + 0.75 * expected
    torch.testing.assert_close(module.reference.weight, expected)


def test_a_foreign_module_without_two_networks_is_refused(in_tmp):
    class Alone(Foreign):
        def configure_model(self):
            self.policy = torch.nn.Linear(3, 2)

    with pytest.raises(UserError, match="Alone needs two networks, `policy` and `reference`"):
        fit(Alone(), range(3), ReferenceRefresh(0.25))


def test_a_foreign_reference_that_would_round_small_steps_away_is_refused(in_tmp):
    class Half(Foreign):
        def configure_model(self):
            super().configure_model()
            self.reference.bfloat16()

    with pytest.raises(UserError, match=r"alpha=0\.01: a reference in torch\.bfloat16"):
        fit(Half(), range(3), ReferenceRefresh(0.01))


@pytest.fixture
def checkpoint(tiny_model, in_tmp):
    """Two steps of TR-DPO, on disk."""

    def make(*rule) -> tuple[DPO, str]:
        module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
        keep = ModelCheckpoint("ckpt", filename="last")
        callbacks = [ReferenceRefresh(*rule)] if rule else []
        fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=4), keep, *callbacks, enable_checkpointing=True)
        return module, "ckpt/last.ckpt"

    return make


def resume(tiny_model, path, *rule, **options) -> DPO:
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    callbacks = [ReferenceRefresh(*rule, **options)] if rule else []
    fit(module, OfflinePairs("pairs.jsonl", batch_size=4), *callbacks, ckpt_path=path, max_epochs=1)
    return module


def test_the_moved_reference_is_in_the_checkpoint(tiny_model, checkpoint):
    module, path = checkpoint(0.5, 1)
    again = resume(tiny_model, path, 0.5, 1)
    start = DPO(PolicyConfig(tiny_model))
    start.configure_model()
    for (name, saved), loaded, fresh in zip(
        module.reference.named_parameters(), again.reference.parameters(), start.reference.parameters(), strict=True
    ):
        assert torch.equal(saved, loaded), name
        assert not torch.equal(saved, fresh), name


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            (0.5, 1),
            (1.0, 1),
            r"reference ← 0.5·policy \+ 0.5·reference, every step; this run has: ← policy, every step",
        ),
        ((0.5, 1), (), r"this run has: no refresh"),
        ((), (0.5, 1), r"reference no refresh; this run has"),
    ],
)
def test_resuming_with_another_rule_stops_and_names_both(tiny_model, checkpoint, before, after, message):
    _, path = checkpoint(*before)
    with pytest.raises(UserError, match=message):
        resume(tiny_model, path, *after)


def test_another_rule_is_accepted_with_accept_change(tiny_model, checkpoint):
    _, path = checkpoint(0.5, 1)
    resume(tiny_model, path, 0.5, 2, accept_change=True)


def test_a_refresh_restores_the_gradients_scale(tiny_model, in_tmp):
    """DPO's is β/2 wherever policy and anchor are one: at every step with hard refreshes, at the first without."""
    seen: dict[bool, list[float]] = {}
    for refreshed in (True, False):
        values = seen.setdefault(refreshed, [])
        watch = LambdaCallback(
            on_train_batch_end=lambda t, *a, v=values: v.append(t.callback_metrics["train/gradient_scale"].item())
        )
        module = DPO(PolicyConfig(tiny_model), beta=0.2, optimizer=adamw(1e-2))
        refresh = [ReferenceRefresh(1.0)] if refreshed else []
        fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=2), watch, *refresh)
    assert seen[True] == pytest.approx([0.1] * 4, abs=1e-8)
    assert seen[False][0] == pytest.approx(0.1, abs=1e-8)
    assert seen[False][-1] < 0.09
