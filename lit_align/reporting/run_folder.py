"""A run's folder, read: metrics.csv, summary.json, held_out/*.parquet, config.yaml, as far as they are there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lit_align.errors import UserError
from lit_align.reporting.metrics_csv import read_metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as it is filled."""

    folder: Path
    name: str

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder / "metrics.csv")

    @cached_property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def held_out(self) -> list[Row]:
        """One row per prompt of the verdict at the end."""
        path = self.folder / "held_out" / "test.parquet"
        return pq.read_table(path).to_pylist() if path.exists() else []

    @cached_property
    def validations(self) -> dict[int, list[Row]]:
        """The same at each validation, by optimizer step."""
        return {step_of(path): pq.read_table(path).to_pylist() for path in held_out_files(self.folder)}

    @property
    def configuration(self) -> str:
        path = self.folder / "config.yaml"
        return path.read_text() if path.exists() else ""

    @property
    def judges(self) -> list[str]:
        """Names of the scorers in the summary; "" is the training scorer."""
        nested = [k for k, v in self.summary.items() if isinstance(v, dict) and k not in ("data", "forgetting")]
        return ["", *nested] if "win_rate" in self.summary else []

    def scored(self, judge: str) -> dict[str, float]:
        """The summary by one scorer."""
        return self.summary.get(judge, {}) if judge else self.summary

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


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / "metrics.csv").exists() and not (path / "summary.json").exists():
            raise UserError(f"{path}: no run's folder; there is neither metrics.csv nor summary.json in it.")
    short = [path.resolve().name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return [Run(path, name) for path, name in zip(paths, names, strict=True)]


def held_out_files(folder: str | Path) -> list[Path]:
    """What was answered during training, by step."""
    return sorted(Path(folder, "held_out").glob("validation-*.parquet"))


def step_of(path: Path) -> int:
    """The optimizer step of one of `held_out_files`."""
    return int(path.stem.rpartition("-")[2])


def of_judge(name: str, judge: str) -> str:
    """A metric's or column's name for one scorer."""
    return f"{name}_{judge}" if judge else name
