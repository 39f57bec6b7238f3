"""The GPU's program runs on a CPU with a tiny model, without the packages that a GPU machine may lack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
WITHOUT_PACKAGES = """
import runpy, sys
sys.modules.update(dict.fromkeys(["jsonargparse", "datasets", "wandb", "trl"]))  # their import fails
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


QUICK = "correctness steps trl forms refreshes sampling profile"


@pytest.mark.parametrize("parts", [QUICK, pytest.param(f"{QUICK} compiled", marks=pytest.mark.slow)])
def test_every_part_is_measured_on_a_tiny_model(tmp_path: Path, parts: str) -> None:
    out = tmp_path / "gpu.json"
    options = ["--tiny", "--repeats=1", f"--out={out}", "--parts", *parts.split()]
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(PROGRAM), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=PROGRAM.parents[1])
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {"correctness", "step", "form", "refresh", "sampling", "profile"}
    assert {row["form"] for row in rows if row["part"] == "step"} == {"rows", "ours"} | {"compiled"} & {*parts.split()}
    off = {(row["dtype"], row["attention"]): row["gradient"] for row in rows if row["part"] == "correctness"}
    assert off["float32", "lit_align_packed"] < 1e-5
    assert off["bfloat16", "lit_align_packed"] < 2 * off["bfloat16", "eager"]
    assert all(row["seconds"] > 0 for row in rows if row["part"] not in ("correctness", "profile"))
