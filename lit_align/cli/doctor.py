"""`lit-align doctor --config X.yaml [OPTIONS]`: try the start of a run and estimate the whole.

Takes the options of `fit`. Everything is loaded and read as in the run; then, in a scratch folder, a few prompts are
sampled and scored (OnPolicyPairs), and three batches are trained on, of which the last two are timed. It prints the
run's header, one decoded example with the trained tokens in color, and an estimate of steps, time and memory. The exit
code is 0 if all of that worked, and 2 with one paragraph if something is missing or wrong.

The estimate leaves out held-out evaluations and checkpoints, and starts at step 0: a checkpoint must exist but is not
read. The trained weights are discarded.
"""

import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from rich.padding import Padding
from rich.text import Text

from lit_align.callbacks import AlignCallback, DryRun, Order, RunReport, WinRate
from lit_align.callbacks.base import dry_run_of, in_order
from lit_align.cli.app import AlignCLI
from lit_align.console import command, print_field, print_line, printable
from lit_align.data import OnPolicyPairs
from lit_align.data.base import PairsDataModule
from lit_align.data.tokenization import in_place
from lit_align.errors import amount
from lit_align.logprobs import PreferenceBatch, preferences_of
from lit_align.objectives import PreferenceObjective
from lit_align.objectives.schedule import planned_steps, warm_up_problem
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics

BATCHES = 3
"""Batches to train on; the first is not timed."""


class Examination(AlignCallback):
    """Times the batches and prints an example of the first.

    Args:
        checked: Callbacks of which only `setup` runs, and the checks of `WinRate`.
        scratch: Folder of the rounds; all processes use the first one's.
        epochs: trainer.max_epochs of the whole run.
        limits: trainer.limit_train_batches and trainer.limit_val_batches of the whole run.
    """

    order = Order.REPORT

    def __init__(self, checked: list[Callback], scratch: str, epochs: int | None, limits: tuple[Any, Any]):
        self.limit_train, self.limit_val = limits
        self.checked = checked
        self.scratch = scratch
        self.epochs = epochs
        self.prompts = 0  # of a round of the whole run
        self.sampled = 0  # prompts of the round that is tried
        self.starts: list[float] = []
        self.ends: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.scratch = trainer.strategy.broadcast(self.scratch)
        if isinstance(data := trainer.datamodule, OnPolicyPairs):  # type: ignore[attr-defined]
            data.store = self.scratch
            self.prompts = prompts_of_a_round(data, self.epochs)
            data.prompts_per_round = self.sampled = min(self.prompts, enough_prompts(data, trainer.world_size))
        for callback in self.checked:
            callback.setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what evaluations will read."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PairsDataModule) and data.validation is not None and self.limit_val != 0:
            data.read_validation()
        for callback in self.checked:
            if isinstance(callback, WinRate):
                callback.on_fit_start(trainer, pl_module)

    def limited(self, batches: int) -> int:
        """The batches of an epoch, of which trainer.limit_train_batches is the most, or the share."""
        limit = self.limit_train
        return batches if limit is None else min(batches, limit if isinstance(limit, int) else int(batches * limit))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.starts and isinstance(pl_module, PreferenceObjective):
            preferences = preferences_of(batch)
            assert preferences is not None
            show_example(preferences, pl_module.tokenizer)
        self.starts.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()  # the folder is deleted next

    @property
    def seconds(self) -> float:
        """Mean duration of a batch, without the first."""
        times = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        return sum(times[1:]) / len(times[1:]) if len(times) > 1 else times[0]


class Header(RunReport):
    """Prints a run's header and writes nothing."""

    def folder_lines(self, trainer: Trainer) -> list[tuple[str, str]]:
        return []  # it is the scratch folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None: ...

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None: ...

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None: ...


