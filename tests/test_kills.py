"""Killed with SIGKILL at random moments and run again by the same command, a run leaves the files of the whole run."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from processes import die_at, endings, fork, patch_calls
from safetensors.torch import load_file
from tiny import write_pairs, write_prompts

from lit_align.cli import main
from lit_align.reporting.metrics_csv import read_metrics
from lit_align.reporting.run_record import RunRecord

# Where a process may die: before or after the n-th of all these calls.
EVENTS = (
    ("os", "replace"),
    ("os", "symlink"),
    ("torch", "save"),
    ("pathlib", "Path.unlink"),
    ("pyarrow.parquet", "write_table"),
    ("torch.optim", "SGD.step"),
    ("lit_align.data.samplers.generate", "sample_responses"),
    ("lit_align.data.scorers.base", "score"),
    ("lit_align.data.rounds.recorder", "record_logps"),
    ("lit_align.evaluation.held_out", "Evaluator.evaluate"),
    ("lit_align.reporting.metrics_csv", "MetricsCSV.log_metrics"),
    ("lit_align.callbacks", "Drift.on_train_batch_end"),
    ("lit_align.callbacks", "ReferenceRefresh.on_train_batch_end"),
    ("lit_align.callbacks", "RunReport.on_train_epoch_end"),
)
EVERY = {
    "model.policy.path": "model",
    "model.policy.dtype": "float32",
    "model.optimizer": "torch.optim.SGD",
    "model.optimizer.lr": 0.005,
    "model.optimizer.momentum": 0.9,
    "model.warmup_steps": 2,
    "data.batch_size": 2,
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": False,
}
OFFLINE = {"data": "OfflinePairs", "data.train": "pairs.jsonl", "data.validation": "pairs.jsonl"}
ROUNDS = {
    "data": "OnPolicyPairs",
    "data.prompts": "prompts.jsonl",
    "data.scorer": "FunctionScorer",
    "data.scorer.function": "rewards.py:reward",
    "data.prompts_per_round": 6,
    "data.sampling_batch_size": 8,
    "data.sampling.max_new_tokens": 4,
    "trainer.max_epochs": 3,
    "drift.prompts": 2,
    "win_rate": "WinRate",
    "win_rate.prompts": "few.jsonl",
    "win_rate.validation": "few.jsonl",
    "win_rate.scorer": "FunctionScorer",
    "win_rate.scorer.function": "rewards.py:reward",
    "win_rate.responses_per_prompt": 1,
}
STEPS = "checkpoint.every_n_train_steps"
REFRESH = {"reference_refresh": "ReferenceRefresh", "reference_refresh.alpha": 0.7, "reference_refresh.tau": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "offline, each epoch": OFFLINE | REFRESH | {"model": "DPO", "trainer.max_epochs": 2},
    "offline, accumulated": OFFLINE
    | {"model": "DPO", STEPS: 2, "trainer.accumulate_grad_batches": 3, "trainer.max_epochs": 3},
    "offline, max_steps": OFFLINE
    | {"model": "SimPO", STEPS: 3, "trainer.max_steps": 9, "trainer.max_epochs": -1, "trainer.val_check_interval": 2},
    "rounds, each round": ROUNDS | REFRESH | {"model": "DPO"},
    "rounds, LoRA and λ": ROUNDS
    | REFRESH
    | {"model": "DPO", STEPS: 1, "model.lora.r": 1, "model.lora.dropout": 0.2}
    | {"model.proximal": 0.1, "model.proximal_target": 0.05},
    "rounds, new optimizers": ROUNDS
    | {
        "model": "IPO",
        "model.optimizer.lr": 0.001,
        STEPS: 2,
        "model.reset_optimizer_each_round": True,
        "trainer.accumulate_grad_batches": 2,
    },
    "rounds, KTO": ROUNDS | REFRESH | {"model": "KTO", STEPS: 2, "reference_refresh.unit": "round"},
    "rounds, recorded": ROUNDS | {"model": "EXO", STEPS: 3, "model.reference.form": "recorded"},
}


def fit(folder: Path, options: dict[str, Any]) -> None:
    os.chdir(folder)
    main(["fit", *(f"--{key}={value}" for key, value in (EVERY | options).items())])


def count_events(run: Callable[[], None]) -> int:
    """The number of events of a run."""
    total = multiprocessing.get_context("fork").Value("i", 0)

    def counted() -> None:
        def count() -> None:
            total.value += 1

        patch_calls(EVENTS, count)
        run()

    assert fork(counted) == 0
    return total.value


def at_event(place: int, act: Callable[[], None]) -> None:
    """Let this process act at one of its run's events."""
    passed = 0

    def count() -> None:
        nonlocal passed
        passed += 1
        if passed == place:
            act()

    patch_calls(EVENTS, count)


