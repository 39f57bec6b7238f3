"""`run.json`: the facts in a run's header, when and how the run was started, and when it ended."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lit_align.files import read_versioned, write_versioned

VERSION = 1


@dataclass(frozen=True)
class RunStart:
    """One start of the run: the first, or a resume."""

    time: str  # UTC
    command: str
    step: int  # of the optimizer
    ckpt_path: str = ""  # as the command named it

    @classmethod
    def now(cls, step: int, ckpt_path: str = "") -> Self:
        program, *args = sys.argv
        if Path(program).name == "ipykernel_launcher.py":  # its arguments are the kernel's
            return cls(_now(), "a notebook", step, ckpt_path)
        name = ["python", "train.py"] if Path(program).name == "train.py" else [Path(program).name]
        return cls(_now(), shlex.join([*name, *args]), step, ckpt_path)


@dataclass(frozen=True)
class RunRecord:
    """The lines of a run's header, and its starts.

    Args:
        header: Name and text of each line; a line without a name continues the one before.
        ended: When the run was finished; empty before.
    """

    header: list[tuple[str, str]]
    starts: list[RunStart]
    ended: str = ""

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """The record in a run's folder; None if there is none.

        Raises:
            UserError: the file cannot be read.
        """
        return read_versioned(Path(folder, "run.json"), VERSION, cls._parse, "Delete the file.")

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Self:
        header = [(str(name), str(text)) for name, text in values["header"]]
        return cls(header, [RunStart(**start) for start in values["starts"]], str(values.get("ended", "")))

    def write(self, folder: str | Path) -> None:
        write_versioned(Path(folder, "run.json"), VERSION, asdict(self))


def record_start(folder: str | Path, header: Sequence[tuple[str, str]], start: RunStart, resumes: bool) -> int:
    """Write `run.json`; a resumed run adds its start to those of the run it continues. Gives their number."""
    before = RunRecord.read(folder) if resumes else None
    starts = [*(before.starts if before else []), start]
    RunRecord(list(header), starts).write(folder)
    return len(starts)


def record_end(folder: str | Path) -> None:
    """Write into `run.json` that the run is finished."""
    if record := RunRecord.read(folder):
        replace(record, ended=_now()).write(folder)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
