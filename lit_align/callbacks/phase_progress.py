"""One progress bar per phase: training here, sampling and scoring where they happen (`console.phase`)."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.console import Phase


class PhaseProgress(AlignCallback, ProgressBar):
    """A bar for each epoch of training, with loss, accuracy and margin of the last step; one line when it is done."""

    order = Order.PROGRESS
    in_dry_run = DryRun.SKIP

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._phase: Phase | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(self.total_train_batches) if self.total_train_batches != float("inf") else 0
        resumed = trainer.fit_loop.restarting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._open("train", total, trainer.fit_loop.epoch_loop.batch_progress.current.completed if resumed else 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._phase is not None:
            values = trainer.callback_metrics
            shown = {"loss": "train/loss", "acc": "train/reward_accuracy", "margin": "train/reward_margin"}
            note = "  ".join(f"{name} {values[key]:.3f}" for name, key in shown.items() if key in values)
            self._phase.advance(note=note)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _open(self, name: str, total: int, done: int) -> None:
        if self._enabled:
            self._phase = Phase(name, total, "batches", done)

    def _close(self) -> None:
        if self._phase is not None:
            self._phase.finish()
            self._phase = None
