"""Real process groups on this machine: a function runs in each of several forked processes."""

import contextlib
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch import Callback
from lightning_utilities.core.rank_zero import rank_zero_only
from tiny import fit

from lit_align.callbacks import FSDPSharding
from lit_align.sharding import full_tensor, reshard

Weights = dict[str, torch.Tensor]


def run_in(processes: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` in each process; returns results by rank. Lightning finds its group in the environment.

    Forked, so that torch and transformers are loaded once; what is returned must be picklable, tensors included.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, processes, port, Path(folder, str(rank)), function, args))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout)
        hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
        outcomes = [torch.load(path, weights_only=False) for path in sorted(Path(folder).iterdir())]
    for rank, _, error in outcomes:
        if error:
            raise RuntimeError(f"process {rank}:\n{error}")
    if hung:
        raise TimeoutError(f"processes {hung} did not end within {timeout} s")
    return [value for _, value, _ in outcomes]


def endings(processes: int, function: Callable[[], Any], timeout: float = 180) -> tuple[list[int | None], str]:
    """Call `function()` in each process; returns exit codes by rank, None for one that stays, and all of stderr."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    with tempfile.NamedTemporaryFile() as printed:

        def work(rank: int) -> None:
            os.dup2(os.open(printed.name, os.O_WRONLY | os.O_APPEND), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            join(rank, processes, port)
            function()

        workers = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
        return codes, Path(printed.name).read_text()


_places = itertools.count(977 * os.getpid())


def free_port() -> int:
    """A port that no other test takes meanwhile: the system assigns ports from 32768 on."""
    for place in _places:
        port = 10000 + place % 20000
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("localhost", port))
            return port
    raise AssertionError


def processes_of(strategy: Any) -> int:
    """Number of processes that the tests give a strategy."""
    return 1 if strategy == "auto" else 2


def train(module: LightningModule, data: Any, *callbacks: Callback, strategy: Any = "auto", **options: Any) -> Weights:
    """Fit under a strategy, in each of its processes; returns full weights. `fsdp2` adds a missing `FSDPSharding`."""
    if strategy == "fsdp2" and not any(isinstance(callback, FSDPSharding) for callback in callbacks):
        callbacks = (FSDPSharding(), *callbacks)
    fit(module, data, *callbacks, strategy=strategy, devices=processes_of(strategy), **options)
    reshard(module)
    return {name: full_tensor(weight.detach()).clone() for name, weight in module.named_parameters()}


def farthest(some: Weights, other: Weights) -> float:
    """The largest difference between two runs' weights."""
    assert some.keys() == other.keys()
    return max((some[name] - other[name]).abs().max().item() for name in some)


def fork(function: Callable[[], Any], timeout: float = 300) -> int | None:
    """Exit code of a process that runs a function; the negative signal, if one killed it.

    Raises:
        TimeoutError: it does not end in time.
    """
    worker = multiprocessing.get_context("fork").Process(target=function)
    worker.start()
    worker.join(timeout)
    if worker.is_alive():
        worker.kill()
        worker.join()
        raise TimeoutError(f"the process did not end within {timeout} s")
    return worker.exitcode


def give_up_privileges() -> None:
    """Let the permissions of files apply to this process even if it is root's."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the sets that follow, and this process
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


def die_at(where: str, what: str, call: int, signum: int = signal.SIGKILL) -> None:
    """Have the process killed (or stopped) when `what` is called for the nth time, once it is under way."""
    act_at(where, what, call, lambda: os.kill(os.getpid(), signum))


def act_at(where: str, what: str, call: int, act: Callable[[], object]) -> None:
    """Have something done when `what` is called for the nth time, before it begins."""
    owner, name = owner_of(where, what)
    original, calls = getattr(owner, name), 0

    def acting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, acting)


def owner_of(where: str, what: str) -> tuple[Any, str]:
    """The module or class that has an attribute, and the attribute's name.

    Args:
        where: The module.
        what: The attribute's path in the module: function, or Class.method.
    """
    *path, name = what.split(".")
    owner: Any = importlib.import_module(where)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def patch_calls(functions: Iterable[tuple[str, str]], called: Callable[[], None]) -> None:
    """Have `called` called before and after each call of some functions, in this process."""
    for owner, name in itertools.starmap(owner_of, functions):
        setattr(owner, name, _noticed(getattr(owner, name), called))


def _noticed(function: Callable[..., Any], called: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noticed(*args: Any, **kwargs: Any) -> Any:
        called()
        result = function(*args, **kwargs)
        called()
        return result

    return noticed


def _work(
    rank: int, processes: int, port: int, path: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    join(rank, processes, port)
    try:
        outcome = (rank, function(*args), None)
    except BaseException:
        outcome = (rank, None, traceback.format_exc())
    torch.save(outcome, path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(rank: int, processes: int, port: int) -> None:
    """Make this process one of several, as Lightning finds them in the environment."""
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",  # by it Lightning knows that the processes are there
    }
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    torch.set_num_threads(1)
