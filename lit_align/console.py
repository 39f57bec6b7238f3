"""Lines and progress bars on the terminal, one bar per phase. Only rank 0 prints."""

import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own; without all of Lightning
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

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

    @property
    def encoding(self) -> str:
        """That of the present output, by which rich chooses the lines of its tables."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


# Brackets in texts of models, data and paths are printed as they are, in notebooks too.
console = SafeConsole(highlight=False, markup=False, emoji=False, force_jupyter=False)


def print_line(*objects: object) -> None:
    """Print lines or rich renderables.

    Long lines are left to the terminal, so that commands can be copied; styled text is wrapped on a terminal alone.
    """
    if is_first_process():
        lines = str if console.is_terminal else str | Text
        console.print(*objects, soft_wrap=all(isinstance(o, lines) for o in objects))


def print_field(name: str, text: str) -> None:
    """Print one field of the run's log: its name, then its text."""
    print_line(_field(name, text))


def _field(name: str, text: str) -> str:
    """A field's line; on a terminal, further lines of the text begin below its first."""
    line = f"  {name:<{FIELD_WIDTH}} {text}"
    if not console.is_terminal:
        return line
    below = " " * (FIELD_WIDTH + 3)
    return textwrap.fill(line, console.width, subsequent_indent=below, break_on_hyphens=False)


def paragraph(text: str) -> str:
    """Wrap a message for stderr: between words on a terminal; elsewhere it stays one line, which can be searched."""
    text = printable(text)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines())
    return text + "\n"


def program() -> str:
    """The command as the user typed it."""
    typed = Path(sys.argv[0])
    if typed.stem == "lit-align":
        return "lit-align"
    return "python -m lit_align" if typed.parts[-2:] == ("lit_align", "__main__.py") else "python train.py"


def command(*words: object) -> str:
    """A command of this program, to be copied: quoted where a shell needs it."""
    return f"{program()} {shlex.join(map(str, words))}"


def relative(path: object) -> str:
    """A path as the user would type it: relative within the working directory."""
    absolute = Path(str(path)).absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)


class Bar(Protocol):
    """A progress bar, which one line replaces in the end."""

    def show(self, done: int, note: str) -> None: ...

    def stop(self, line: str = "") -> None:
        """Remove the bar; print the line, if there is one."""
        ...


class NoBar:
    """No bar: the output is a file, or this is not the first process."""

    def show(self, done: int, note: str) -> None:
        pass

    def stop(self, line: str = "") -> None:
        if line:
            print_line(line)


class TerminalBar(NoBar):
    """A bar on a terminal."""

    def __init__(self, name: str, total: int, done: int):
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn(f"{name:<{FIELD_WIDTH}}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, note="")
        self._bar.start()

    def show(self, done: int, note: str) -> None:
        self._bar.update(self._task, completed=done, note=note)

    def stop(self, line: str = "") -> None:
        self._bar.stop()
        super().stop(line)


class NotebookBar:
    """A bar in the output of a notebook's cell: text that is replaced at most twice a second."""

    def __init__(self, name: str, total: int, done: int):
        from IPython.display import display  # type: ignore[reportMissingImports]  # a notebook runs in it

        self.name, self.total = name, total
        self._shown_at = time.monotonic()
        self._output: Any = display(self._text(done, ""), raw=True, display_id=True)

    def show(self, done: int, note: str) -> None:
        if time.monotonic() - self._shown_at >= 0.5:
            self._shown_at = time.monotonic()
            self._output.update(self._text(done, note), raw=True)

    def stop(self, line: str = "") -> None:
        self._output.update({"text/plain": printable(line)}, raw=True)

    def _text(self, done: int, note: str) -> dict[str, str]:
        full = 16 * done // max(1, self.total)
        bar = "━" * full + "─" * (16 - full)
        return {"text/plain": printable(f"  {self.name:<{FIELD_WIDTH}} {bar} {done}/{self.total}  {note}".rstrip())}


def in_notebook() -> bool:
    """Whether the output is a notebook's cell."""
    interactive = sys.modules.get("IPython")
    return interactive is not None and hasattr(interactive.get_ipython(), "kernel")


def make_bar(name: str, total: int, done: int) -> Bar:
    """The bar for this process's output."""
    if not is_first_process():
        return NoBar()
    if in_notebook():
        return NotebookBar(name, total, done)
    return TerminalBar(name, total, done) if console.is_terminal else NoBar()


class Phase:
    """A named part of a run: a progress bar while it works (on a terminal, in a notebook), then one line with its pace.

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
        self._bar = make_bar(name, total, done)
        self.running.append(self)

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` units as done; `note` is shown after the bar."""
        self.done += by
        self.note = note or self.note
        self._bar.show(self.done, self.note)

    def stop(self, line: str = "") -> None:
        """Remove the bar, or replace it by a line."""
        self._bar.stop(line)
        self.running.remove(self)

    def finish(self) -> None:
        """Replace the bar by one line."""
        seconds = time.monotonic() - self.started
        pace = f" · {self._pace(seconds)} a minute" if seconds >= 0.1 else ""
        after = f" · {self.note}" if self.note else ""
        self.stop(_field(self.name, f"{self.done}/{self.total} {self.unit} · {seconds:.1f} s{pace}{after}"))

    def _pace(self, seconds: float) -> str:
        pace = 60 * (self.done - self.before) / seconds
        return f"{pace:.0f}" if pace >= 1 else f"{pace:.1f}"


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
