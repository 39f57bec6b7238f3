"""A run's header, and at its end the report, the model, and the command to resume.

Logged after each round (epoch):

| metric | formula |
|---|---|
| round/seconds_train | wall-clock time of the round's training |
| round/prompts_per_minute_train | examples trained on per minute, by all processes |
"""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table
from rich.text import Text

from lit_align.callbacks.base import AlignCallback, DryRun, Order
from lit_align.checkpoints import STARTS
from lit_align.console import command, print_field, print_line, relative
from lit_align.data.base import data_module_of
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.errors import UserError, counted
from lit_align.export import save_generation_config
from lit_align.logprobs import preferences_of
from lit_align.objectives import PreferenceObjective
from lit_align.objectives.memory import memory_line
from lit_align.objectives.schedule import planned_steps, warm_up_problem
from lit_align.position import Position
from lit_align.reporting.metrics_csv import MetricsCSV
from lit_align.reporting.plots import plot_curves
from lit_align.reporting.report import write_report
from lit_align.reporting.run_folder import held_out_files, verdict_file
from lit_align.reporting.run_record import RunStart, record_end, record_start


@runtime_checkable
class Describes(Protocol):
    """An objective, a data module or a callback with lines for the run's header."""

    def describe(self) -> Iterable[tuple[str, str]]:
        """Label and text of each line."""
        ...


