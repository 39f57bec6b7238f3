"""The GPU's program runs on a CPU with a tiny model, without the packages that a GPU machine may lack."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
WITHOUT_PACKAGES = """
import runpy, sys
sys.modules.update(dict.fromkeys(["jsonargparse", "datasets", "wandb", "trl"]))  # their import fails
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_part_is_measured_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(PROGRAM), "--tiny", "--repeats=1", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True, cwd=PROGRAM.parents[1])
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {"correctness", "step", "form", "refresh", "sampling"}
    off = {(row["dtype"], row["attention"]): row["gradient"] for row in rows if row["part"] == "correctness"}
    assert off["float32", "lit_align_packed"] < 1e-5
    assert off["bfloat16", "lit_align_packed"] < 2 * off["bfloat16", "eager"]
    assert all(row["seconds"] > 0 for row in rows if row["part"] != "correctness")