def dying_at(place: int, run: Callable[[], None]) -> Callable[[], None]:
    """The run, killed at one of its events."""

    def doomed() -> None:
        at_event(place, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run()

    return doomed


def plain(value: Any) -> Any:
    """A checkpoint's contents without measured times and starts, and without what Lightning keeps for itself.

    Its counters are written again from our position, and its paths depend on what was deleted when.
    """
    if isinstance(value, dict):
        without = ("loops", "starts")
        kept = {key: inner for key, inner in value.items() if key not in without and "seconds" not in str(key)}
        return {key: plain(inner) for key, inner in kept.items() if "ModelCheckpoint" not in str(key)}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_minute" not in k} for row in rows]


def artefacts(run: Path) -> dict[str, Any]:
    """Every file that a run leaves, without measured times."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name.startswith(".") or path.name in ("last.ckpt", "run.lock"):  # half written; a link; of a killed run
            continue
        if path.suffix == ".ckpt":
            found[name] = plain(torch.load(path, weights_only=True, map_location="cpu"))
        elif path.name == "metrics.csv":
            found[name] = untimed(read_metrics(path))
        elif path.suffix in (".json", ".yaml", ".safetensors", ".parquet") and path.name != "run.json":
            found[name] = path.read_bytes()
        elif path.is_file():
            found[name] = True  # pictures, the report, hashes: that they are there
    return found


def is_finished(folder: Path) -> bool:
    """Whether the run is recorded as finished: it may have been killed after that, and `fit` then refuses it."""
    record = RunRecord.read(folder / "run")
    return record is not None and bool(record.ended)


@pytest.fixture
def prepared(tiny_model: str, tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder with data in which a run starts."""

    def prepare(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model").symlink_to(tiny_model)
        write_pairs(folder, 9)
        write_prompts(folder)
        (folder / "few.jsonl").write_text('{"prompt": "Say"}\n{"prompt": "Tell"}\n')
        return folder

    return prepare


def on_full_disk(place: int, run: Callable[[], None]) -> tuple[int | None, str]:
    """Exit code of a run on a disk that is full from one of its events on, and what it prints as errors."""
    read, write = os.pipe()  # a pipe takes what a full disk does not

    def doomed() -> None:
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(write, "w", buffering=1)  # noqa: SIM115
        at_event(place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)))
        run()

    code = fork(doomed)
    os.close(write)
    with os.fdopen(read) as printed:
        return code, printed.read()


def ended_and_continued(
    prepared: Callable[[str], Path],
    whole: Path,
    options: dict[str, Any],
    end: Callable[[Callable[[], None], float], int | None],
    expected_code: int,
    times: int,
    each: int = 2,
) -> None:
    """End runs early, and compare what they leave in the end.

    Args:
        whole: Folder of the run that was not ended.
        end: Ends a run at a moment, from 0 to 1, and gives its exit code.
        expected_code: Of a run that was ended.
        times: How often runs are ended, all together.
        each: How often one run is ended, at most.
    """
    expected = artefacts(whole / "run")
    chance, done, attempt = random.Random(repr(options)), 0, 0
    while done < times:
        attempt += 1
        folder, moments = prepared(f"cut{attempt}"), []
        run = partial(fit, folder, options)
        while not is_finished(folder) and len(moments) < each:
            moments.append(chance.random())
            code = end(run, moments[-1])
            assert code in (expected_code, 0), moments
            done += code != 0
        if not is_finished(folder):
            assert fork(run) == 0, moments
        left = artefacts(folder / "run")
        more = left.keys() - expected.keys()  # of a checkpoint that was to be deleted when its successor was written
        assert all(name.startswith("checkpoints/") for name in more), (moments, more)
        assert [name for name in expected if left.get(name) != expected[name]] == [], moments
        shutil.rmtree(folder)


def killed_and_continued(prepared: Callable[[str], Path], options: dict[str, Any], times: int, each: int) -> None:
    """Kill runs before or after one of their events, and compare what they leave in the end."""
    whole = prepared("whole")
    total = count_events(lambda: fit(whole, options))

    def kill(run: Callable[[], None], moment: float) -> int | None:
        return fork(dying_at(1 + int(moment * total), run))

    ended_and_continued(prepared, whole, options, kill, -signal.SIGKILL, times, each)


