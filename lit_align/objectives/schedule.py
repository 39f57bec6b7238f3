"""Learning-rate schedules over a run's progress.

    factor = (step + 1)/warmup_steps              during warm-up
             1,  1 − p  or  (1 − cos π(1 − p))/2  after it: constant, linear, cosine; p is the progress

The number of pairs differs between rounds, so progress is not a share of an estimated number of steps:

    p = max( optimizer steps/max_steps,  (epoch + share of the epoch's batches)/max_epochs )
"""

import math
from typing import Any, Literal

from lightning.pytorch import Trainer

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(schedule: Schedule, warmup_steps: int, step: int, progress: float) -> float:
    """The learning rate of an optimizer step, divided by the configured one.

    Args:
        schedule: Shape of the learning rate after warm-up.
        warmup_steps: Optimizer steps in which the learning rate rises to its value.
        step: Optimizer steps taken so far.
        progress: Share of the run that is done, in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = 1 - progress
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


def run_progress(trainer: Trainer) -> float:
    """Share of the run that is done: by epochs and their batches, or by steps if `max_steps` comes first."""
    loop = trainer.fit_loop
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    if not trainer.max_epochs or trainer.max_epochs < 0 or not math.isfinite(loop.max_batches):
        return min(1.0, by_steps)
    share = (loop.epoch_loop.batch_idx + 1) / loop.max_batches if loop.max_batches else 0.0
    return min(1.0, max(by_steps, (trainer.current_epoch + share) / trainer.max_epochs))


def round_progress(trainer: Trainer) -> float:
    """Share of the current round's (epoch's) batches that is done, or of the run if their number is unknown."""
    loop = trainer.fit_loop
    if not math.isfinite(loop.max_batches):
        return run_progress(trainer)
    return min(1.0, (loop.epoch_loop.batch_idx + 1) / max(1, loop.max_batches))


def reset_optimization(trainer: Trainer, first_factor: float) -> None:
    """Reset the optimizer state and the schedule.

    Args:
        first_factor: The first step's learning rate, divided by the configured one.
    """
    (optimizer,) = trainer.optimizers
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    optimizer.state.clear()
    scheduler.last_epoch = 0
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group.update(optimizer.defaults | {"lr": rate * first_factor})
