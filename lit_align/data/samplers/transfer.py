"""Weights from a training process to the workers of an engine, one at a time: by NCCL from a GPU, by gloo from a CPU.

The training process is rank 0 of a process group that lasts for one transfer. Its TCP store gives the receivers each
weight's header; the weight itself is a broadcast. A side that dies ends the other side's call with an error.
"""

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing in its __all__

from lit_align.dtypes import dtype_name

TIMEOUT = timedelta(minutes=5)
"""How long either side waits for the other to send or receive one weight."""
ENDED = "null"
ABORTED = "false"


@dataclass(frozen=True)
class Transfer:
    """All that a receiver needs to join; plain values, since it travels as JSON."""

    host: str
    port: int
    processes: int  # the sender and all receivers
    backend: str  # nccl or gloo


class Sender:
    """The training process's side of a transfer.

    Args:
        host: Address of this machine as the receivers reach it.
        receivers: How many there are.
        device: Where the weights are.
    """

    def __init__(self, host: str, receivers: int, device: torch.device):
        self.device = device
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.transfer = Transfer(host, self._store.port, 1 + receivers, backend)

    def send(self, weights: Iterable[tuple[str, Tensor]], check: Callable[[], object]) -> None:
        """Send all weights, once every receiver has joined.

        Args:
            check: Called while it waits for the receivers; raises if they will not come.
        """
        numbers = itertools.count()
        try:
            while not self._store.check([f"receiver {rank}" for rank in range(1, self.transfer.processes)]):
                check()
                time.sleep(0.01)
            group = _join(self._store, self.transfer, 0, self.transfer.host)
            for name, weight in weights:
                header = {"name": name, "shape": list(weight.shape), "dtype": dtype_name(weight.dtype)}
                self._store.set(str(next(numbers)), json.dumps(header))
                _broadcast(group, weight.to(self.device).contiguous())
            self._store.set(str(next(numbers)), ENDED)
        except BaseException:
            self._store.set(str(next(numbers)), ABORTED)
            raise


def receive(transfer: Transfer, rank: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The weights that a `Sender` sends, each valid until the next is asked for.

    Args:
        rank: This receiver's, from 1.
        device: Where the weights are received.

    Raises:
        RuntimeError: the sender has failed or died.
    """
    store = TCPStore(transfer.host, transfer.port, is_master=False, timeout=TIMEOUT)
    store.set(f"receiver {rank}", "")
    group = _join(store, transfer, rank, address_towards(transfer.host, transfer.port))
    for number in itertools.count():
        header = json.loads(store.get(str(number)))
        if header is None:
            return
        if header is False:
            raise RuntimeError("the sender of the weights has failed")
        weight = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]), device=device)
        _broadcast(group, weight)
        yield header["name"], weight


def address_towards(host: str, port: int) -> str:
    """The address of this machine as another one sees it."""
    with socket.create_connection((host, port), timeout=10) as connection:
        return connection.getsockname()[0]


def _join(store: TCPStore, transfer: Transfer, rank: int, address: str) -> Any:
    """A group of its own, beside the process's default group if it has one."""
    if transfer.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, transfer.processes, options)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs have another name
    options._timeout = TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, transfer.processes, options)


def _broadcast(group: Any, weight: Tensor) -> None:
    """Rank 0's weight, in place."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([weight], options).wait()
