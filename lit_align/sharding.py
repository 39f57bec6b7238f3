"""Weights that lie in shards (FSDP2): how they are read, gathered and put back. Without shards all of it does nothing.

After a forward pass FSDP2 leaves a root's own weights unsharded, and weights that are written then are lost at the
next reshard, silently. Whatever reads or writes weights calls `reshard` first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def shards(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module that are gathered one at a time."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Free gathered weights, so that parameters are their shards."""
    for part in shards(module):
        part.reshard()


def whole(weight: Tensor) -> Tensor:
    """A weight in full; every process must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
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
