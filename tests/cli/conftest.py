"""A folder to run commands in, and commands that must fail."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DPO_YAML, FIT, Errors

from lit_align.cli import main


@pytest.fixture
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with dpo.yaml and pairs.jsonl, in which `python train.py` runs."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    rows = [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{i}, or so"} for i in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("dpo.yaml").write_text(DPO_YAML)
    return in_tmp


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Errors:
    """Run a command that must fail with exit code 2, and return its one paragraph on stderr."""

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(list(args))
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1, "one paragraph"
        for noise in ("usage", "Traceback", "NoneType", "Namespace", "Union"):
            assert noise not in printed.err
        assert not printed.out
        return printed.err.strip()

    return run


@pytest.fixture
def fit(tiny_model: str) -> Callable[..., None]:
    return lambda *args: main([*FIT, f"--model.policy.path={tiny_model}", *args])
