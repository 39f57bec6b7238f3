"""Reads a run's folder: run.json, metrics.csv, summary.json, held_out/*.parquet and config.yaml, where they exist."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lit_align.errors import UserError
from lit_align.evaluation.rows import HeldOutRow, read_held_out
from lit_align.evaluation.summary import TRAINING, ScorerSummary, Summary
from lit_align.reporting.metrics_csv import read_metrics
from lit_align.reporting.run_record import RunRecord


@dataclass(frozen=True)
class Run:
    """A run's folder. A part that the run has not written is empty or None."""

    folder: Path
    name: str

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder / "metrics.csv")

    @cached_property
    def record(self) -> RunRecord | None:
        return RunRecord.read(self.folder)

    @cached_property
    def summary(self) -> Summary | None:
        return Summary.read(self.folder)

    @cached_property
    def held_out(self) -> list[HeldOutRow]:
        """One row per prompt of the verdict."""
        return read_held_out(verdict_file(self.folder))

    @cached_property
    def validations(self) -> dict[int, list[HeldOutRow]]:
        """One row per prompt of each validation, by optimizer step."""
        return {step_of(path): read_held_out(path) for path in held_out_files(self.folder)}

    @property
    def configuration(self) -> str:
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def scorers(self) -> dict[str, ScorerSummary]:
        """The summary of each scorer by name; empty without a verdict."""
        return self.summary.scorers if self.summary else {}

    def points(self, *names: str) -> list[tuple[float, ...]]:
        """The logged rows that have all of these metrics."""
        return [tuple(row[name] for name in names) for row in self.metrics if all(name in row for name in names)]

    def marks(self) -> dict[str, tuple[str, list[float]]]:
        """Steps at which rounds begin and the reference is refreshed, with their colours."""
        counts = self.points("step", "reference/refreshes")
        before = [0.0, *(count for _, count in counts)]
        refreshes = [step for (step, count), last in zip(counts, before, strict=False) if count > last]
        rounds = [row["step"] for row in self.metrics if row.get("round", 0) > 0]
        return {"reference refreshed": ("tab:red", refreshes), "new round": ("0.75", rounds)}


def open_runs(folders: Sequence[str | Path]) -> list[Run]:
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not any((path / name).exists() for name in ("metrics.csv", "summary.json", "run.json")) and not _is_run(
            path
        ):
            raise UserError(
                f"{path}: not a run's folder; it has no metrics.csv, summary.json or run.json. Name the "
                "trainer.default_root_dir of a run."
            )
    short = [path.resolve().name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return [Run(path, name) for path, name in zip(paths, names, strict=True)]


FILES = (
    "checkpoints",
    "config*.yaml",
    "curves.png",
    "held_out",
    "hpc_ckpt_*.ckpt",
    "metrics.csv",
    "model",
    "plots",
    "reference",
    "report.html",
    "rounds",
    "run.json",
    "summary.json",
)
"""Patterns of the files that commands write into a run's folder."""


def run_files(folder: str | Path) -> list[Path]:
    """The files and folders of the run in a folder, which may hold others, too."""
    return sorted(path for pattern in FILES for path in Path(folder).glob(pattern))


def run_of(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint is in: the nearest above it with a configuration that a run wrote."""
    return next((folder for folder in Path(checkpoint).absolute().parents if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    config = folder / "config.yaml"
    return config.is_file() and ((folder / "run.json").exists() or config.read_bytes().startswith(b"# lit_align=="))


def verdict_file(folder: str | Path) -> Path:
    """The rows of the verdict, the evaluation at the end."""
    return Path(folder, "held_out", "test.parquet")


def validation_file(folder: str | Path, step: int) -> Path:
    """The rows of the validation at an optimizer step."""
    return Path(folder, "held_out", f"validation-{step:06d}.parquet")


def held_out_files(folder: str | Path) -> list[Path]:
    """The rows of all validations, in the order of their steps."""
    return sorted(Path(folder, "held_out").glob("validation-*.parquet"), key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step of one of `held_out_files`."""
    return int(path.stem.rpartition("-")[2])


def metric_of(name: str, scorer: str) -> str:
    """The name of a metric as logged for a scorer."""
    return name if scorer == TRAINING else f"{name}_{scorer}"
