"""`metrics.csv`: every logged value of a run, beside any other logger, across resumes."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_align.console import print_line, relative
from lit_align.errors import UserError, amount, counted, first_line, shown
from lit_align.files import write_whole


class MetricsCSV(Logger):
    """One row per logging call, one column per metric, in `FOLDER/metrics.csv`.

    A fresh run drops the rows of an earlier run in the folder. A resumed run keeps those that its checkpoint counts,
    and logs all others again (`resume`). Lightning gives the epoch with some rows.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._unsaved = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.append({"step": step or 0} | {name: float(value) for name, value in metrics.items()})
        self._unsaved += 1
        if self._unsaved >= 20:
            self.save()

    def state(self, pending: dict[str, Any] | None) -> dict[str, Any]:
        """State for a checkpoint: the number of rows so far, and the row that follows them.

        Args:
            pending: Metrics of the step that the checkpoint ends, which Lightning logs once the checkpoint is written.
        """
        return {"rows": len(self._rows), "pending": pending}

    @rank_zero_only
    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the rows of a checkpoint."""
        count = counted("rows", state["rows"])
        rows = read_metrics(self.path)[:count]
        if len(rows) < count:
            print_line(
                f"{relative(self.path)} has {len(rows)} of the {amount(count, 'rows')} that the checkpoint counts; the "
                "curves lack the others"
            )
        self._rows = [*rows, *filter(None, [_checked(state["pending"])])]

    @rank_zero_only
    def save(self) -> None:
        if not self._rows:
            return
        names = list(dict.fromkeys(name for row in self._rows for name in row))

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows({name: _written(value) for name, value in row.items()} for row in self._rows)

        write_whole(self.path, write)
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _checked(pending: Any) -> dict[str, float] | None:
    """The pending row of a checkpoint. A metric may be infinite or not a number, as it may in a run.

    Raises:
        TypeError: names an entry that no run writes.
    """
    if pending is None:
        return None
    if not isinstance(pending, dict):
        raise TypeError(f"pending is {shown(pending)}")
    for name, value in pending.items():
        if not isinstance(name, str) or type(value) not in (int, float):
            raise TypeError(f"pending.{shown(name)} is {shown(value)}")
    for name in ("step", "epoch"):
        counted(f"pending.{name}", pending[name])
    return {name: float(value) for name, value in pending.items()}


def _written(value: float) -> str:
    """Integers without a fraction: 8, whether 8 or 8.0 was logged."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with its values; none if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    if not Path(path).exists():
        return []
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{relative(path)} is damaged ({first_line(error)}). Restore it, or delete it: the report then has no "
            "curves of the steps so far."
        ) from error
    return rows