def examine(args: list[str]) -> None:
    """Try the start of a run and print the estimate.

    Raises:
        UserError: anything that would stop `fit`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cli = AlignCLI([*args, f"--trainer.default_root_dir={scratch}"], run=False)
        trainer = cli.trainer
        given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        acting = [callback for callback in given if dry_run_of(callback) is DryRun.ACT]
        checked = [callback for callback in given if dry_run_of(callback) is DryRun.CHECK]
        trainer.loggers = [MetricsCSV(scratch)]
        limits = trainer.limit_train_batches, trainer.limit_val_batches
        examination = Examination(checked, scratch, trainer.max_epochs, limits)
        trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps = BATCHES, 0, 0
        trainer.callbacks = in_order([*acting, Header(), examination])  # type: ignore[attr-defined]
        trainer.fit_loop.max_epochs = 1
        trainer.fit(cli.model, datamodule=cli.datamodule)
        if not trainer.is_global_zero:
            return
        rows = read_metrics(f"{scratch}/metrics.csv")
    print_line()
    for name, text in estimate(trainer, examination, rows):
        print_field(name, text)
    print_line(f"\nall checks passed: {command('fit', *args)}")


def show_example(batch: PreferenceBatch, tokenizer: Any) -> None:
    """Print the first example of a batch, decoded from its tokens: the trained ones are green, the prompt is dim."""

    def show(text: str, style: str) -> None:
        print_line(Padding(Text(printable(text), style=style), (0, 0, 0, 4)))

    prompt_ids = batch.prompt_ids[0][batch.prompt_mask[0]].tolist()
    prompt = tokenizer.decode(prompt_ids)
    print_line(Text("  one example: prompt, not trained on", style="dim"))
    show(f"{'…' if len(prompt) > 600 else ''}{prompt[-600:]}│", "dim")
    for k in range(batch.response_ids.shape[1]):
        ids = batch.response_ids[0, k][batch.response_mask[0, k]].tolist()
        print_line(Text(f"  response {k}: {amount(len(ids), 'tokens')}, trained on"))
        show(f"│{in_place(tokenizer, prompt_ids, ids)}│", "green")


def prompts_of_a_round(data: OnPolicyPairs, rounds: int | None) -> int:
    """Prompts of a round of the whole run."""
    if isinstance(data.prompts_per_round, int):
        return data.prompts_per_round
    return {"all": data.prompt_count, "chunk": math.ceil(data.prompt_count / (rounds or 1))}[data.prompts_per_round]


def enough_prompts(data: OnPolicyPairs, processes: int) -> int:
    """Prompts that fill a batch of the sampler, and the batches that are trained on, unless these need many."""
    together = max(1, data.sampling_batch_size // data.responses_per_prompt)
    batch = data.batch_size * processes
    return min(max(together, BATCHES * batch), max(4 * together, 2 * batch))


class Epoch(NamedTuple):
    """An epoch, or a round, of the whole run.

    Args:
        line: Name and text of its line.
        batches: Of each process.
        seconds: Duration of each part.
    """

    line: tuple[str, str]
    batches: int
    seconds: dict[str, float]

    @classmethod
    def expected(cls, trainer: Trainer, examination: Examination, rows: list[dict[str, float]]) -> Self:
        """The epoch that the batches and the round that were tried let expect."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        each = examination.seconds
        if not isinstance(data, OnPolicyPairs):
            loader = data.train_dataloader()
            if isinstance(loader, CombinedLoader):
                iter(loader)  # it has no length before
            batches = examination.limited(len(loader))
            size = f" of {amount(data.batch_size, 'examples')}" if isinstance(data, PairsDataModule) else ""
            text = f"{amount(batches, 'batches')}{size} per process"
            return cls(("an epoch", text), batches, {"train": batches * each})
        made = next(row for row in rows if "round/pairs" in row)
        times = examination.prompts / examination.sampled
        batches = examination.limited(math.ceil(times * made["round/pairs"] / data.batch_size / trainer.world_size))
        made_of = f"{amount(batches, 'batches')} of {amount(data.batch_size, 'pairs')}"
        text = f"{amount(examination.prompts, 'prompts')}, about {made_of} per process"
        sampling = {"sample": times * made["round/seconds_sample"], "score": times * made["round/seconds_score"]}
        return cls(("a round", text), batches, sampling | {"train": batches * each})


def estimate(trainer: Trainer, examination: Examination, rows: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
    """Steps, time and memory of the whole run: name and text of each line.

    Args:
        rows: The logged metrics; those of a round hold the duration of sampling and scoring, and the number of pairs.
    """
    epoch, accumulated = Epoch.expected(trainer, examination, rows), trainer.accumulate_grad_batches
    steps = math.ceil(epoch.batches / accumulated)
    total = planned_steps(epoch.batches, accumulated, examination.epochs, trainer.max_steps)
    yield epoch.line
    yield "steps", f"{steps} each, {total or 'unlimited'} in all; {examination.seconds:.2f} s per batch"
    module = trainer.lightning_module
    if isinstance(module, PreferenceObjective) and (problem := warm_up_problem(module.learning_rate, total, steps)):
        yield "warm-up", problem
    each = sum(epoch.seconds.values())
    listed = " + ".join(f"{_time(value)} {name}" for name, value in epoch.seconds.items())
    whole = f"; about {_time(each * total / steps)} in all, without evaluations" if total else ""
    yield "time", f"{_time(each)} = {listed}{whole}"
    if torch.cuda.is_available():
        yield "peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on this GPU in these batches"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        yield "peak memory", f"{peak / 1e9:.2f} GB of this process in these batches"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
