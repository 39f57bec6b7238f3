"""Several processes: sharded weights (FSDP2), and barriers. In a single process these functions do nothing.

After a forward pass FSDP2 leaves a root's own weights unsharded. Values written to them then are silently lost at the
next reshard, so all code that reads or writes weights calls `reshard` first.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_align.errors import UserError, amount, first_line

S = TypeVar("S")
T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)
BARRIERS = "lit_align: barriers"

_Types = tuple[torch.dtype, ...]
# The types that lazy weights still take, one after the other; None outside `lazy_weights`.
_later: ContextVar[dict[Tensor, _Types] | None] = ContextVar("later", default=None)


def fsdp_modules(module: object) -> list[FSDPModule]:
    """The parts of a module that FSDP2 gathers one at a time; none if it is not sharded, or not a module."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)] if isinstance(module, nn.Module) else []


def reshard(module: nn.Module) -> None:
    """Free gathered weights, so that parameters are their shards."""
    for part in fsdp_modules(module):
        part.reshard()


@contextmanager
def lazy_weights() -> Iterator[None]:
    """Within this context, build networks without memory of their own: weights are pages of their file.

    Copies share the weights that they copy, and no weight is converted before `settle`. For networks that are sharded
    part by part before the context ends, each part settled first, and for originals that are dropped.
    """
    token = _later.set({})
    try:
        yield
    finally:
        _later.reset(token)


def are_lazy() -> bool:
    """Whether the weights of new networks are."""
    return _later.get() is not None


def convert_later(weight: Tensor, *types: torch.dtype) -> None:
    """Convert a lazy weight to these types, one after the other, when it is settled."""
    later = _later.get()
    assert later is not None, "only within lazy_weights"
    if set(types) - {weight.dtype}:
        later[weight] = types


def _types_of(weight: Tensor) -> _Types:
    return (_later.get() or {}).get(weight, ())


def type_of(weight: Tensor) -> torch.dtype:
    """The type that a weight has, or will have when it is settled."""
    return (weight.dtype, *_types_of(weight))[-1]


def settled(weight: Tensor) -> Tensor:
    """A weight in the type that it has, or will have when it is settled."""
    value = weight
    for dtype in _types_of(weight):
        value = value.to(dtype)
    return value


@torch.no_grad()
def settle(network: nn.Module) -> None:
    """Convert the lazy weights of a network, in place."""
    for weight in _lazy(network):
        weight.data = settled(weight)
        (_later.get() or {}).pop(weight)


@contextmanager
def types_shown(network: nn.Module) -> Iterator[None]:
    """Within this context, a network's lazy weights have the type that they will have, and no values."""
    values = {weight: weight.data for weight in _lazy(network)}
    for weight in values:
        weight.data = torch.empty((), dtype=type_of(weight)).expand(weight.shape)
    try:
        yield
    finally:
        for weight, value in values.items():
            weight.data = value


def _lazy(network: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if _types_of(weight)]


class Beside:
    """Loads networks to compute beside the policy: on its device, or sharded like it.

    Attributes:
        shard: Shards a network in place, where networks are sharded.
    """

    shard: Callable[[nn.Module], None] | None = None

    @contextmanager
    def loaded(self, build: Callable[[], N], device: torch.device) -> Iterator[N]:
        """Within this context, the network that `build` loads; where networks are sharded, every process enters it."""
        with lazy_weights():
            network = build()
            if self.shard is not None:
                self.shard(network)
            else:
                settle(network)
        try:
            yield network.to(device) if self.shard is None else network
        finally:
            if self.shard is not None:  # circular references keep it until Python collects them
                for weight in network.parameters():
                    local_shard(weight).untyped_storage().resize_(0)


