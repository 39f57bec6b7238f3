"""Where a run is: the record that its checkpoints keep, and from which a resumed run continues.

Lightning's loops keep counters of their own. They depend on when a checkpoint was written (after a batch, after
validation, at an epoch's end) and on how often the run was resumed before. So a checkpoint records the position itself,
and the counters are written again from it when the checkpoint is loaded. A resume is then a function of the checkpoint
alone, however often the run was killed and whatever wrote the checkpoint.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from lit_align.console import print_line
from lit_align.errors import check_types
from lit_align.lightning_features import accumulation_schedules, is_out_of_time

KEY = "position"


@dataclass(frozen=True)
class Position:
    """The completed part of a run.

    Args:
        epoch: Epochs completed, their end included.
        batches: Batches of the next epoch whose optimizer steps are complete. Equal to `of` where only the end of the
            epoch is left to do. Batches accumulated toward a step that was not made do not count.
        of: Batches of that epoch.
        step: Optimizer steps made.
        seen: Batches completed in all epochs.
        validation_due: Whether validation follows the last of these batches.
        validated: Whether it is done.
        stopping: Whether a callback such as `EarlyStopping` has ended the training; a timer checks that itself.
    """

    epoch: int
    batches: int
    of: int
    step: int
    seen: int
    validation_due: bool
    validated: bool
    stopping: bool = False

    @classmethod
    def of_run(cls, trainer: Trainer) -> "Position":
        """The position of a run at the moment at which a checkpoint is written."""
        loop, step = trainer.fit_loop, trainer.global_step
        epochs: Any = loop.epoch_progress.current  # Lightning declares the narrowest of its trackers
        progress: Any = loop.epoch_loop.batch_progress
        seen, batches = progress.total.processed, progress.current.processed
        out_of_time = any(map(is_out_of_time, trainer.callbacks))  # type: ignore[attr-defined]
        stopping = trainer.should_stop and not out_of_time
        between_epochs = epochs.started == epochs.completed or epochs.processed > epochs.completed
        reached_limit = out_of_time or 0 < trainer.max_steps <= step
        # a run that is extended continues within the epoch that the limit has cut short, after its validation
        is_cut = between_epochs and reached_limit and 0 < batches < trainer.num_training_batches < math.inf
        if between_epochs and not is_cut:
            done = max(epochs.completed, epochs.processed)
            return cls(done, 0, 0, step, seen, False, False, stopping)
        of = int(trainer.num_training_batches)
        unmade = batches % trainer.accumulate_grad_batches if batches < of else 0
        due = bool(batches) and not unmade and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        epoch = epochs.started - 1
        return cls(epoch, batches - unmade, of, step, seen - unmade, due and not is_cut, trainer.validating, stopping)

    @property
    def at_epochs_end(self) -> bool:
        """Whether all steps of an epoch are made, and only its end is left to do."""
        return 0 < self.batches == self.of

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Record the position in a checkpoint."""
        checkpoint[KEY] = asdict(self)

    @classmethod
    def load(cls, checkpoint: dict[str, Any]) -> "Position":
        """The position that a checkpoint records.

        Raises:
            TypeError: the record has other fields, a field has another type, or the epoch more batches than it has.
        """
        at = check_types(cls(**checkpoint[KEY]))
        if at.batches > at.of:
            raise TypeError(f"batches is {at.batches} of {at.of}")
        return at

    def write_loops(self, checkpoint: dict[str, Any]) -> None:
        """Write the counters of Lightning's loops that belong to this position into a loaded checkpoint."""
        fit = checkpoint["loops"]["fit_loop"]
        began = self.epoch + (self.batches > 0)
        epochs = {"ready": began, "started": began, "processed": self.epoch, "completed": self.epoch}
        fit["epoch_progress"] |= {"total": epochs, "current": {**epochs}}
        fit["epoch_loop.batch_progress"] |= {
            "total": _counts(self.seen),
            "current": _counts(self.batches),
            "is_last_batch": self.at_epochs_end,
        }
        fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"] = {
            "ready": self.step,
            "completed": self.step,
        }
        # a loop that resumes where validation is due passes the end of that batch again, where the step is counted
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = self.step - self.validation_due
        unfinished = self.validation_due and not self.validated
        validation = _counts(0) | ({"ready": 1, "started": 1} if unfinished else {})
        fit["epoch_loop.val_loop.batch_progress"] |= {"total": validation, "current": {**validation}}
        loaders = fit["state_dict"].pop("combined_loader", [])
        if self.batches:
            fit["state_dict"]["combined_loader"] = [_served(loader, self.batches) for loader in loaders]

    def stop_again(self, trainer: Trainer) -> None:
        """Let a trainer that resumes here end its training where a callback had ended it: now, or with this epoch."""
        if not self.stopping:
            return
        if not self.batches:
            print_line("the training had been stopped early, and ends here again")
            trainer.should_stop = True
            return
        loop = trainer.fit_loop.epoch_loop
        start = loop.on_run_start

        def start_and_stop(data_fetcher: Any) -> None:
            loop.on_run_start = start  # type: ignore[method-assign]
            start(data_fetcher)
            trainer.should_stop = True

        loop.on_run_start = start_and_stop  # type: ignore[method-assign]

    def settle(self, trainer: Trainer) -> None:
        """Give Lightning's loops, once training starts, what they take from no checkpoint.

        That they begin an epoch and do not resume one (with `max_steps` they always believe the latter), and the number
        of batches that a step of this epoch accumulates.
        """
        if not self.batches:
            trainer.fit_loop._restarting = False
            trainer.fit_loop.epoch_loop.restarting = False
        for each in accumulation_schedules(trainer):
            trainer.accumulate_grad_batches = each.get_accumulate_grad_batches(self.epoch)


def end_when_over(trainer: Trainer) -> None:
    """Let a run that resumes after its last step pass the hooks of a run's start and end.

    Lightning's loop passes none where nothing is left to train, so that no callback would evaluate or average.
    """
    loop = trainer.fit_loop
    train = loop.run

    def run() -> None:
        loop.setup_data()
        if loop.skip:
            loop.on_run_start()
            loop.on_run_end()
        else:
            train()

    loop.run = run  # type: ignore[method-assign]


def _counts(number: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)


def _served(loader: Any, batches: int) -> Any:
    """The state of one of our loaders, with the batches that it has served; of other loaders, as it is."""
    return loader | {"served": batches, "open": True} if isinstance(loader, dict) and "served" in loader else loader
