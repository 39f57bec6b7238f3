"""The order of callbacks, and what they do in a dry run."""

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_align import callbacks
from lit_align.callbacks import (
    AlignCallback,
    Drift,
    DryRun,
    Interruption,
    PhaseProgress,
    ReferenceRefresh,
    RunReport,
    WandbReport,
)
from lit_align.callbacks.base import dry_run_of, in_order
from lit_align.cli.classes import NAMED_CALLBACKS


def test_callbacks_are_sorted_by_their_order_and_checkpoints_come_last():
    sorted_ = [
        PhaseProgress(), ReferenceRefresh(0.5), EarlyStopping("x"), Callback(), RunReport(), Drift(), WandbReport(),
        Interruption(), ModelCheckpoint(),
    ]  # fmt: skip
    shuffled = [sorted_[place] for place in (8, 7, 6, 5, 4, 1, 2, 3, 0)]
    assert in_order(shuffled) == sorted_, "equal ones keep their sequence"


def test_every_exported_callback_states_its_dry_run():
    acting = {name for name in callbacks.__all__ if getattr(getattr(callbacks, name), "in_dry_run", 0) is DryRun.ACT}
    assert acting == {"Drift", "FSDPSharding", "ReferenceRefresh"}
    assert dry_run_of(ModelCheckpoint()) is DryRun.SKIP
    assert dry_run_of(EarlyStopping("x")) is DryRun.CHECK, "not dropped silently"


def test_an_option_name_makes_a_top_level_key():
    named = {name for cls in AlignCallback.__subclasses__() if (name := cls.option_name)}
    assert named | {"checkpoint"} == NAMED_CALLBACKS.keys()
    assert {"reference_refresh", "win_rate", "predictions", "wandb_report", "drift", "fsdp_sharding"} == named
