"""The line that a phase prints at its end, and texts that are printed unchanged."""

import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.table import Table
from rich.text import Text as Styled

from lit_align import console


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("/usr/bin/lit-align", "lit-align"),
        ("train.py", "python train.py"),
        ("/site/lit_align/__main__.py", "python -m lit_align"),
        ("/site/pytest/__main__.py", "python train.py"),
    ],
)
def test_messages_name_the_command_as_it_was_typed(monkeypatch, typed, shown):
    monkeypatch.setattr(sys, "argv", [typed, "fit"])
    assert console.program() == shown


def test_a_phase_reports_the_pace_of_its_own_work(monkeypatch, capsys):
    """40 of 100 were done before; 60 in 30 s are 120 a minute."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with console.phase("sample", 100, "prompts (40 stored before)", done=40) as running:
        running.advance(60)
        now[0] += 30
    with console.phase("score", 100, "prompts") as running:
        running.advance(100)
        now[0] += 0.01
    with console.phase("train", 1, "batches") as running:
        running.advance()
        now[0] += 100
    first, second, slow = capsys.readouterr().out.splitlines()
    assert first == "  sample          100/100 prompts (40 stored before) · 30.0 s · 120 a minute"
    assert second == "  score           100/100 prompts · 0.0 s"
    assert slow == "  train           1/1 batches · 100.0 s · 0.6 a minute"


def test_the_text_of_a_field_keeps_its_column_on_a_terminal(monkeypatch):
    terminal = console.SafeConsole(file=StringIO(), force_terminal=True, width=40, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    console.print_field("pair", "30 pairs from 32 prompts; 1 tied; taken out: 6 repeated")
    console.print_field("", "loss 0.5")
    assert terminal.file.getvalue().splitlines() == [
        "  pair            30 pairs from 32",
        "                  prompts; 1 tied; taken",
        "                  out: 6 repeated",
        "                  loss 0.5",
    ]


def test_text_that_looks_like_markup_is_shown_unchanged(capsys):
    text = "[INST] hello [/INST] [b]bold[/b] :smile:"
    console.print_line(text)
    console.print_field("prompt", text)
    with console.phase("[b]", 1, text) as running:
        running.advance(note=text)
    assert capsys.readouterr().out.count(text) == 4


class Output:
    """A notebook's output, as `IPython.display.display` returns it; keeps what it shows."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> "Output":
        self.update(data, raw)
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.shown.append(data["text/plain"])


def test_a_notebook_shows_a_bar_that_one_line_replaces(monkeypatch, capsys):
    now, output = [0.0], Output()
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", output)
    with console.phase("sample", 4, "prompts") as running:
        for seconds in (0.6, 0.1, 0.6):
            now[0] += seconds
            running.advance(note="[b] 1\x1b[2J")
    assert output.shown == [
        "  sample          ──────────────── 0/4",
        "  sample          ━━━━──────────── 1/4  [b] 1�[2J",
        "  sample          ━━━━━━━━━━━━──── 3/4  [b] 1�[2J",
        "  sample          3/4 prompts · 1.3 s · 138 a minute · [b] 1�[2J",
    ]
    assert capsys.readouterr().out == ""


ESCAPES = "\x1b[31mred \x9b2J \x1b]0;title\x07 \u202egnirts"


def test_no_escape_reaches_the_terminal(capsys):
    """From lines, fields, tables, progress bars and errors."""
    table = Table(title=ESCAPES)
    table.add_column(ESCAPES)
    table.add_row(Styled(ESCAPES, style="bold"))
    console.print_line(ESCAPES, Styled(ESCAPES))
    console.print_line(table)
    console.print_field(ESCAPES, ESCAPES)
    with console.phase(ESCAPES, 1, ESCAPES) as running:
        running.advance(note=ESCAPES)
    printed = capsys.readouterr().out + console.paragraph(f"error: {ESCAPES}")
    assert printed.count("red") >= 10
    assert not console.CONTROLS.search(printed)


def test_no_escape_of_a_note_reaches_a_progress_bar(monkeypatch):
    """On a terminal; the bar's own movements of the cursor are left."""
    terminal = console.SafeConsole(file=StringIO(), force_terminal=True, width=200, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    with console.phase("sample", 2, "prompts") as running:
        running.advance(note=ESCAPES)
    written = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "red" in written
    assert "\x1b[31mred" not in written
    assert "\x9b" not in written
    assert "]0;title\x07" not in written


def test_styled_text_in_a_file_keeps_its_lines(capsys):
    words = "long " * 50 + "end"
    console.print_line(Styled(words))
    assert capsys.readouterr().out == f"{words}\n"


def test_a_command_can_be_copied(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-align"])
    assert console.command("report", "runs/my run") == "lit-align report 'runs/my run'"
