"""`lit-align doctor --config X.yaml [OPTIONS]`: what a run would do, found out by three batches of it.

Takes what `fit` takes. Everything is loaded and read as in the run; then, in a scratch folder, a few prompts are
sampled and scored (OnPolicyPairs), and three batches are trained on, of which the last two are timed. Shown are the
header of the run, one decoded example with what is trained on in colour, and an estimate of steps, time and memory.
The exit code is 0 if all of that worked, and 2 with one paragraph if something is missing or wrong.

The estimate leaves out held-out verdicts and checkpoints, and counts from the start: a checkpoint must be there, and is
not read. The weights that were trained are thrown away.
"""

import math
import resource
import shlex
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text

from lit_align.callbacks import Drift, FSDPSharding, Predictions, ReferenceRefresh, RunReport, WinRate
from lit_align.console import print_field, print_line
from lit_align.data import OnPolicyPairs
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import PreferenceObjective
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics

BATCHES = 3
"""How many are trained on; the first is not timed."""


class Examination(Callback):
    """Times the batches and shows the first.

    Args:
        others: Callbacks that only look for what they need.
        scratch: Folder of the rounds; the first process's counts.
        sampled: Most prompts to sample of.
    """

    def __init__(self, others: list[Callback], scratch: str, sampled: int):
        self.others = others
        self.scratch = scratch
        self.sampled = sampled
        self.starts: list[float] = []
        self.ends: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.scratch = trainer.strategy.broadcast(self.scratch)
        if isinstance(data := trainer.datamodule, OnPolicyPairs):  # type: ignore[attr-defined]
            data.store = self.scratch
            data.prompts_per_round = self.sampled = min(self.sampled, data.prompt_count)
        for callback in self.others:  # find what they need, and do nothing
            callback.setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.starts and isinstance(pl_module, PreferenceObjective):
            first = batch if isinstance(batch, PreferenceBatch) else batch["preferences"]
            show_example(first, pl_module.tokenizer)
        self.starts.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()  # the folder is about to go

    @property
    def seconds(self) -> float:
        """Of one batch."""
        times = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        return sum(times[1:]) / len(times[1:]) if len(times) > 1 else times[0]


class Header(RunReport):
    """A run's header without what it leaves."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None: ...

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None: ...


def examine(args: list[str]) -> None:
    """Try a run's beginning and say what the whole would be.

    Raises:
        UserError: what `fit` would stop with.
    """
    from lit_align.cli import AlignCLI
    from lit_align.cli.explain import program

    with tempfile.TemporaryDirectory() as scratch:
        cli = AlignCLI([*args, f"--trainer.default_root_dir={scratch}"], run=False)
        trainer, module, data = cli.trainer, cli.model, cli.datamodule
        given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        acting = [callback for callback in given if isinstance(callback, ReferenceRefresh | FSDPSharding)]
        drift = [callback for callback in given if isinstance(callback, Drift)]
        others: list[Callback] = [callback for callback in given if isinstance(callback, WinRate | Predictions)]
        trainer.loggers = [MetricsCSV(scratch)]
        trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps = BATCHES, 0, 0
        epochs, asked, sampled = trainer.max_epochs, None, 0
        if isinstance(data, OnPolicyPairs):
            together = max(1, data.sampling_batch_size // data.responses_per_prompt)
            sampled = min(max(together, BATCHES * data.batch_size * trainer.world_size), 4 * together)
            asked = data.prompts_per_round
            sampled = min(asked, sampled) if isinstance(asked, int) else sampled
        examination = Examination(others, scratch, sampled)
        trainer.callbacks = [*acting, Header(), examination, *drift]  # type: ignore[attr-defined]  # not timed
        trainer.fit_loop.max_epochs = 1
        trainer.fit(module, datamodule=data)
        if not trainer.is_global_zero:
            return
        rows = read_metrics(f"{scratch}/metrics.csv")
    lines = estimate(trainer, data, examination.seconds, rows, epochs, asked, examination.sampled)
    print_line()
    for name, text in lines:
        print_field(name, text)
    print_line(f"\nall of it works: {program()} fit {shlex.join(args)}")


def show_example(batch: PreferenceBatch, tokenizer: Any) -> None:
    """The first example of a batch, decoded from its tokens: what is trained on is green, what is only read is dim."""
    prompt = tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]].tolist())
    print_line(Text("  one example: read, not trained on", style="dim"))
    print_line(Text(f"    {prompt[-600:]}", style="dim"))
    for k in range(batch.response_ids.shape[1]):
        ids = batch.response_ids[0, k][batch.response_mask[0, k]].tolist()
        print_line(Text(f"  response {k}: {len(ids)} tokens, trained on"))
        print_line(Text(f"    {tokenizer.decode(ids)}", style="green"))


def estimate(
    trainer: Trainer,
    data: Any,
    seconds: float,
    rows: list[dict[str, float]],
    epochs: int | None,
    asked: Any,
    sampled: int,
) -> list[tuple[str, str]]:
    """Steps, time and memory of the whole run, from what was measured.

    Args:
        seconds: Of one training batch.
        rows: What was logged; of a round, how long sampling and scoring took and how many pairs it gave.
        epochs: trainer.max_epochs.
        asked: data.prompts_per_round, where there are rounds.
        sampled: Prompts of the round that was measured.
    """
    lines = []
    if isinstance(data, OnPolicyPairs):
        shares = {"all": data.prompt_count, "chunk": math.ceil(data.prompt_count / (epochs or 1))}
        prompts = asked if isinstance(asked, int) else shares[str(asked)]
        made = next(row for row in rows if "round/pairs" in row)
        batches = math.ceil(prompts * made["round/pairs"] / sampled / data.batch_size / trainer.world_size)
        parts = {"sample": made["round/seconds_sample"], "score": made["round/seconds_score"]}
        parts = {name: value * prompts / sampled for name, value in parts.items()} | {"train": batches * seconds}
        lines.append(("a round", f"{prompts} prompts, about {batches} batches of {data.batch_size} pairs and process"))
    else:
        batches = len(data.train_dataloader())
        parts = {"train": batches * seconds}
        lines.append(("an epoch", f"{batches} batches of {data.batch_size} examples and process"))
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    total = steps * epochs if epochs and epochs > 0 else 0
    total = min(total or trainer.max_steps, trainer.max_steps) if trainer.max_steps > 0 else total
    lines.append(("steps", f"{steps} in each, {total or 'no end'} in all; {seconds:.2f} s for a batch"))
    each = sum(parts.values())
    listed = " + ".join(f"{_time(value)} {name}" for name, value in parts.items())
    whole = f"; about {_time(each * total / steps)} in all, without verdicts" if total else ""
    lines.append(("time", f"{_time(each)} = {listed}{whole}"))
    if torch.cuda.is_available():
        lines.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on this GPU in these batches"))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        lines.append(("peak memory", f"{peak / 1e9:.2f} GB of this process in these batches"))
    return lines


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
