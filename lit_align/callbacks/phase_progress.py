"""One progress bar per phase: training here, sampling and scoring where they happen (`console.phase`)."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import Phase, print_field
from lit_align.errors import decimal
from lit_align.logprobs import preferences_of

SHOWN = {"loss": "loss", "reward_accuracy": "accuracy", "reward_margin": "margin"}
"""Metric → its name on the terminal."""


class PhaseProgress(AlignCallback, ProgressBar):
    """A bar for each epoch of training, then lines with its pace and its means of loss, accuracy and margin.

    Means are over examples, of all processes. The same metrics of the validation pairs have a line of their own.
    """

    order = Order.PROGRESS
    in_dry_run = DryRun.SKIP

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._phase: Phase | None = None
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._examples = 0  # of this optimizer step

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(self.total_train_batches) if self.total_train_batches != float("inf") else 0
        resumed = trainer.fit_loop.restarting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._open("train", total, trainer.fit_loop.epoch_loop.batch_progress.current.completed if resumed else 0)
        self._totals, self._counts, self._examples = {}, {}, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._phase is None:
            return
        preferences = preferences_of(batch)
        self._examples += 1 if preferences is None else preferences.size
        if not trainer.fit_loop._should_accumulate():
            self._add_step(trainer.callback_metrics)
        self._phase.advance(note=self._means())
        if trainer.is_last_batch:
            self._close()  # before validation, which may follow

    def _add_step(self, metrics: Mapping[str, Any]) -> None:
        """Add the means of an optimizer step, which are logged once for all its batches."""
        for name in SHOWN:
            value = float(metrics.get(f"train/{name}", math.nan))
            if not math.isnan(value):
                self._totals[name] = self._totals.get(name, 0.0) + self._examples * value
                self._counts[name] = self._counts.get(name, 0) + self._examples
        self._examples = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        values = {name: float(metrics[f"val/{name}"]) for name in SHOWN if f"val/{name}" in metrics}
        if values and self._enabled and not trainer.sanity_checking:
            print_field("validation", _listed(values))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _open(self, name: str, total: int, done: int) -> None:
        if self._enabled:
            self._phase = Phase(name, total, "batches", done)

    def _close(self) -> None:
        if self._phase is not None:
            self._phase.note = ""
            self._phase.finish()
            self._phase = None
            if means := self._means():
                print_field("", means)

    def _means(self) -> str:
        return _listed({name: total / self._counts[name] for name, total in self._totals.items()})


def _listed(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {decimal(values[key])}" for key, name in SHOWN.items() if key in values)
