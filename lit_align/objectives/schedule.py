"""Learning-rate schedules over a run's progress.

    factor = warmed                                while warmed ≤ 1
             1,  left  or  (1 − cos π·left)/2      after it: constant, linear, cosine
    warmed = (step + 1)/warmup_steps               or, for a share of the run, progress after the step/share
    left   = (1 − p)/(1 − p_w)                     p: progress, p_w: progress at the end of warm-up

So the learning rate falls from its full value at the end of warm-up to 0 at the end of the run.

The number of pairs differs between rounds, so progress is not a share of an estimated number of steps:

    p = max( optimizer steps/max_steps,  (epoch + share of the epoch's batches)/max_epochs )
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from lit_align.errors import UserError, check_number

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(schedule: Schedule, warmed: float, progress: float, warmed_up_at: float = 0.0) -> float:
    """The learning rate of an optimizer step, divided by the configured one.

    Args:
        schedule: Shape of the learning rate after warm-up.
        warmed: Share of the warm-up that is done after the step; above 1 after warm-up.
        progress: Share of the run that is done before the step, in [0, 1].
        warmed_up_at: Share of the run that was done at the end of warm-up.
    """
    if warmed <= 1:
        return warmed
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

    def and_a_step(self, trainer: Trainer) -> "Completed":
        """The part that is completed after the next optimizer step."""
        batches = trainer.accumulate_grad_batches / (trainer.fit_loop.max_batches or 1)
        return Completed(self.steps + 1, self.epochs, None if self.share is None else min(1.0, self.share + batches))

    def of(self, trainer: Trainer) -> float:
        """As a share of the run: by epochs and their batches, or by steps if `max_steps` comes first."""
        by_steps = self.steps / trainer.max_steps if trainer.max_steps > 0 else 0.0
        if not trainer.max_epochs or trainer.max_epochs < 0 or self.share is None:
            return min(1.0, by_steps)
        return min(1.0, max(by_steps, (self.epochs + self.share) / trainer.max_epochs))

    def of_round(self, trainer: Trainer) -> float:
        """As a share of the current round (epoch), or of the run if the number of batches is unknown."""
        return self.of(trainer) if self.share is None else min(1.0, self.share)


class LearningRate:
    """The learning rate of a run's steps, divided by the configured one.

    Args:
        schedule: Its shape after warm-up.
        warmup_steps: Optimizer steps of warm-up; below 1, its share of the run.
        each_round: Whether warm-up and shape restart with each round (epoch).

    Raises:
        UserError: `warmup_steps` is not possible.
    """

    def __init__(self, schedule: Schedule, warmup_steps: float, each_round: bool):
        check_number("model.warmup_steps", warmup_steps, least=0)
        if warmup_steps > 1 and warmup_steps % 1:
            raise UserError(f"model.warmup_steps={warmup_steps} must be a whole number, or a share below 1. Round it.")
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.each_round = each_round
        self.warmed_up_at = Completed(0, 0, 0.0)

    def factor(self, trainer: Trainer, step: int) -> float:
        """The factor of an optimizer step.

        Args:
            step: Optimizer steps taken so far, in the round if each restarts.
        """
        done = Completed.of_run(trainer) if step else Completed(0, 0, 0.0)
        if 0 < self.warmup_steps < 1:
            warmed = self._share(done.and_a_step(trainer), trainer) / self.warmup_steps
            return learning_rate_factor(self.schedule, warmed, self._share(done, trainer), self.warmup_steps)
        if step == self.warmup_steps and done.steps != self.warmed_up_at.steps:  # not again when a run resumes there
            self.warmed_up_at = done
        warmed = (step + 1) / self.warmup_steps if self.warmup_steps else math.inf
        warmed_up_at = self._share(self.warmed_up_at, trainer)
        return learning_rate_factor(self.schedule, warmed, self._share(done, trainer), warmed_up_at)

    def _share(self, done: Completed, trainer: Trainer) -> float:
        """The completed part as a share of the run, or of the round if each round has its own schedule."""
        return done.of_round(trainer) if self.each_round else done.of(trainer)

    def start(self, trainer: Trainer) -> None:
        """Begin a run: set its first step's rate where it depends on the run's length, which is not known before.

        Raises:
            UserError: warm-up is a share of a run without an end.
        """
        if trainer.global_step:
            return
        self.warmed_up_at = Completed(0, 0, 0.0)  # the warm-up of an earlier fit is not this one's
        if not 0 < self.warmup_steps < 1:
            return
        if not self.factor(trainer, 0):
            raise UserError(
                f"model.warmup_steps={self.warmup_steps} has no effect: it is a share of the run, which has no end. "
                "Set trainer.max_steps, or a number of steps."
            )
        renew_learning_rates(trainer)


def renew_learning_rates(trainer: Trainer) -> None:
    """Compute the rate of the next step again: the schedule, its base rate or the length of the run have changed."""
    for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(scheduler, LambdaLR):
            groups = scheduler.optimizer.param_groups
            for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = rate * factor(scheduler.last_epoch)


def reset_optimization(trainer: Trainer, options: Sequence[Mapping[str, Any]]) -> None:
    """Reset the optimizer's state and options, and the schedule.

    Args:
        options: The options of each parameter group at the start.
    """
    (optimizer,) = trainer.optimizers
    optimizer.state.clear()
    for config in trainer.lr_scheduler_configs:  # none, if a subclass makes an optimizer alone
        scheduler: Any = config.scheduler
        scheduler.last_epoch = 0
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    renew_learning_rates(trainer)


def planned_steps(batches: float, accumulated: int, epochs: int | None, most: int) -> int:
    """The optimizer steps of a run whose epochs are all of this size; 0 if it has no end.

    Args:
        batches: Batches of an epoch; infinite if their number is unknown.
        accumulated: Batches of a step.
        epochs: Largest number of epochs; None or −1 for no limit.
        most: Largest number of steps; −1 for no limit.
    """
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        steps = 0
    else:
        steps = math.ceil(batches / accumulated) * epochs
    return min(steps or most, most) if most > 0 else steps


def warm_up_problem(learning_rate: LearningRate, steps: int, steps_of_round: int) -> str:
    """A warning if the run ends within its warm-up; else empty.

    Args:
        steps: Optimizer steps of the run; 0 if it has no end.
        steps_of_round: Optimizer steps of a round (epoch).
    """
    warmup_steps, last = learning_rate.warmup_steps, steps_of_round if learning_rate.each_round else steps
    if not 0 < last < warmup_steps:
        return ""
    return (
        f"{warmup_steps} steps, but the {'round' if learning_rate.each_round else 'run'} has {last}: the learning rate "
        f"reaches {last / warmup_steps:.0%} of its value. Lower model.warmup_steps, or set a share, such as 0.1."
    )
