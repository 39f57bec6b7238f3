"""The modules in a real Jupyter kernel: bars, the report in a cell, and the tutorial."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
in_a_kernel = pytest.mark.skipif(
    not all(map(find_spec, ("nbclient", "nbformat", "ipykernel"))), reason="needs the extra `notebook`"
)


def execute(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The outputs of each code cell, after a run in a kernel of its own."""
    import nbclient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=1800, startup_timeout=300, resources=resources).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list[Any]) -> list[str]:
    """What outputs show as text."""
    return [each.text if each.output_type == "stream" else each.data["text/plain"] for each in outputs]


BARS = """
import time
from lit_align.console import phase, print_field
with phase("sample", 3, "prompts") as running:
    for _ in range(3):
        time.sleep(0.3)
        running.advance(note="[b] one \\x1b[31m")
print_field("policy", "[b] the model")
"""
REPORT = """
from lit_align.reporting.notebook import report
report("run")
"""


@in_a_kernel
def test_a_kernel_shows_bars_lines_and_the_report(tmp_path, monkeypatch):
    import nbformat

    shutil.copytree(ROOT / "tests" / "fixtures" / "run_0_1" / "run", tmp_path / "run")
    cells = [nbformat.v4.new_code_cell(source) for source in (BARS, REPORT)]
    bars, report = execute(nbformat.v4.new_notebook(cells=cells), tmp_path, monkeypatch)
    bar, line = texts(bars)
    assert bar.startswith("  sample          3/3 prompts · ")
    assert line == "  policy          [b] the model\n"
    assert not any("\x1b" in text for text in texts(bars))
    *others, shown = report  # tqdm may ask for ipywidgets
    assert all(output.get("name") == "stderr" for output in others), "a figure of its own"
    assert shown.data["text/html"].startswith("<iframe sandbox srcdoc='<!doctype html>")
    assert (tmp_path / "run" / "report.html").exists()


def test_the_tutorial_is_small_and_holds_the_outputs_of_a_run():
    assert TUTORIAL.stat().st_size < 200_000
    code = [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    shown = json.dumps(outputs)
    assert not re.search(r"/(home|tmp|root|work|Users)/", shown)
    assert "step-0 check" in shown
    assert "<iframe" in shown


@in_a_kernel
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data/quickstart/model").exists(), reason="`make install` prepares data/quickstart")
def test_the_tutorial_runs(tmp_path, monkeypatch):
    import nbformat

    notebook = nbformat.read(TUTORIAL, 4)
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert all(
        output.output_type != "error" for outputs in execute(notebook, tmp_path, monkeypatch) for output in outputs
    )
    assert (tmp_path / "runs" / "tutorial" / "report.html").exists()
