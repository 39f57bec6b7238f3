"""Metrics that callbacks monitor: one that is never logged is found at the start, not at the end of an epoch."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_align.callbacks.base import AlignCallback, DryRun
from lit_align.callbacks.win_rate import WinRate
from lit_align.data.base import data_module_of
from lit_align.errors import UserError
from lit_align.evaluation.results import metric_names
from lit_align.objectives import PreferenceObjective

TO_LOGGERS = ("round/", "drift/", "verdict/")
"""Metrics that are written to loggers only, where no callback reads them."""


class MonitorCheck(AlignCallback):
    """Checks the metrics of `EarlyStopping` and `ModelCheckpoint`: names and validation at the start, `train/*` after
    the first step.
    """

    in_dry_run = DryRun.SKIP

    def __init__(self) -> None:
        self._unchecked: list[tuple[str, str]] = []  # callback, metric

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            return
        self._unchecked = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
                name, monitor = type(callback).__name__, callback.monitor
                if isinstance(callback, ModelCheckpoint) and monitor in ("step", "epoch"):
                    continue  # it knows both itself
                if monitor.startswith(TO_LOGGERS):
                    raise UserError(f"{name}: monitor={monitor} must be a metric train/* or val/*. Name one.")
                if _has_own_code(trainer):
                    continue
                _check_is_logged(trainer, pl_module, name, monitor)
                _check_is_logged_in_time(trainer, callback)
                if monitor.startswith("train/"):
                    self._unchecked.append((name, monitor))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            known = [name for name in trainer.callback_metrics if name.startswith("train/")]
            for callback, monitor in self._unchecked:
                if monitor not in known:
                    raise _unknown(callback, monitor, known)
            self._unchecked = []


def _check_is_logged(trainer: Trainer, module: PreferenceObjective, callback: str, monitor: str) -> None:
    """Check that a monitored metric will be logged; those named train/* are only known after the first step.

    Args:
        callback: Name of the callback's class, for the message.
        monitor: Name of the metric.

    Raises:
        UserError: the metric is never logged.
    """
    if monitor.startswith(("train/", "reference/")):
        return
    if not monitor.startswith("val/"):
        raise UserError(f"{callback}: monitor={monitor} is never logged. Name a metric train/* or val/*.")
    if (data := data_module_of(trainer)) is None:
        return
    known: list[str] = []
    if data.validation is not None and trainer.limit_val_batches != 0:
        known += module.metrics["val_"].names  # type: ignore[operator, arg-type]
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, WinRate) and each.validation is not None:
            known += metric_names(each.scorers)
    if not known:
        raise UserError(
            f"{callback}: monitor={monitor} is never logged, since there is no validation. Set data.validation (pairs) "
            "or win_rate.validation (prompts), or monitor a metric train/*."
        )
    if monitor.removeprefix("val/") not in known:
        raise _unknown(callback, monitor, [f"val/{name}" for name in known])


def _check_is_logged_in_time(trainer: Trainer, callback: EarlyStopping | ModelCheckpoint) -> None:
    """Check that a metric of `WinRate` is logged in each epoch in which a callback reads it.

    Raises:
        UserError: it is not.
    """
    data = data_module_of(trainer)
    if data is None or data.validation is not None or not str(callback.monitor).startswith("val/"):
        return
    every = [each.every for each in trainer.callbacks if isinstance(each, WinRate) and each.unit == "round"]  # type: ignore[attr-defined]
    read_every = callback._every_n_epochs if isinstance(callback, ModelCheckpoint) else 1
    if every and read_every % every[0]:
        name = type(callback).__name__
        fix = "" if name == "EarlyStopping" else f", or {name}'s every_n_epochs to a multiple of it"
        raise UserError(
            f"{name}: monitor={callback.monitor} is logged in every {every[0]}th round only (win_rate.every), but read "
            f"in every {read_every}. Set win_rate.every=1{fix}."
        )


def _has_own_code(trainer: Trainer) -> bool:
    """Whether a class of the user's may log metrics of its own."""
    classes = [type(each).__module__ for each in (trainer.lightning_module, *trainer.callbacks)]  # type: ignore[attr-defined]
    return not all(module.startswith(("lit_align.", "lightning.")) for module in classes)


def _unknown(callback: str, monitor: str, known: list[str]) -> UserError:
    return UserError(f"{callback}: monitor={monitor} is never logged. Name one of {', '.join(known)}.")
