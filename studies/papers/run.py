"""Run the cells that have no result yet: `python -m studies.papers.run`, after `studies.papers.prepare`.

A cell is one `train.py fit` in a folder of its own, `runs/study/cells/NAME`, from one file of options. Its result goes
to the folder of results, and its own folder is deleted. A queue that was stopped or killed continues: a cell with a
result is not run again, and an unfinished one resumes from its checkpoint. A cell whose program fails twice has the
failure as its result.

The tuning cells run first. Then the counted cells run seed by seed, each arm with the configuration that its tuning
cells choose. All results name the commit, the preparation and the machine; those of one seed have the same, and a
checkout with changed files is refused.
"""

import argparse
import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import transformers
import yaml

from lit_align.reporting.run_folder import open_runs
from lit_align.reporting.run_record import RunRecord
from studies.papers.cells import (
    FIRST_SEEDS,
    SEEDS,
    TUNING_SEED,
    WORK,
    Cell,
    Setting,
    configuration,
    counted_cells,
    read_arms,
    settings,
    tuning_cells,
)
from studies.papers.prepare import digest, record, sample
from studies.papers.results import Result, chosen, identity, take, write_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRIES = 2
SPENT = "spent.txt"
"""File in a cell's folder with the CPU seconds of each of its programs, those of a stopped queue included."""


def commit_of(root: Path) -> str:
    """The checkout's commit.

    Raises:
        SystemExit: tracked files have changed.
    """
    git = ["git", "-C", str(root)]
    if changed := subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True):
        raise SystemExit(f"The checkout differs from its commit, which results could then not name:\n{changed}")
    return subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True).strip()


def check_blocks(results: Path, counted: Sequence[Cell], here: Mapping[str, str]) -> None:
    """Refuse to mix commits among counted results, and preparations or machines within a seed that is to be continued.

    Args:
        here: `commit`, `prepared` and `machine` of results that are made now.

    Raises:
        SystemExit: a result was made with another.
    """
    seeds: dict[int, list[Result | None]] = {}
    for cell in counted:
        seeds.setdefault(cell.seed, []).append(Result.read(results, cell.name))
    for seed, found in seeds.items():
        for result in filter(None, found):
            if result.commit != here["commit"]:
                raise SystemExit(
                    f"{results} holds counted results of commit {result.commit}, and this checkout is at "
                    f"{here['commit']}. Run there instead: git worktree add --detach ../study-cells {result.commit}"
                )
            other = [name for name in ("prepared", "machine") if getattr(result, name) != here[name]]
            if other and None in found:
                raise SystemExit(
                    f"seed {seed} was begun with other values of {' and '.join(other)} than now. Finish it there, or "
                    f"delete {results}/*-{seed}.* (not the tuning-* among them) to run the whole seed here."
                )


def machine() -> str:
    """The processor and the versions that decide a run's numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


class Process(Protocol):
    """A started program: what the queue needs of `subprocess.Popen`."""

    pid: int
    returncode: int | Any


Start = Callable[[Sequence[str], IO[str]], Process]


def start_program(options: Sequence[str], log: IO[str]) -> subprocess.Popen[bytes]:
    """Start `train.py` with its output in a file."""
    command = [sys.executable, "train.py", *options]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    """Let the kernel end this process when the queue is killed (Linux), so that no cell runs on without one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@dataclass
class Queue:
    """Runs cells and keeps their results.

    Args:
        folder: Folder of the results.
        work: Folder of the cells' own folders.
        here: `commit`, `prepared` and `machine`, named in each result.
        start: Starts the program with options and a file for its output.
    """

    folder: Path
    work: Path
    here: Mapping[str, str]
    start: Start = start_program
    stopped: bool = False
    running: set[int] = field(default_factory=set)

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that have no result."""
        return [cell for cell in cells if not (self.folder / f"{cell.name}.json").exists()]

    def run(self, cells: Sequence[Cell], configurations: Mapping[str, Setting], workers: int) -> None:
        """Run those of the cells that have no result."""
        missing = self.missing(cells)
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(lambda cell: self._run(cell, configurations), missing)
            for cell, result in zip(missing, results, strict=True):
                if result is not None:
                    how = f"failed: {result.failed}" if result.failed else f"{result.cpu_seconds:.0f} CPU seconds"
                    print(f"{time.strftime('%H:%M')} {cell.name}: {how}", flush=True)

    def stop(self, *_: object) -> None:
        """Let the running cells save and end, and start no other."""
        self.stopped = True
        for process in self.running:
            os.kill(process, signal.SIGTERM)

    def _run(self, cell: Cell, configurations: Mapping[str, Setting]) -> Result | None:
        """Run a cell to its end; None if the queue was stopped."""
        setting = configurations[cell.arm.name] if cell.trial is None else settings()[cell.trial]
        folder = self.work / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        options = configuration(cell, setting, str(folder))
        (folder / "cell.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        started, failed, spent = time.monotonic(), "", folder / SPENT
        spent.touch()
        for _ in range(TRIES):
            if self.stopped:
                return None
            if not has_ended(folder):
                code, cpu_seconds = self._fit(folder)
                with spent.open("a") as file:
                    file.write(f"{cpu_seconds}\n")
                failed = last_line(folder / "log.txt") or f"exit code {code}" if code else ""
            if not failed:
                break
        if self.stopped and failed:
            return None
        kept: dict[str, Any] = {"failed": failed}
        if not failed:
            kept, rows = take(open_runs([folder])[0], Path(cell.prompts))
            write_rows(self.folder, cell.name, rows)
        result = Result(
            **identity(cell, setting),
            **self.here,
            pairs="" if cell.pairs is None else digest(Path(cell.pairs)),
            seconds=time.monotonic() - started,
            cpu_seconds=sum(map(float, spent.read_text().split())),
            **kept,
        )
        result.write(self.folder, cell.name)
        shutil.rmtree(folder)
        return result

    def _fit(self, folder: Path) -> tuple[int, float]:
        """Start the program, or resume it: its exit code and its CPU seconds."""
        with (folder / "log.txt").open("a") as log:
            process = self.start(["fit", f"--config={folder / 'cell.yaml'}"], log)
            self.running.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            self.running.remove(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        return process.returncode, usage.ru_utime + usage.ru_stime


def has_ended(folder: Path) -> bool:
    """Whether the folder holds a finished run, whose result was not yet taken."""
    record = RunRecord.read(folder)
    return record is not None and bool(record.ended)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the cells that have no result yet.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1, help="cells that run at once")
    parser.add_argument(
        "--seeds", type=int, default=FIRST_SEEDS, choices=range(1, len(SEEDS) + 1), help="counted seeds"
    )
    args = parser.parse_args()
    args.results = args.results.absolute()
    os.chdir(ROOT)
    if not Path(WORK, "gold").exists():
        raise SystemExit(f"{WORK} is not prepared. Run: python -m studies.papers.prepare --results {args.results}")
    here = {"commit": commit_of(ROOT), "prepared": record(args.results), "machine": machine()}
    queue = Queue(args.results, Path(WORK, "cells"), here)
    arms = read_arms()
    tuning, counted = tuning_cells(arms), counted_cells(arms, args.seeds)
    check_blocks(args.results, counted, here)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, queue.stop)
    for seed in (TUNING_SEED, *SEEDS[: args.seeds]):
        cells = queue.missing([cell for cell in (*tuning, *counted) if cell.seed == seed])
        if cells and not queue.stopped:
            sample(seed)
            queue.run(cells, chosen(args.results, arms), args.workers)


if __name__ == "__main__":
    main()
