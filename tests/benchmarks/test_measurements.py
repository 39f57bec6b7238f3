"""The measurements run, on a tiny model: both sides take their turns, and the table and the JSON say what they took."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="the peer that is measured against; `make install` has it")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(tiny_model, in_tmp, monkeypatch):
    """Runs one of the programs; gives its rows, which must be those of its JSON."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))

    def run(name: str, *options: str) -> list[dict[str, Any]]:
        program = importlib.import_module(name)
        rows = program.main([f"--model={tiny_model}", "--out=out.json", "--repeats=2", *options])
        assert json.loads(Path("out.json").read_text())["rows"] == rows
        return rows

    yield run
    for name in ("turns", "step", "round", "refresh", "proximal", "floor", "flops", "allocation", "commits"):
        sys.modules.pop(name, None)


def assert_measured(*sides: dict[str, Any]) -> None:
    for side in sides:
        assert len(side["cpu_seconds"]) == len(side["wall_seconds"]) == 2
        assert min(side["cpu_seconds"]) > 0
        assert side["peak_bytes"] > 1e8


@pytest.mark.slow
def test_a_step_is_measured_against_trls(run, capsys):
    (row,) = run("step", "--lengths=hh", "--weights=full", "--references=recorded", "--responses=2")
    assert_measured(row["ours"], row["theirs"])
    assert " TRL" in capsys.readouterr().out


def test_the_rate_of_products_is_shown_by_type(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    try:
        importlib.import_module("products").main(["--repeats=1"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["float32", "bfloat16", "float16"]
    assert lines[2].endswith("fast")


def test_a_step_has_a_floor_and_parts(run):
    (row,) = run("floor", "--lengths=hh", "--batch=2")
    assert 0 < row["floor"] < row["step"]
    assert sum(row["parts"].values()) == pytest.approx(1)
    assert min(row["parts"].values()) > 0


@pytest.mark.slow
def test_a_step_of_groups_is_measured_against_one_row_for_each_response(run):
    (row,) = run("step", "--lengths=hh", "--weights=lora", "--references=live", "--responses=4")
    assert row["rival"] == "one row per response"
    assert_measured(row["ours"], row["theirs"])


@pytest.mark.slow
def test_a_round_is_measured_against_trls(run):
    (row,) = run("round", "--prompts=2", "--prompt-tokens=5", "--tokens=3")
    assert_measured(row["ours"], row["default"], row["best"])


@pytest.mark.slow
def test_refreshes_are_measured_against_a_step(run):
    (row,) = run("refresh", "--dtypes=bfloat16", "--lengths=hh")
    assert_measured(row["step"], row["soft"], row["hard"])


@pytest.mark.slow
def test_steps_are_measured_with_freed_memory_kept_and_not(run):
    (row,) = run("allocation", "--lengths=hh", "--sides", "plain", "kept", "huge", "huge_kept")
    assert_measured(row["plain"], row["kept"], row["huge"], row["huge_kept"])


@pytest.mark.slow
def test_two_commits_are_compared(run):
    (row,) = run("commits", str(FOLDER.parent), "--cases=examples")
    assert_measured(row["before"], row["now"])


@pytest.mark.slow
def test_the_proximal_step_is_measured_against_the_plain_one(run):
    (row,) = run("proximal", "--lengths=hh")
    assert_measured(row["iterative"], row["proximal"])


@pytest.mark.slow
def test_reading_of_pairs_is_measured_against_trls_and_the_tokenizers(tiny_model, in_tmp, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}:{FOLDER}")
    program = importlib.import_module("data")
    (row,) = program.main(["--pairs", "16", f"--model={tiny_model}", "--out=out.json"])
    assert row.keys() == {"pairs", "tokenizer", "first", "second", "two", "trl"}
    assert min(row[side]["seconds"] for side in program.SIDES) > 0
    assert min(row[side]["peak_bytes"] for side in program.SIDES) > 1e8
    sys.modules.pop("data", None)
