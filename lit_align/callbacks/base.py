"""When a callback acts: its place among the others, and whether it acts in a dry run."""

from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint

from lit_align.arguments import CheckedArguments


class Order(IntEnum):
    """Places in each hook, first to last. Checkpoints come after all of them, as Lightning itself has it."""

    PROGRESS = -10
    """Progress bars, which others print below."""
    REFERENCE = -5
    """The rule by which the reference moves, before another callback builds the model."""
    DEFAULT = 0
    """Callbacks that change or evaluate the model, and those of other packages."""
    REPORT = 10
    """The run's report, which times the training."""
    MEASURE = 20
    """Measurements, which are not part of the training's time."""
    PUBLISH = 30
    """Uploads of what the others wrote."""
    LAST = 40
    """Callbacks that save the results of all others."""


class DryRun(Enum):
    """A callback's part in the dry run of `lit-align doctor`."""

    ACT = "act"
    """The same as in a run: it changes the time or the memory of the training."""
    CHECK = "check"
    """Its `setup` alone: it finds what it needs, or says what is missing."""
    SKIP = "skip"
    """Nothing: it writes files or takes over the terminal."""


class AlignCallback(Callback, metaclass=CheckedArguments):
    """A Lightning callback that states its place.

    `in_order` sorts by `order`; the command line and `Interruption` call it. In a Trainer without `Interruption`,
    callbacks act in the order in which they are given.
    """

    option_name: ClassVar[str] = ""
    """Top-level key of the command line, such as `reference_refresh`; empty for none."""
    order: ClassVar[int] = Order.DEFAULT
    in_dry_run: ClassVar[DryRun] = DryRun.CHECK


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sort callbacks by their `order`; equal ones keep their sequence."""

    def place(callback: Callback) -> tuple[bool, int]:
        order = callback.order if isinstance(callback, AlignCallback) else Order.DEFAULT
        return isinstance(callback, Checkpoint), order

    return sorted(callbacks, key=place)


def dry_run_of(callback: Callback) -> DryRun:
    """Checkpoints are not tried; other packages' callbacks are checked."""
    if isinstance(callback, AlignCallback):
        return callback.in_dry_run
    return DryRun.SKIP if isinstance(callback, Checkpoint) else DryRun.CHECK
