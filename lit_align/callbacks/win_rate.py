"""When held-out prompts are evaluated: during training, at its end, and by `python train.py test`.

The evaluation and its metrics are in `evaluation/held_out.py`.
"""

import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_align.callbacks.base import AlignCallback
from lit_align.console import print_field
from lit_align.data.base import data_module_of
from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Rows
from lit_align.data.given_rows import reading_rows
from lit_align.data.sampling import Sampling
from lit_align.data.scorers.base import SCORER_FIXES, Scorer
from lit_align.errors import UserError, check_number, decimal
from lit_align.evaluation.answering import check_batches, sampling_of
from lit_align.evaluation.held_out import Evaluator
from lit_align.evaluation.results import Evaluation, check_judge_names
from lit_align.evaluation.rows import write_held_out
from lit_align.evaluation.summary import TRAINING
from lit_align.files import digest, repr_in_pieces
from lit_align.objectives import PreferenceObjective
from lit_align.provenance import EVALUATION, Table
from lit_align.reporting.run_folder import held_out_files, step_of, validation_file, verdict_file
from lit_align.reporting.terminal import print_evaluation


class WinRate(AlignCallback):
    """Win rate against the start on held-out prompts, every so many rounds, at the end, and by `python train.py test`.

    The result at the end (the verdict) is printed and written to `summary.json` in the run's folder; by prompt, to
    `held_out/`.

    Args:
        prompts: Held-out prompts for the end of training: a file, a saved data set or a hub name.
        scorer: Gives rewards; usually the scorer that training uses.
        judges: Further scorers by name, which training never uses.
        validation: Other held-out prompts, evaluated during training.
        every: Rounds (or steps) between these evaluations.
        unit: Unit of `every`; a round is an epoch.
        own_responses: Compare with the responses that the files hold beside their prompts, too; of a preference, with
            the better one.
        forgetting: Held-out texts by name; their negative log-likelihood before and after is reported at the end.
        responses_per_prompt: n, sampled from the policy and from the start.
        best_of: The verdict also gives the best of 2, 4, … up to this many of the start's responses, selected by
            `scorer`; null takes `responses_per_prompt`, without additional samples.
        sampling: How responses are sampled; None takes the data module's options.
        columns: Source of each column of the prompts' files, as in data.columns.
        ignore_columns: Columns of these files that are left out, as in data.ignore_columns.
        batch_size: Responses sampled at once.
        shown: Number of prompts that are printed with a response before and after.
        seed: Seed of the random streams, which training never uses.
    """

    option_name = "win_rate"
    argument_fixes = SCORER_FIXES
    argument_conversions = reading_rows("prompts", "validation")

    def __init__(
        self,
        prompts: str,
        scorer: Scorer,
        *,
        judges: dict[str, Scorer] | None = None,
        validation: str | None = None,
        every: int = 1,
        unit: Literal["round", "step"] = "round",
        own_responses: bool = False,
        forgetting: dict[str, str] | None = None,
        responses_per_prompt: int = 4,
        best_of: int | None = None,
        sampling: Sampling | None = None,
        columns: dict[str, str] | None = None,
        ignore_columns: list[str] | None = None,
        batch_size: int = 128,
        shown: int = 5,
        seed: int = 0,
    ):
        check_batches("win_rate", responses_per_prompt, batch_size)
        if best_of is not None and best_of < max(2, responses_per_prompt):
            raise UserError(
                f"win_rate.best_of={best_of} must be at least 2, and at least responses_per_prompt="
                f"{responses_per_prompt}. Raise it, or leave it out."
            )
        if every < 1:
            raise UserError(f"win_rate.every={every} must be at least 1 {unit}. Raise it.")
        if validation is None and (every, unit) != (1, "round"):
            raise UserError(
                f"win_rate.every={every} {unit}s has no effect without win_rate.validation. Set it, or leave `every` "
                "and `unit` out."
            )
        check_number("win_rate.shown", shown, least=0)
        check_number("win_rate.seed", seed, least=0)
        check_judge_names(list(judges or {}))
        self.prompts = prompts
        self.validation = validation
        self.scorers = {TRAINING: scorer} | (judges or {})
        self.every = every
        self.unit = unit
        self.own_responses = own_responses
        self.forgetting = forgetting or {}
        self.responses_per_prompt = responses_per_prompt
        self.best_of = best_of
        self.sampling = sampling
        self.columns = columns
        self.ignore_columns = ignore_columns
        self.batch_size = batch_size
        self.shown = shown
        self.seed = seed
        self.evaluation: Evaluation | None = None
        self._evaluator: Evaluator | None = None
        self._last_step = 0
        self._identity: Table = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PreferenceObjective):
            raise UserError(
                "win_rate samples from the policy of a lit_align objective. Train one, or leave the callback out."
            )
        evaluator = Evaluator(
            pl_module,
            self.scorers,
            responses_per_prompt=self.responses_per_prompt,
            sampling=self.sampling or sampling_of(trainer),
            columns=self.columns,
            ignore_columns=self.ignore_columns or (),
            batch_size=self.batch_size,
            own_responses=self.own_responses,
            best_of=self.best_of or self.responses_per_prompt,
            seed=self.seed,
        )
        read = {"prompts": evaluator.read_prompts(self.prompts)}  # a missing file is reported now, not after hours
        if self.validation is not None:
            read["validation"] = evaluator.read_prompts(self.validation)
        for name, path in self.forgetting.items():
            read[f"forgetting.{name}"] = read_rows(path, kind="texts")
        self._identity = {f"{EVALUATION}{name}": _digest(rows) for name, rows in read.items()}
        self._evaluator = evaluator

    def identity(self) -> Table:
        """Everything that is read for evaluations, and who judges; a resumed run must have the same."""
        names = {name: "scorer" if name == TRAINING else f"judges.{name}" for name in self.scorers}
        return self._identity | {f"{EVALUATION}{names[name]}": each.identity for name, each in self.scorers.items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report prompts that cannot be answered before training, too."""
        assert self._evaluator is not None
        data = data_module_of(trainer)
        for option, path, name in (("validation", self.validation, "held-out"), ("prompts", self.prompts, "test")):
            if path is None:
                continue
            self._evaluator.check_prompts(path, name)
            if _is_trained_on(path, data):
                print_field("caution", f"win_rate.{option}={path} is trained on, so these prompts are not held out")
        for path in self.forgetting.values():
            self._evaluator.check_texts(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete results left by an earlier run in the folder, or written after the checkpoint."""
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for path in held_out_files(trainer.default_root_dir):
                if step_of(path) > trainer.global_step:
                    path.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every == 0 and trainer.global_step > self._last_step
        if self.unit == "step" and due:
            self._validate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.unit == "round" and (trainer.current_epoch + 1) % self.every == 0:
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._conclude(trainer)

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate the validation prompts, log the metrics and keep the rows."""
        if self.validation is None:
            return
        self._last_step = trainer.global_step
        started = time.monotonic()
        assert self._evaluator is not None
        evaluation = self._evaluator.evaluate(self.validation, "held-out")
        metrics = evaluation.metrics() | {"seconds": time.monotonic() - started}
        named = {f"val/{key}": value for key, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
        # also for callbacks that monitor a metric: checkpoints, early stopping
        module.log_dict(named, logger=False, sync_dist=True)
        if trainer.is_global_zero:
            write_held_out(validation_file(trainer.default_root_dir, trainer.global_step), evaluation.rows())
        kl = f"KL from start {metrics['kl_from_start']:z.2f} nats"
        print_field("", f"reward {decimal(metrics['reward'])}, win rate {metrics['win_rate']:.1%}, {kl}")

    def _conclude(self, trainer: Trainer) -> None:
        """Evaluate the test prompts; write and print the verdict."""
        assert self._evaluator is not None
        self.evaluation = self._evaluator.evaluate(self.prompts, "test", texts=self.forgetting, best_of_n=True)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_held_out(verdict_file(folder), self.evaluation.rows())
            self.evaluation.summary.write(folder)
            print_evaluation(self.evaluation, self.shown)


def _is_trained_on(path: str, data: object) -> bool:
    """Whether the prompts of a file or a data set are those that a data module trains on."""
    for name in ("prompts", "train"):
        given = getattr(data, name, None)
        if isinstance(given, str) and getattr(data, f"{name}_split", None) is None:
            exist = Path(given).exists() and Path(path).exists()
            if given == path or (exist and Path(given).samefile(path)):
                return True
    return False


def _digest(rows: Rows) -> str:
    """Identifies the prompts and responses of a file, in their order."""
    return digest(repr_in_pieces((row.prompt, row.responses) for row in rows))
