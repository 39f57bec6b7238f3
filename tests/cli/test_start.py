"""A start imports only what its command needs."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_align import __version__
from lit_align.cli import main
from lit_align.cli.app import AlignCLI
from lit_align.cli.usage import top_level_help

HEAVY = {"torch", "lightning", "transformers", "wandb", "matplotlib", "datasets", "scipy", "sympy", "sklearn", "peft"}


def imported(steps: dict[str, str], folder: Path) -> dict[str, set[str]]:
    """The heavy modules that one new process has after each step, by the step's name."""
    lines = ["import sys"]
    for name, code in steps.items():
        lines += ["try:", f"    {code}", "except SystemExit:", "    pass"]
        lines += [f"print('\\nafter', {name!r}, sorted({HEAVY} & {{*sys.modules}}), sep='\\t')"]
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    reports = [line.split("\t") for line in run.stdout.splitlines() if line.startswith("after\t")]
    found = {name: set(ast.literal_eval(modules)) for _, name, modules in reports}
    assert found.keys() == steps.keys()
    return found


def test_nothing_heavy_is_imported_by_light_commands(tmp_path):
    steps = {
        "import": "import lit_align",
        "help": "from lit_align.cli import main; main(['--help'])",
        "a look at rounds": "main(['rounds', 'show', 'none'])",
    }
    assert imported(steps, tmp_path) == {name: set() for name in steps}


def test_modules_import_no_tool_that_only_some_runs_use(tmp_path):
    steps = {
        "app": "import lit_align.cli.app, lit_align.objectives, lit_align.callbacks",
        "without signal": "assert 'scipy.signal' not in sys.modules",
        "with signal": "import scipy.signal as signal; signal.convolve",  # the real one, not the stub of a fast start
    }
    found = imported(steps, tmp_path)
    assert found["app"] & {"wandb", "datasets", "sklearn"} == set()
    assert "torch" in found["app"]
    assert "scipy" in found["with signal"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.split()[-1] == __version__


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_light_help_is_the_parsers_own(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        AlignCLI(["--help"])
    assert top_level_help() == capsys.readouterr().out


def test_a_reader_that_has_ended_is_no_error(tmp_path):
    """As in `lit-align --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from lit_align.cli import main; main(['--help'])"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")
