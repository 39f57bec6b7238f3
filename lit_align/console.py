"""Lines and progress bars on the terminal, one bar per phase. Only rank 0 prints."""

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own; without all of Lightning
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment

FIELD_WIDTH = 15
"""Columns of the names that fields begin with."""


def is_first_process() -> bool:
    """Whether this process has rank 0; without Lightning there is only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that control a terminal, reorder its text, or cannot be encoded; not the line break and the tab."""


def printable(text: str) -> str:
    """The text with � for each character that must not reach a terminal: models, data and servers may send any."""
    return CONTROLS.sub("�", text)


class SafeConsole(Console):
    """A console that prints � for characters that must not reach a terminal, in tables and progress bars, too."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


# Brackets in texts of models, data and paths are printed as they are.
console = SafeConsole(highlight=False, markup=False, emoji=False)


def print_line(*objects: object) -> None:
    """Print lines or rich renderables; long lines are left to the terminal, so that commands can be copied."""
    if is_first_process():
        console.print(*objects, soft_wrap=all(isinstance(o, str) for o in objects))


def print_field(name: str, text: str) -> None:
    """Print one field of the run's log: its name, then its text."""
    print_line(f"  {name:<{FIELD_WIDTH}} {text}")


def paragraph(text: str) -> str:
    """Wrap a message for stderr: between words on a terminal; elsewhere it stays one line, which can be searched."""
    text = printable(text)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())
    return text + "\n"


def program() -> str:
    """The command as the user typed it."""
    return "lit-align" if Path(sys.argv[0]).stem == "lit-align" else "python train.py"


def relative(path: object) -> str:
    """A path as the user would type it: relative within the working directory."""
    absolute = Path(str(path)).absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)


class Phase:
    """A named part of a run: a progress bar while it works (on a terminal), and one line with its pace at the end.

    Args:
        name: Such as "sample".
        total: Number of units of work.
        unit: Name of the units, in the plural.
        done: Units that an interrupted run finished before.
    """

    running: ClassVar[list["Phase"]] = []
    """The phases that have not ended, the innermost last."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        self.name, self.total, self.unit = name, total, unit
        self.done = self.before = done
        self.note = ""
        self.started = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn(f"{name:<{FIELD_WIDTH}}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not is_first_process() or not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, note="")
        self._bar.start()
        self.running.append(self)

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` units as done; `note` is shown after the bar."""
        self.done += by
        self.note = note or self.note
        self._bar.update(self._task, advance=by, note=self.note)

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()
        self.running.remove(self)

    def finish(self, note: str = "") -> None:
        """Replace the bar by one line."""
        self.stop()
        seconds = time.monotonic() - self.started
        pace = f" · {60 * (self.done - self.before) / seconds:.0f} a minute" if seconds >= 0.1 else ""
        after = f" · {note or self.note}" if note or self.note else ""
        print_field(self.name, f"{self.done}/{self.total} {self.unit} · {seconds:.1f} s{pace}{after}")


@contextmanager
def phase(name: str, total: int, unit: str, done: int = 0) -> Iterator[Phase]:
    """A `Phase` for a `with` block, which removes the bar on errors too."""
    running = Phase(name, total, unit, done)
    try:
        yield running
    except BaseException:
        running.stop()
        raise
    running.finish()
