"""The lines that training leaves on the terminal."""

import operator
import re
from pathlib import Path

import pytest
from tiny import fit, sgd, write_pairs

from lit_align.callbacks import PhaseProgress
from lit_align.data import OfflinePairs
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics


@pytest.mark.parametrize(("accumulate", "sizes"), [(1, [3, 3, 1]), (2, [6, 1])])
def test_training_shows_the_epochs_means_and_validation_its_own(tiny_model, in_tmp, capsys, accumulate, sizes):
    """Batches of 3, 3 and 1 pairs: the means are over pairs, not over batches or steps."""
    path = write_pairs(in_tmp, 7)
    module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=sgd(0.5))
    data = OfflinePairs(path, validation=path, batch_size=3)
    options = {"enable_progress_bar": True, "log_every_n_steps": 1, "logger": MetricsCSV(Path())}
    options |= {"accumulate_grad_batches": accumulate}
    fit(module, data, PhaseProgress(), **options)
    printed = capsys.readouterr().out
    losses = [row["train/loss"] for row in read_metrics("metrics.csv") if "train/loss" in row]
    assert len(losses) == len(sizes)
    train, validation = re.findall(r"loss (\d+\.\d+)  accuracy \d\.\d+  margin -?\d+\.\d+", printed)
    assert float(train) == pytest.approx(sum(map(operator.mul, sizes, losses)) / 7, abs=6e-4)
    val = [row["val/loss"] for row in read_metrics("metrics.csv") if "val/loss" in row]
    assert float(validation) == pytest.approx(val[-1], abs=6e-4)
    assert all(len(line) <= 80 for line in printed.splitlines() if "train " in line or "loss" in line)
