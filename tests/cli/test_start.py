"""A start imports only what its command needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from lit_align.cli.app import AlignCLI
from lit_align.cli.usage import top_level_help

HEAVY = {"torch", "lightning", "transformers", "wandb", "matplotlib", "datasets", "scipy", "sympy", "sklearn", "peft"}


def imported(code: str, folder: Path) -> set[str]:
    """The heavy modules that a new process has after `code`."""
    report = f"import sys\ntry:\n    {code}\nfinally:\n    print('\\n', *{HEAVY} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, cwd=folder)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import lit_align", "from lit_align.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported(code, tmp_path):
    assert imported(code, tmp_path) == set()


def test_a_look_at_rounds_imports_nothing_heavy(tmp_path):
    assert imported("from lit_align.cli import main; main(['rounds', 'show', 'none'])", tmp_path) == set()


@pytest.mark.parametrize("module", ["lit_align.objectives", "lit_align.callbacks", "lit_align.cli.app"])
def test_modules_import_no_tool_that_only_some_runs_use(module, tmp_path):
    assert imported(f"import {module}", tmp_path) & {"wandb", "datasets", "sklearn"} == set()


def test_scipy_signal_is_the_real_one_after_a_start(tmp_path):
    check = "import lit_align.cli.app; assert 'scipy.signal' not in sys.modules; import scipy.signal as s; s.convolve"
    assert "scipy" in imported(check + "; print('real')", tmp_path)


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_light_help_is_the_parsers_own(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        AlignCLI(["--help"])
    assert top_level_help() == capsys.readouterr().out
