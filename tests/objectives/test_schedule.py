"""The learning rate over a run: warm-up, the schedule, a restart each round, a resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Steps, Watch, adamw, fit, on_policy, sgd, weights, write_pairs

from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.objectives.schedule import Completed, LearningRate, planned_steps, warm_up_problem
from lit_align.policy import PolicyConfig


@pytest.mark.parametrize(("epochs", "steps"), [(2, 100), (100, 6), (2, -1), (None, 6)])
def test_a_schedule_ends_where_the_run_ends_first(tiny_model, in_tmp, epochs, steps):
    """Eight pairs in batches of three: three steps an epoch."""
    module, watch = DPO(PolicyConfig(tiny_model), optimizer=adamw(1e-3), schedule="linear"), Watch()
    data = OfflinePairs(write_pairs(in_tmp), batch_size=3)
    trainer = fit(module, data, watch, max_epochs=epochs, max_steps=steps)
    assert len(watch["train/learning_rate"]) == 6
    assert Completed.of_run(trainer).of(trainer) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
    ],
)
@pytest.mark.parametrize(("warmup_steps", "accumulated"), [(2, 1), (1 / 3, 1), (1 / 3, 2)])
def test_the_schedule_warms_up_and_follows_the_progress_of_the_run(
    tiny_model, in_tmp, schedule, expected, warmup_steps, accumulated
):
    steps, pairs = Steps(), write_pairs(in_tmp, 6 * accumulated)
    module = DPO(PolicyConfig(tiny_model), optimizer=sgd(1.0), schedule=schedule, warmup_steps=warmup_steps)
    data = OfflinePairs(pairs, batch_size=3)
    fit(module, data, steps, max_epochs=3, accumulate_grad_batches=accumulated)
    assert [step["train/learning_rate"] for step in steps.logged] == pytest.approx(expected)


def test_warm_up_by_a_share_needs_a_run_with_an_end(tiny_model, in_tmp):
    module = DPO(PolicyConfig(tiny_model), warmup_steps=0.1)
    with pytest.raises(
        UserError, match=r"model.warmup_steps=0.1 has no effect: it is a share of the run, which has no"
    ):
        fit(module, OfflinePairs(write_pairs(in_tmp), batch_size=3), max_epochs=-1)


@pytest.mark.parametrize(
    ("warmup_steps", "each_round", "problem"),
    [
        (100, False, "100 steps, but the run has 8: the learning rate reaches 8% of its value"),
        (6, True, "6 steps, but the round has 4: the learning rate reaches 67% of its value"),
        (6, False, ""),
        (0.9, True, ""),
        (0, False, ""),
    ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_reported(warmup_steps, each_round, problem):
    assert warm_up_problem(LearningRate("linear", warmup_steps, each_round), 8, 4).startswith(problem)
    assert bool(warm_up_problem(LearningRate("linear", warmup_steps, each_round), 8, 4)) == bool(problem)


@pytest.mark.parametrize(
    ("batches", "epochs", "most", "steps"),
    [(7, 3, -1, 12), (7, 3, 5, 5), (7, -1, -1, 0), (7, None, 9, 9), (math.inf, 3, -1, 0), (math.inf, 3, 5, 5)],
)
def test_a_runs_steps_are_counted_with_the_last_of_each_epoch(batches, epochs, most, steps):
    assert planned_steps(batches, 2, epochs, most) == steps


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
    assert resumed == pytest.approx([3 / 4, 2 / 4, 1 / 4])


def test_a_second_fit_warms_up_by_itself(tiny_model, in_tmp):
    module, watch = DPO(PolicyConfig(tiny_model), optimizer=sgd(1.0), warmup_steps=2), Watch()
    data = write_pairs(in_tmp, 12)
    fit(module, OfflinePairs(data, batch_size=3))
    fit(module, OfflinePairs(data, batch_size=2), watch)
    assert watch["train/learning_rate"] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


class Optimizer(Callback):
    """Keeps, before each step, the learning rate and how many steps Adam remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        remembered = max((float(state["step"]) for state in optimizer.state.values()), default=0.0)
        self.seen.append((trainer.current_epoch, remembered, optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("warmup_steps", [0, 2, 0.5])
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


def test_an_optimizer_that_restarts_keeps_the_options_of_each_group(tiny_model, in_tmp):
    def two_groups(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        matrices, vectors = (
            [each for each in parameters if (each.ndim > 1) == is_matrix] for is_matrix in (True, False)
        )
        return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 1e-4}], lr=1e-3)

    module = DPO(PolicyConfig(tiny_model), optimizer=two_groups, reset_optimizer_each_round=True, schedule="constant")
    trainer = fit(module, OfflinePairs(write_pairs(in_tmp)), max_epochs=2)
    groups = trainer.optimizers[0].param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.01, 1e-3), (0.0, 1e-4)]


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
