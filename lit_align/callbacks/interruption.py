"""Ctrl-C and SIGTERM save first, print the command to resume, and end the run with exit code 128 + signal number.

So does SIGHUP, which a closed terminal sends. A run that was started to outlive its terminal (`nohup`) ignores it.

A trial that W&B's agent stops early ends with 0: the agent counts other codes as failures, and gives up after a few.

- Within an epoch: the current step is finished, with all batches that it accumulates, and `interrupted.ckpt` is written
  beside the other checkpoints. A run resumed from it equals the uninterrupted run.
- After an epoch's last step: the work at the epoch's end is done first, since a resumed run does not return to it.
- During the evaluation at an epoch's end: a single process saves its state after the last step, so that the resumed run
  repeats the evaluation. Several processes are not at the same place, and leave the last checkpoint.
- During sampling: finished samples are on disk, and the last checkpoint is the one to resume from.

A checkpoint that another callback saves after an error repeats the validation in which the error occurred.

A second signal ends the run at once, but for a second SIGHUP: the terminal and its shell each send one. Lightning alone
misses a SIGTERM after the last batch.
"""

import os
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align import checkpoints
from lit_align.callbacks.base import AlignCallback, DryRun, Order, in_order
from lit_align.callbacks.run_report import last_checkpoint, resume_command, save_metrics
from lit_align.console import print_line
from lit_align.position import Position

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(SystemExit):
    """The run received a signal to stop."""

    def __init__(self, signum: int):
        stopped_by_agent = signum == signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ
        super().__init__(0 if stopped_by_agent else 128 + signum)
        self.signum = signum


class Signals:
    """Handlers of Ctrl-C, SIGTERM and SIGHUP, which a run takes over and gives back."""

    def __init__(self) -> None:
        self._handle: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}

    def take_over(self, handle: Callable[[int], None]) -> None:
        """Let a function handle the signals; without effect outside the main thread."""
        self._handle = handle
        for signum in SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            try:
                before = signal.signal(signum, self._receive)
            except ValueError:  # not the main thread
                return
            self._before.setdefault(signum, before)

    def give_back(self) -> None:
        """Let those handle the signals that did before."""
        self._handle = None
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._handle is not None:
            self._handle(signum)
        else:  # Lightning has restored the handler that it found, which is this one
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)


class Stage(Enum):
    """The part of a run that a signal interrupts."""

    OUTSIDE = "outside"
    """The time before and between epochs: what they trained is saved."""
    STEPS = "steps"
    """The steps of an epoch, of which one may be under way."""
    END = "end"
    """The end of an epoch, with its evaluations, after its last step."""


class Interruption(AlignCallback):
    """Saves on these signals and prints the command to resume. It always runs after the other callbacks."""

    order = Order.LAST
    in_dry_run = DryRun.SKIP

    def __init__(self) -> None:
        self._signals = Signals()
        self._signal: int | None = None  # that the run stops for, after this step or epoch
        self._stage = Stage.OUTSIDE
        self._step = 0  # of the optimizer, before the current batch
        self._saved: Path | None = None
        self._before_end: dict[str, Any] = {}  # of a checkpoint, when the epoch's last step was done
        self._repeats_end = False  # what is saved now belongs before the epoch's end
        self._failed = False  # what is saved now belongs before the validation under way
        self._began_at: int | None = None  # the optimizer step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sort the callbacks, also in a user's own Trainer: the checkpoint must include the work of all others."""
        trainer.callbacks = in_order(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning iterates the old list

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._saved, self._began_at, self._stage = None, None, None, Stage.OUTSIDE  # of an earlier fit
        self._repeats_end = self._failed = False
        self._signals.take_over(partial(self._handle, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.take_over(partial(self._handle, trainer))  # Lightning has installed its own handler since
        self._began_at = trainer.global_step
        path = _checkpoint_path(trainer)
        if path and trainer.is_global_zero and not trainer.ckpt_path:
            checkpoints.remove(path)  # left by another run in this folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stage = Stage.STEPS

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stage = Stage.STEPS  # a run that resumes within an epoch does not start it
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            self._stage = Stage.END
            self._before_end = {}
            Position.of_run(trainer).save(self._before_end)
            save_metrics(trainer, self._before_end)
        if trainer.global_step == self._step:  # accumulated gradients are in no checkpoint
            return
        stop = self._signal is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not stop:
            return
        self._signal = self._signal or signal.SIGTERM
        if self._stage is Stage.STEPS:  # they stand after this callback, and the resumed run does not pass this step
            for saving in trainer.checkpoint_callbacks:
                saving.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save(trainer)
        if self._stage is Stage.STEPS:
            raise Interrupted(self._signal)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._signal is not None:
            # not after the last epoch: Lightning would skip the verdict when the finished run resumes
            if trainer.current_epoch + 1 != trainer.max_epochs:
                self._save(trainer)
            raise Interrupted(self._signal)
        self._stage = Stage.OUTSIDE  # ModelCheckpoint saves next

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = _checkpoint_path(trainer)
        if path and trainer.is_global_zero:
            checkpoints.remove(path)  # left by an earlier interruption

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._failed = True
        interrupted = isinstance(exception, Interrupted)
        try:
            if interrupted and self._stage is Stage.END and self._saved is None and trainer.world_size == 1:
                self._repeats_end = True
                self._save(trainer)
        finally:
            self._signals.give_back()
        if not interrupted:
            return
        newest = self._saved or self._last(trainer)
        name = signal.Signals(exception.signum).name
        action = "Saved. Resume:" if newest else "Nothing was saved. Start again:"
        print_line(f"\n{name} at step {trainer.global_step}. {action}")
        print_line(resume_command(trainer, newest))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._repeats_end:
            checkpoint.update(self._before_end)
        elif self._failed:
            replace(Position.of_run(trainer), validated=False).save(checkpoint)

    def _save(self, trainer: Trainer) -> None:
        path = _checkpoint_path(trainer)
        if path:
            trainer.save_checkpoint(path, weights_only=False)
        self._saved = path

    def _last(self, trainer: Trainer) -> str | Path | None:
        """The last checkpoint of this run: the one it resumed from, until it has passed it."""
        last = last_checkpoint(trainer)
        beyond = self._began_at is not None and trainer.global_step > self._began_at
        return last if last and beyond else trainer.ckpt_path or last

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.give_back()

    def _handle(self, trainer: Trainer, signum: int) -> None:
        if signum == signal.SIGHUP:
            if self._signal is not None:
                return
            _leave_terminal()
        if self._stage is Stage.STEPS and self._signal is None:
            self._signal = signum
            print_line(f"\nstopping after {'the end of this epoch' if trainer.is_last_batch else 'this step'} …")
            return
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signum)  # type: ignore[arg-type]  # the processes that this one has started
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # saving is not interrupted
        raise Interrupted(signum)


def _leave_terminal() -> None:
    """Let what is printed to a terminal go nowhere: the terminal is closed, so that writing to it fails."""
    for descriptor in (1, 2):
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere.fileno(), descriptor)


def _checkpoint_path(trainer: Trainer) -> Path | None:
    """Where to save; None if the run keeps no checkpoints."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return None
    return Path(checkpoint.dirpath or Path(trainer.default_root_dir, "checkpoints"), "interrupted.ckpt")
