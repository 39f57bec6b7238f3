"""Sides that take turns: each runs its real training loop in its own process and waits before every step.

So all sides meet the same machine under the same load, and each has its own peak of memory. A step is measured in CPU
seconds, which other programs disturb little, and in wall-clock seconds. Ratios are medians over turns.

All sides keep freed memory, as our command line does (`lit_align/allocation.py`); LIT_ALIGN_KEEP_MEMORY=0 measures them
without.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from lit_align.allocation import SWITCH, keep_freed_memory


class Turn:
    """One side's connection: `begin` waits for the side's turn, `end` reports the time of the step."""

    def __init__(self, line: Connection):
        self.line = line
        self.began: tuple[float, float] | None = None

    def begin(self) -> None:
        if self.began is None:
            self.line.send("ready")
            self.line.recv()
            self.began = time.process_time(), time.perf_counter()

    def end(self) -> None:
        assert self.began is not None
        cpu, wall = self.began
        self.line.send((time.process_time() - cpu, time.perf_counter() - wall))
        self.began = None


@dataclass
class Side:
    """The measured steps of a side."""

    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # resident memory of its process, imports and model included

    @property
    def cpu(self) -> float:
        return median(self.cpu_seconds)

    @property
    def peak(self) -> float:
        """In 10⁹ bytes."""
        return self.peak_bytes / 1e9


def ratio(side: Side, other: Side, what: str = "cpu_seconds") -> float:
    """Median over turns of one side's time divided by the other's."""
    return median(a / b for a, b in zip(getattr(side, what), getattr(other, what), strict=True))


def take_turns(
    sides: dict[str, Callable[[Turn], Any]],
    turns: int,
    *,
    warmup: int = 1,
    threads: int = 1,
    environments: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[Side]:
    """Run every side for `warmup + turns` steps, taking turns step by step; the warm-up does not count.

    Args:
        sides: Picklable functions by name; each runs that many steps with a `Turn` around each step.
        threads: Number of torch threads of every side.
        environments: Environment variables of a side's process alone, by the side's name.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it warns about the locks of progress bars
    context = multiprocessing.get_context("spawn")
    processes, lines, results = [], [], [Side() for _ in sides]
    for name, side in sides.items():
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_run, args=(side, theirs, threads), daemon=True))
        with _environment(environments.get(name, {})):
            processes[-1].start()
        theirs.close()
        lines.append(ours)
    try:
        for name, line in zip(sides, lines, strict=True):
            _hear(name, line)
        for turn in range(warmup + turns):
            for name, line, result in zip(sides, lines, results, strict=True):
                line.send("go")
                cpu, wall = _hear(name, line)
                if turn >= warmup:
                    result.cpu_seconds.append(cpu)
                    result.wall_seconds.append(wall)
                last = _hear(name, line)  # "ready", or at the end the peak of memory
                result.peak_bytes = last if isinstance(last, int) else 0
    finally:
        for process in processes:
            process.kill()  # a side that waits for its turn ignores SIGTERM
    return results


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within this context, new processes have these environment variables."""
    before = {**os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(side: Callable[[Turn], Any], line: Connection, threads: int) -> None:
    keep_freed_memory()
    import torch

    torch.set_num_threads(threads)
    with quiet():
        side(Turn(line))
    line.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence everything except errors."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _hear(name: str, line: Connection) -> Any:
    try:
        return line.recv()
    except EOFError:
        raise RuntimeError(f"{name} ended before its last step; see its message above.") from None


def words(tokenizer: Any, count: int, seed: int) -> str:
    """Random text of about `count` tokens: words of one token each."""
    import random

    entries = tokenizer.get_vocab()
    whole = sorted(entry for entry in entries if re.fullmatch(r"Ġ[a-z]{3,}", entry))
    letters = sorted(entry for entry in entries if re.fullmatch(r"[a-z]", entry))
    return "".join(random.Random(seed).choices(whole or letters, k=count)).replace("Ġ", " ")


def write(out: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write the measurements as JSON, with the machine, the commit and the packages."""
    packages = {name: version(name) for name in ("torch", "transformers", "lightning", "trl")}
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "keeps freed memory": os.environ.get(SWITCH) != "0",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    content = {"about": about, "commit": commit, "machine": machine, "packages": packages, "rows": rows}
    out.write_text(json.dumps(content, indent=1))
    print(f"{machine['processor']}, commit {commit}; written to {out}")


def processor() -> str:
    """The CPU's name and model where Linux gives them, and its units for bfloat16; otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    entries = dict(re.findall(r"^(model name|model|flags)\s*: (.*)", text, re.MULTILINE))
    if "model name" not in entries:
        return platform.processor() or platform.machine()
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in entries.get("flags", "").split()]
    return ", ".join([entries["model name"], f"model {entries['model']}", *(units[:1] or ["no bfloat16 units"])])


def weight_type() -> Any:
    """The type of the weights on all sides: bfloat16, or float32 on CPUs that multiply bfloat16 slowly."""
    import torch

    from lit_align.dtypes import fast_dtype

    return fast_dtype(torch.bfloat16)


def as_row(**sides: Side) -> dict[str, Any]:
    return {name: asdict(side) for name, side in sides.items()}
