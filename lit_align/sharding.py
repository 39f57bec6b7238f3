"""Several processes: weights that lie in shards (FSDP2), and waiting for one another. In one process nothing happens.

After a forward pass FSDP2 leaves a root's own weights unsharded, and weights that are written then are lost at the
next reshard, silently. Whatever reads or writes weights calls `reshard` first.
"""

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_align.errors import UserError


def shards(module: object) -> list[FSDPModule]:
    """The parts of a module that are gathered one at a time; none of what is no module."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)] if isinstance(module, nn.Module) else []


def reshard(module: nn.Module) -> None:
    """Free gathered weights, so that parameters are their shards."""
    for part in shards(module):
        part.reshard()


def whole(weight: Tensor) -> Tensor:
    """A weight in full; every process must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local(weight: Tensor) -> Tensor:
    """This process's shard of a weight, in place; the weight itself where there are no shards."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def write_rows(weight: Tensor, start: int, rows: Tensor) -> None:
    """weight[start : start + len(rows)] ← rows, each process what falls on its shard of rows."""
    shard, first = local(weight), 0
    if isinstance(weight, DTensor):
        first = -(-weight.shape[0] // weight.device_mesh.size()) * weight.device_mesh.get_local_rank()
    low, high = max(start, first), min(start + len(rows), first + len(shard))
    if low < high:
        shard[low - first : high - first] = rows[low - start : high - start]


@torch.no_grad()
def load_shards(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Take over whole weights, each process its share.

    Raises:
        KeyError: the module has no weight of that name.
    """
    reshard(module)
    ours = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, value in state_dict.items():
        if isinstance(ours[name], DTensor):
            write_rows(ours[name], 0, value)
        else:
            ours[name].copy_(value)


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all(what: str, minutes: float) -> None:
    """Go on when every process has come here.

    Raises:
        UserError: some have not, in that time; names them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        dist.monitored_barrier(_waiting_group(), timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as error:
        raise UserError(f"{what}: after {minutes:g} minutes a process has not come so far: {error}") from error


@functools.cache
def _waiting_group() -> dist.ProcessGroup:
    """Gloo alone can say who is missing."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def leave() -> None:
    """Say goodbye to the other processes; one that is not the first ends here, where it has nothing left to do.

    Gloo's threads let go of tensors a moment after they report them done, and need Python for it: when Python is shut
    down by then, the process aborts (pytorch#179291). The first has a report to write meanwhile, others have nothing.
    """
    if not dist.is_initialized():
        return
    first = rank() == 0
    dist.destroy_process_group()
    if not first:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def gathered(module: object) -> Iterator[None]:
    """Hold all weights in full meanwhile, so that each process can run the module by itself, as often as it likes.

    Every process must enter and leave. Costs a full copy of the weights in each.
    """
    parts = shards(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for number, part in enumerate(parts):
            part.set_reshard_after_forward(number > 0, recurse=False)  # the first is the root, which stays gathered
            part.reshard()