@pytest.mark.parametrize("variant", ["offline, accumulated", "rounds, KTO"])
def test_a_killed_run_leaves_the_files_of_the_whole(prepared, monkeypatch, variant):
    """As below, on short runs; more kills within one process are in tests/test_position.py."""
    monkeypatch.setattr("lit_align.callbacks.run_report.plot_curves", lambda folder: None)
    light = {"trainer.max_epochs": 2, "drift.prompts": 1}
    light |= {"win_rate.validation": "null"} if variant.startswith("rounds") else {"drift.sampling.max_new_tokens": 2}
    killed_and_continued(prepared, VARIANTS[variant] | light, times=5, each=1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_a_run_leaves_the_files_of_the_whole(prepared, blank_figures, variant):
    killed_and_continued(prepared, VARIANTS[variant], times=8, each=2)


SEVERAL = ["offline, each epoch", "rounds, LoRA and λ", "rounds, KTO"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", SEVERAL)
def test_killed_by_the_clock_a_run_leaves_the_files_of_the_whole(prepared, blank_figures, variant):
    options, whole = VARIANTS[variant], prepared("whole")
    began = time.monotonic()
    assert fork(partial(fit, whole, options)) == 0
    seconds = time.monotonic() - began

    def kill(run: Callable[[], None], moment: float) -> int | None:
        try:
            return fork(run, moment * seconds)
        except TimeoutError:
            return -signal.SIGKILL

    ended_and_continued(prepared, whole, options, kill, -signal.SIGKILL, times=8)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SEVERAL)
def test_a_full_disk_at_any_write_is_one_message_and_resumes(prepared, blank_figures, variant):
    options, whole = VARIANTS[variant], prepared("whole")
    total = count_events(lambda: fit(whole, options))

    def fill(run: Callable[[], None], moment: float) -> int | None:
        code, said = on_full_disk(1 + int(moment * total), run)
        assert code == 0 or said.splitlines()[-1].startswith("error: "), said
        return code

    ended_and_continued(prepared, whole, options, fill, 2, times=8)


def values(run: Path) -> dict[str, Any]:
    """The content of every file that a run leaves, by names without digests of weights."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = re.sub(r"-[0-9a-f]{8}\b", "", str(path.relative_to(run)))
        if path.name.startswith(".") or path.is_dir() or path.name == "run.lock":
            continue
        if path.name == "metrics.csv":
            found[name] = untimed(read_metrics(path))
        elif path.name in ("summary.json", "round.json"):
            found[name] = json.loads(path.read_text()) | {"policy": "its digest"}
        elif path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pylist()
        elif path.suffix == ".safetensors":
            found[name] = {weight: value.flatten().tolist() for weight, value in load_file(path).items()}
        else:
            found[name] = True  # the number of processes is in some
    return found


def close(some: Any, other: Any) -> bool:
    """Whether two values are equal but for the rounding of sums in another order."""
    if isinstance(some, dict) and isinstance(other, dict):
        return some.keys() == other.keys() and all(close(some[key], other[key]) for key in some)
    if isinstance(some, list) and isinstance(other, list):
        return len(some) == len(other) and all(map(close, some, other))
    if isinstance(some, float) and isinstance(other, float):
        return abs(some - other) < 1e-3 + 1e-3 * abs(some)
    return some == other


@pytest.mark.slow
@pytest.mark.parametrize("data", ["offline", "rounds"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_killed_run_continues_on_another_number_of_processes(prepared, blank_figures, data, first):
    """Killed on two processes and resumed on one, and the reverse: the whole run, but for the order of sums."""
    options = (OFFLINE if data == "offline" else ROUNDS) | REFRESH | {"model": "DPO", "trainer.max_epochs": 2}
    options |= {STEPS: 1} | ({"data.train": "pairs16.jsonl"} if data == "offline" else {"data.prompts_per_round": 8})

    def start(folder: Path, processes: int, step: int | None = None) -> list[int | None]:
        def run() -> None:
            if step and int(os.environ.get("RANK", 0)) == processes - 1:
                die_at("torch.optim", "SGD.step", step)
            several = {"trainer.strategy": "ddp", "trainer.devices": 2} if processes == 2 else {}
            fit(folder, options | several | {"data.batch_size": 4 // processes})

        return endings(processes, run)[0] if processes > 1 else [fork(run)]

    whole, cut = prepared("whole"), prepared("cut")
    for folder in (whole, cut):
        write_pairs(folder, 16)
        (folder / "pairs.jsonl").rename(folder / "pairs16.jsonl")
        write_pairs(folder, 8)
    assert start(whole, 1) == [0]
    assert start(cut, first, step=3) == ([1, -signal.SIGKILL] if first == 2 else [-signal.SIGKILL])
    assert set(start(cut, 3 - first)) == {0}
    expected, left = values(whole / "run"), values(cut / "run")
    assert left.keys() == expected.keys()
    assert [name for name in expected if not close(left[name], expected[name])] == []
