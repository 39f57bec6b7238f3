"""Lightning's features that do not work with objectives: each is refused at the start, with the reason.

`check_features` is called when a run is set up, and by the command line as soon as the trainer is built. All other
callbacks and options of Lightning work (`tests/test_lightning_features.py`).
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lit_align.errors import UserError

REFUSED_CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies the module before its policy is loaded, and so averages nothing. Use "
    "EMAWeightAveraging.",
    LearningRateFinder: "sets an attribute `lr`, but the learning rate is an option of the optimizer. Sweep over "
    "model.optimizer.lr.",
    BatchSizeFinder: "tries batches of growing size, but data.batch_size is part of what a run is. Set it; the command "
    "`doctor` estimates the memory.",
    BaseFinetuning: "freezes layers before the policy is loaded. Train fewer weights with model.lora.",
    ModelPruning: "prunes layers before the policy is loaded. Prune the saved model after the run.",
    SpikeDetection: "cannot be resumed, since Lightning fails to load its state. Clip gradients with "
    "trainer.gradient_clip_val; a loss that is not finite stops the run in any case.",
    BasePredictionWriter: "gets no predictions: responses are written by --predictions.prompts=FILE. Use that.",
}
"""Callbacks, with the reason and what to do instead. Their subclasses are refused, too."""

REFUSED_STRATEGIES: dict[type, str] = {
    FSDPStrategy: "wraps the whole module, which keeps the reference from moving in shards. Use --config "
    "configs/overlays/fsdp.yaml.",
    DeepSpeedStrategy: "shards optimizers of its own, which the moving reference cannot follow. Use --config "
    "configs/overlays/fsdp.yaml.",
}

REFUSED_PRECISION: dict[str, str] = {
    "16-true": "rounds AdamW's eps of 1e-8 to 0, so that weights become NaN. Use 16-mixed or bf16-mixed.",
    "bf16-true": "rounds rotary frequencies, recorded log-probabilities and the reference's float32 sums, too. Use "
    "model.policy.dtype=bfloat16, or bf16-mixed.",
    "transformer-engine": "computes the policy differently from its reference and sampler. Use bf16-mixed.",
    "transformer-engine-float16": "computes the policy differently from its reference and sampler. Use 16-mixed.",
}

REFUSED_PLUGINS: dict[type, str] = {
    BitsandbytesPrecision: "replaces layers by quantized ones, which are neither trained nor saved in transformers' "
    "format. Use model.lora and bf16-mixed.",
    TransformerEnginePrecision: REFUSED_PRECISION["transformer-engine"],
    AsyncCheckpointIO: "ends a checkpoint's file while the run continues, so that a kill leaves it incomplete. Leave "
    "it out.",
}


class Limit(NamedTuple):
    """A requirement on an option of the trainer."""

    option: str
    fits: Callable[[Any], bool]
    must: str
    fix: str = "Raise it"


LIMITS = [
    Limit("accumulate_grad_batches", lambda n: n >= 1, "at least 1"),
    Limit("gradient_clip_val", lambda value: value is None or value >= 0, "at least 0, or null"),
    Limit(
        "val_check_interval",
        lambda every: every is None or every > 0,
        "above 0",
        "To leave validation out, use limit_val_batches=0",
    ),
    Limit("check_val_every_n_epoch", lambda every: every is None or every >= 1, "at least 1, or null"),
    Limit("limit_train_batches", lambda limit: limit > 0, "above 0: nothing is trained otherwise"),
    Limit(
        "overfit_batches", lambda limit: limit == 0, "0: batches are chosen again in each epoch", "Give a small file"
    ),
    Limit("log_every_n_steps", lambda every: every >= 0, "at least 0"),
    Limit("num_sanity_val_steps", lambda steps: steps >= 0, "at least 0, or -1 for all batches"),
    Limit("min_epochs", lambda epochs: epochs is None or epochs >= 0, "at least 0"),
    Limit("min_steps", lambda steps: steps is None or steps >= 0, "at least 0"),
]


ERRORS = {
    r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\)": (
        "trainer.val_check_interval={} must be at most {}, the number of batches of an epoch. Lower it, or count the "
        "batches of all epochs with trainer.check_val_every_n_epoch=null."
    ),
    r"Early stopping conditioned on metric `([^`]*)` which is not available": (
        "EarlyStopping: monitor={} is never logged. Name a metric train/* or val/*."
    ),
    r"Found more than one stateful callback of type `([^`]*)`": (
        "trainer.callbacks: there are two {} with the same options, so that a checkpoint cannot tell their states "
        "apart. Change the monitor or the cadence of one, or leave one out (checkpoint=null)."
    ),
    r"Timed out after (\d+) seconds waiting for clients. (\d+)/(\d+) clients joined": (
        "only {1} of {2} processes have started within {0} seconds. Look at the output of the others, then start again."
    ),
    r"The client socket has timed out after (\d+)ms while trying to connect to \(([^)]*)\)": (
        "process 0 at {1} has not started within {0} ms. Look at its output, then start again."
    ),
}
"""Errors that Lightning raises, with our message."""


def check_features(trainer: Trainer) -> None:
    """Check that a trainer uses no feature that objectives do not work with.

    Raises:
        UserError: names the feature, the reason and what to do.
    """
    for limit in LIMITS:
        value = getattr(trainer, limit.option, None)  # a val_check_interval that is a time is kept elsewhere
        if not limit.fits(value):
            raise UserError(f"trainer.{limit.option}={value} must be {limit.must}. {limit.fix}.")
    if reason := REFUSED_PRECISION.get(str(trainer.precision)):
        raise UserError(f"trainer.precision={trainer.precision} {reason}")
    for used in (trainer.strategy, trainer.precision_plugin, trainer.strategy.checkpoint_io):
        _refuse(used, REFUSED_STRATEGIES | REFUSED_PLUGINS)
    if getattr(trainer.strategy, "_start_method", None) == "spawn":
        raise UserError("trainer.strategy=ddp_spawn cannot send the module to its processes. Use ddp.")
    if type(trainer.strategy) is ModelParallelStrategy:
        raise UserError("ModelParallelStrategy shards nothing by itself. Use --config configs/overlays/fsdp.yaml.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _refuse(callback, REFUSED_CALLBACKS)
        if is_out_of_time(callback):
            raise UserError("trainer.max_time (or a Timer's duration) must be above 0. Raise it.")
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(f"{type(callback).__name__} averages no shards. Train on one device or with ddp.")
    reloads: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # as rounds do
    if reloads and _counts_batches_of_an_epoch(trainer):
        raise UserError(
            f"trainer.val_check_interval={trainer.val_check_interval} must be a share of a round, since rounds differ "
            "in their number of batches. Give a share (0.5), or count the batches of all rounds with "
            "trainer.check_val_every_n_epoch=null."
        )


def is_out_of_time(callback: Callback) -> bool:
    """Whether a callback is a timer whose time is over."""
    remaining = callback.time_remaining() if isinstance(callback, Timer) else None
    return remaining is not None and remaining <= 0


def accumulation_schedules(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """The callbacks that choose `accumulate_grad_batches` for each epoch; at most one acts."""
    return [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]


def explained(error: Exception) -> UserError | None:
    """An error of Lightning as a message for the user; None for another one."""
    for pattern, message in ERRORS.items():
        if found := re.search(pattern, str(error)):
            return UserError(message.format(*found.groups()))
    return None


def _refuse(used: object, refused: dict[type, str] | dict[type[Callback], str]) -> None:
    for cls, reason in refused.items():
        if isinstance(used, cls):
            raise UserError(f"{type(used).__name__} {reason}")


def _counts_batches_of_an_epoch(trainer: Trainer) -> bool:
    """Whether validation is due after a number of an epoch's batches, which the epoch may lack."""
    interval = trainer.val_check_interval
    return isinstance(interval, int) and interval > 1 and trainer.check_val_every_n_epoch is not None