class RunReport(AlignCallback):
    """Prints the header and the end of a run; keeps metrics.csv, report.html and the trained model in its folder.

    Args:
        save_model: Write the trained model in transformers' format to `model` in the run's folder.
    """

    order = Order.REPORT
    in_dry_run = DryRun.SKIP

    def __init__(self, save_model: bool = True):
        self.save_model = save_model
        self.named_checkpoint = ""
        """The command's `ckpt_path`, which may be another than the one that the run resumes from."""
        self._starts = 0  # of the run
        self._header: list[tuple[str, str]] = []
        self._stepped: float | None = None  # when the last batch of this epoch ended
        self._seconds = 0.0  # of this epoch's training so far
        self._trained = 0  # examples of this epoch so far, of this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not _metrics_csv(trainer):
            trainer.loggers = [*trainer.loggers, MetricsCSV(trainer.default_root_dir)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete the results of an earlier run in the folder, and record the start."""
        if not trainer.is_global_zero:
            return
        if isinstance(pl_module, PreferenceObjective) and (problem := _warm_up_problem(trainer, pl_module)):
            print_field("warm-up", problem)
            self._header.append(("warm-up", problem))
        folder, resumes = Path(trainer.default_root_dir), trainer.ckpt_path is not None
        if not resumes:
            for path in (folder / "summary.json", verdict_file(folder), *held_out_files(folder)):
                path.unlink(missing_ok=True)
        start = RunStart.now(trainer.global_step, self.named_checkpoint)
        counted = record_start(folder, self._header, start, resumes)
        self._starts = max(counted, self._starts + 1 if resumes else 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            return
        self._check_start_stays(trainer, pl_module)
        parts = [pl_module, trainer.datamodule, *trainer.callbacks]  # type: ignore[attr-defined]
        self._header = [line for part in parts if isinstance(part, Describes) for line in part.describe()]
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in [*self._header, ("memory", memory_line(pl_module)), *self.folder_lines(trainer)]:
            table.add_row(Text(name, style="bold"), Text(text))
        print_line(table)

    def folder_lines(self, trainer: Trainer) -> list[tuple[str, str]]:
        """The lines of the header that name the run's folder."""
        return [("run", trainer.default_root_dir)]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped, self._seconds, self._trained = None, 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._stepped is None:
            self._stepped = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._seconds += now - (self._stepped or now)
        self._stepped = now
        preferences = preferences_of(batch)
        self._trained += 0 if preferences is None else preferences.size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {"round/seconds_train": self._seconds}
        if self._trained:
            values["round/prompts_per_minute_train"] = 60 * self._trained * trainer.world_size / self._seconds
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._trained = float(state_dict["seconds"]), counted("trained", state_dict["trained"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the metrics, too: a killed run that resumes from the checkpoint has all rows before it."""
        for logger in _metrics_csv(trainer):
            logger.save()
        save_metrics(trainer, checkpoint)
        checkpoint[STARTS] = self._starts

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._starts = counted(STARTS, checkpoint.get(STARTS, 0))
        if "metrics_csv" in checkpoint:
            for logger in _metrics_csv(trainer):
                logger.resume(checkpoint["metrics_csv"])

    def _check_start_stays(self, trainer: Trainer, module: PreferenceObjective) -> None:
        """Check that the trained model is not written over the model that training starts from.

        Raises:
            UserError: it is.
        """
        path, folder = module.policy_config.path, Path(trainer.default_root_dir, "model")
        if self.save_model and folder.is_dir() and Path(path).resolve() == folder.resolve():
            raise UserError(
                f"model.policy.path={path} is the folder to which this run writes its own model. Name another "
                "folder of the run (trainer.default_root_dir)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        if not isinstance(pl_module, PreferenceObjective):
            return
        folder = Path(trainer.default_root_dir)
        if self.save_model and pl_module.policy is not None:
            pl_module.policy.save(folder / "model")  # by all processes: each may hold a share of the weights
        if not trainer.is_global_zero:
            return
        print_line()
        if self.save_model:
            _save_generation_config(trainer, pl_module, folder / "model")
            print_line(f"model      {folder / 'model'} (transformers format, with tokenizer)")
        _write_report(folder)
        # a script or a notebook has no configuration for a command
        if (folder / "config.yaml").exists() and last_checkpoint(trainer) and (longer := _longer(trainer)):
            print_line(f"extend     {resume_command(trainer, None)} {longer}")
        record_end(folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the report after a test; `on_test_end` is for callbacks that test something."""
        if stage == "test" and trainer.is_global_zero:
            _write_report(Path(trainer.default_root_dir))


def _save_generation_config(trainer: Trainer, module: PreferenceObjective, folder: Path) -> None:
    """Write how the model's responses end and how they were sampled, if the data are a module of ours."""
    if (data := data_module_of(trainer)) is not None:
        assert module.policy is not None
        sampling = asdict(data.sampling) if isinstance(data, OnPolicyPairs) else {}
        save_generation_config(module.policy, data.preference_tokenizer, sampling, folder)


def _metrics_csv(trainer: Trainer) -> list[MetricsCSV]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]


def save_metrics(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Record the number of rows in metrics.csv in a checkpoint."""
    for logger in _metrics_csv(trainer):
        checkpoint["metrics_csv"] = logger.state(_pending_row(trainer))


def _pending_row(trainer: Trainer) -> dict[str, float] | None:
    """Metrics of the step just made, which Lightning logs after the callbacks of its batch; None elsewhere."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches: Any = loop.batch_progress.current
    in_batch_end = batches.processed > batches.completed
    if not in_batch_end or loop._should_accumulate() or not connector.should_update_logs:
        return None
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    return {"step": loop._batches_that_stepped} | metrics | {"epoch": trainer.current_epoch} if metrics else None


def _warm_up_problem(trainer: Trainer, module: PreferenceObjective) -> str:
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    of_run, of_round = (
        planned_steps(batches, accumulated, epochs, trainer.max_steps) for epochs in (trainer.max_epochs, 1)
    )
    return warm_up_problem(module.learning_rate, of_run, of_round)


def _longer(trainer: Trainer) -> str:
    """The options that train as long again; empty for a run without an end."""
    within_an_epoch = Position.of_run(trainer).batches > 0
    options = []
    if trainer.max_epochs and 0 < trainer.max_epochs <= trainer.current_epoch and not within_an_epoch:
        options.append(f"--trainer.max_epochs={2 * trainer.max_epochs}")
    if 0 < trainer.max_steps <= trainer.global_step:
        options.append(f"--trainer.max_steps={2 * trainer.max_steps}")
    return " ".join(options)


def _write_report(folder: Path) -> None:
    """Write the report and the curves of a run, if it has metrics."""
    if curves := plot_curves(folder):
        print_line(f"report     {write_report(folder)}")
        print_line(f"curves     {curves}, from {folder / 'metrics.csv'}")


def last_checkpoint(trainer: Trainer) -> str:
    """The checkpoint that the trainer's callback wrote last; empty if there is none."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint):
        return ""
    return checkpoint.last_model_path or checkpoint.best_model_path


def resume_command(trainer: Trainer, path: str | Path | None) -> str:
    """The command that resumes from a checkpoint; without one, the command that runs the same again."""
    resume = ["--ckpt_path", relative(path)] if path else []
    return command("fit", "--config", Path(trainer.default_root_dir, "config.yaml"), *resume)
