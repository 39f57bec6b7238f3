"""The files that a run leaves in its folder."""

import re
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import fit, sgd, write_pairs

from lit_align.callbacks import RunReport
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reporting.metrics_csv import read_metrics


def test_a_checkpoint_has_all_rows_of_metrics_before_it(tiny_model, in_tmp):
    """A killed run writes nothing more, so that the file counts as it is after the checkpoint."""
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                seen.extend(row["step"] for row in read_metrics("run/metrics.csv") if "train/loss" in row)

    data = OfflinePairs(write_pairs(in_tmp, 8), batch_size=4)
    callbacks = [Look(), RunReport(save_model=False), ModelCheckpoint(Path("run"), save_on_train_epoch_end=True)]
    options = {"max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 1, "default_root_dir": "run"}
    fit(DPO(PolicyConfig(tiny_model), optimizer=sgd()), data, *callbacks, **options)
    assert seen == [0, 1]


def test_a_warm_up_longer_than_the_run_is_printed_and_recorded(tiny_model, in_tmp, capsys):
    module, data = DPO(PolicyConfig(tiny_model), warmup_steps=8), OfflinePairs(write_pairs(in_tmp, 8), batch_size=4)
    fit(module, data, RunReport(save_model=False), max_epochs=2, default_root_dir="run")
    warning = "8 steps, but the run has 4: the learning rate reaches 50% of its value"
    assert f"warm-up         {warning}" in capsys.readouterr().out
    assert warning in Path("run/run.json").read_text()


def test_files_in_the_folder_that_are_not_a_runs_stay(tiny_model, in_tmp):
    Path("held_out").mkdir()
    for name in ("prompts.jsonl", "test.parquet"):
        Path("held_out", name).touch()
    fit(DPO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)), RunReport(save_model=False))
    assert [path.name for path in Path("held_out").iterdir()] == ["prompts.jsonl"]


def test_a_run_does_not_write_its_model_over_its_start(tiny_model, in_tmp):
    shutil.copytree(tiny_model, "run/model")
    with pytest.raises(UserError, match=r"model.policy.path=run/model is the folder to which this run writes"):
        fit(DPO(PolicyConfig("run/model")), OfflinePairs(write_pairs(in_tmp)), RunReport(), default_root_dir="run")


def test_a_callbacks_lines_are_in_the_header(tiny_model, in_tmp, capsys):
    class Described(Callback):
        def describe(self):
            yield "judge", "a stern one"

    data = OfflinePairs(write_pairs(in_tmp, 8), batch_size=4)
    fit(DPO(PolicyConfig(tiny_model)), data, RunReport(save_model=False), Described(), default_root_dir="run")
    assert re.search("judge +a stern one", capsys.readouterr().out)
    assert "a stern one" in Path("run/run.json").read_text()
