"""Runs `quantized/` in a process of its own: peft imports bitsandbytes at its start, or never."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONAL = Path(sys.prefix, "optional")  # where `make install` puts what costs every start a second


@pytest.mark.skipif(not OPTIONAL.is_dir(), reason="bitsandbytes is not installed; `make install` does it")
def test_quantized_weights_in_a_process_with_bitsandbytes():
    path = os.pathsep.join([str(HERE.parent), str(OPTIONAL), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(HERE / "quantized"),
        ],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
