"""Learning-rate schedules over a run's progress.

    factor = (step + 1)/warmup_steps               during warm-up
             1,  left  or  (1 − cos π·left)/2      after it: constant, linear, cosine
    left   = (1 − p)/(1 − p_w)                     p: progress, p_w: progress at the end of warm-up

So the learning rate falls from its full value at the end of warm-up to 0 at the end of the run.

The number of pairs differs between rounds, so progress is not a share of an estimated number of steps:

    p = max( optimizer steps/max_steps,  (epoch + share of the epoch's batches)/max_epochs )
"""

import math
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    schedule: Schedule, warmup_steps: int, step: int, progress: float, warmed_up_at: float = 0.0
) -> float:
    """The learning rate of an optimizer step, divided by the configured one.

    Args:
        schedule: Shape of the learning rate after warm-up.
        warmup_steps: Optimizer steps in which the learning rate rises to its value.
        step: Optimizer steps taken so far.
        progress: Share of the run that is done, in [0, 1].
        warmed_up_at: Share of the run that was done at the end of warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = min(1.0, (1 - progress) / (1 - warmed_up_at)) if warmed_up_at < 1 else 0.0
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


class Completed(NamedTuple):
    """The completed part of a run, without its total length: a resumed run may be longer.

    Args:
        steps: Optimizer steps.
        epochs: Epochs.
        share: Share of the current epoch's batches; None if their number is unknown.
    """

    steps: int
    epochs: int
    share: float | None

    @classmethod
    def of_run(cls, trainer: Trainer) -> "Completed":
        """The part of a run that is completed now."""
        loop = trainer.fit_loop
        known = math.isfinite(loop.max_batches)
        share = (loop.epoch_loop.batch_idx + 1) / loop.max_batches if known and loop.max_batches else 0.0
        return cls(trainer.global_step, trainer.current_epoch, share if known else None)

    def of(self, trainer: Trainer) -> float:
        """As a share of the run: by epochs and their batches, or by steps if `max_steps` comes first."""
        by_steps = self.steps / trainer.max_steps if trainer.max_steps > 0 else 0.0
        if not trainer.max_epochs or trainer.max_epochs < 0 or self.share is None:
            return min(1.0, by_steps)
        return min(1.0, max(by_steps, (self.epochs + self.share) / trainer.max_epochs))

    def of_round(self, trainer: Trainer) -> float:
        """As a share of the current round (epoch), or of the run if the number of batches is unknown."""
        return self.of(trainer) if self.share is None else min(1.0, self.share)


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