def frozen_copy(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A copy of a whole weight in that type; see `lazy_weights`. A collective: every process must call it."""
    whole = full_tensor(weight)
    if not are_lazy() or not isinstance(weight, nn.Parameter):
        return nn.Parameter(whole.to(dtype, copy=not are_lazy()), requires_grad=False)
    copied = nn.Parameter(whole, requires_grad=False)
    convert_later(copied, *_types_of(weight), dtype)
    return copied


def full_tensor(weight: Tensor) -> Tensor:
    """A whole weight. A collective: every process must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_shard(weight: Tensor) -> Tensor:
    """This process's shard of a weight, in place; the weight itself if it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def write_rows(weight: Tensor, start: int, rows: Tensor) -> None:
    """weight[start : start + len(rows)] ← rows, where each process writes the rows of its shard."""
    shard, first = local_shard(weight), 0
    if isinstance(weight, DTensor):
        first = -(-weight.shape[0] // weight.device_mesh.size()) * weight.device_mesh.get_local_rank()
    low, high = max(start, first), min(start + len(rows), first + len(shard))
    if low < high:
        shard[low - first : high - first] = rows[low - start : high - start]


@torch.no_grad()
def load_shards(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load whole weights; each process takes its shard.

    Raises:
        KeyError: the module lacks a weight of that name.
    """
    reshard(module)
    ours = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, value in state_dict.items():
        write_whole_weight(ours[name], value)


def write_whole_weight(weight: Tensor, value: Tensor) -> None:
    """weight ← value, a whole weight, of which each process writes its shard."""
    if isinstance(weight, DTensor):
        write_rows(weight, 0, value)
    else:
        weight.copy_(value)


def rank() -> int:
    """This process's rank; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier_with_timeout(what: str, minutes: float) -> None:
    """Wait until every process has called this.

    Raises:
        UserError: some processes have not, within that time, or have died; the message names them.
    """
    if world_size() == 1:
        return
    group, started = _barrier_group(), time.monotonic()
    try:
        dist.monitored_barrier(group, timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as error:
        waited = time.monotonic() - started >= 60 * minutes
        how = f"has not arrived within {amount(minutes, 'minutes')}" if waited else "has died"
        raise UserError(f"{what}: a process {how}: {first_line(error)}") from error


def on_first(function: Callable[[], T]) -> T:
    """Rank 0 calls the function; every process returns its result, or raises its `UserError`."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]  # result, error
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=waiting_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def first_with_all(items: Iterator[S], function: Callable[[Iterator[S]], T]) -> T:
    """Rank 0 calls the function with items that all processes make together, such as gathered weights.

    Every process reads all items, and returns the result or raises its `UserError`.
    """

    def call() -> T:
        try:
            return function(items)
        finally:
            drain(items)

    if rank() > 0:
        drain(items)
    return on_first(call)


def in_turns(items: Sequence[T], rank: int, world_size: int) -> Iterator[tuple[Sequence[T], T | None]]:
    """The items of each turn, one for each process, and this process's item; None if the last turn has none for it."""
    for start in range(0, len(items), world_size):
        turn = items[start : start + world_size]
        yield turn, turn[rank] if rank < len(turn) else None


def drain(items: Iterable[object]) -> None:
    """Read what is left: another process waits until it is read."""
    for _ in items:
        pass


def largest(value: int) -> int:
    """The largest of all processes' numbers. A collective: every process must call it."""
    if world_size() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=waiting_group())
    return int(number)


def of_all_processes(values: Sequence[T]) -> list[T]:
    """The values of all processes, in the order of their ranks. A collective: every process must call it."""
    if world_size() == 1:
        return list(values)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, list(values), group=waiting_group())
    return list(chain.from_iterable(found))


@functools.cache
def waiting_group() -> dist.ProcessGroup:
    """A group that waits on the CPU, for objects of Python."""
    return _gloo_group("lit_align: objects")


@functools.cache
def _barrier_group() -> dist.ProcessGroup:
    """A group for barriers alone: only gloo reports which processes are missing."""
    return _gloo_group(BARRIERS)


def _gloo_group(name: str) -> dist.ProcessGroup:
    """A group of all processes on the CPU.

    Raises:
        UserError: a process does not join it within the timeout of the other operations.
    """
    store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs lack some attributes
    timeout = store.timeout
    try:
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc=name)
    except RuntimeError as error:
        limit = amount(timeout.total_seconds() / 60, "minutes")
        raise UserError(
            f"a process has not joined within {limit} ({first_line(error)}). Look at its output, then start again."
        ) from error
    assert isinstance(group, dist.ProcessGroup)
    return group


def joined_operations() -> int:
    """Number of operations of all processes that this one has joined.

    Barriers are not counted: they report missing processes themselves, and take more operations on rank 0.
    """
    groups: list[Any] = [*dist.distributed_c10d._world.pg_map]  # a copy: another thread may make a group
    counted = (each for each in groups if each.size() == world_size() and each.group_desc != BARRIERS)
    return sum(each._get_sequence_number_for_group() for each in counted)


def destroy_process_group() -> None:
    """Destroy the process group; ranks other than 0 exit here.

    Gloo's threads release tensors shortly after they report them done, and need Python for it. If Python has shut down
    by then, the process aborts (pytorch#179291). Rank 0 writes a report in the meantime; the others have nothing to do.
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
def computing(network: object, on_shards: bool) -> Iterator[None]:
    """Within this context, a network can compute, by itself in each process or in all together.

    Args:
        on_shards: All processes compute at the same time, each part gathered when it is needed; no process then holds
            the whole network.
    """
    if not on_shards:
        with gathered(network):
            yield
        return
    yield
    if isinstance(network, nn.Module):
        reshard(network)


@contextmanager
def gathered(module: object) -> Iterator[None]:
    """Within this context, hold all weights in full, so that each process can run the module on its own.

    Every process must enter and leave. Within the context, each holds a full copy of the weights.
    """
    parts = fsdp_modules(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for number, part in enumerate(parts):
            part.set_reshard_after_forward(number > 0, recurse=False)  # the first is the root, which stays gathered
            part.reshard()
