"""Files are written whole or not at all, and what prevents it is one message."""

import resource
import signal
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from processes import fork

from lit_align.callbacks import Predictions
from lit_align.callbacks.predictions import Predicted
from lit_align.data.formats.rows import Row
from lit_align.data.sampling import Response
from lit_align.errors import UserError
from lit_align.files import write_whole, writing
from lit_align.policy import Policy, PolicyConfig


def test_a_full_disk_leaves_the_earlier_file(in_tmp):
    path = Path("kept/file.txt")
    write_whole(path, lambda beside: beside.write_text("first"))

    def limited() -> None:  # as on a full disk, a write gives an error without a file name
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(UserError, match=r"^kept/file\.txt cannot be written: File too large\. Make room, or name"):
            write_whole(path, lambda beside: beside.write_text("x" * 10000))
        raise SystemExit(7)

    assert fork(limited) == 7
    assert path.read_text() == "first"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"], "the half-written one is deleted"


def test_a_folder_that_cannot_be_made_is_named(in_tmp):
    Path("run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"^run/held_out/a cannot be written: (Not a directory|File exists)\."):
        write_whole(Path("run/held_out/a"), lambda beside: beside.write_text("x"))


def test_the_metrics_of_a_full_disk_are_one_message(in_tmp, monkeypatch):
    from lit_align.reporting.metrics_csv import MetricsCSV

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    logger = MetricsCSV("run")
    logger.log_metrics({"loss": 1.0}, step=1)
    monkeypatch.setattr("lit_align.files.os.replace", full)
    with pytest.raises(UserError, match=r"^run/metrics\.csv cannot be written: No space left on device\."):
        Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False).loggers[0].finalize("success")


def test_a_model_a_plot_and_predictions_on_a_full_disk_are_one_message(in_tmp: Path, tiny_model: str):
    policy = Policy.load(PolicyConfig(tiny_model, dtype="float32"))
    predictions = Predictions("prompts.jsonl")
    prompts = [Row(str(i) * 40, source="1") for i in range(2000)]
    responses = [[Response([1], "a", True)]] * len(prompts)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(UserError, match=r"^run/model cannot be written: .*File too large"):
            policy.save(Path("run/model"))
        with (
            pytest.raises(UserError, match=r"^run/curves\.png cannot be written: File too large"),
            writing("run/curves.png"),
        ):
            Figure().savefig("run/curves.png", dpi=1000)
        for name in ("predictions.jsonl", "predictions.parquet"):
            predictions.out = name
            with pytest.raises(UserError, match=f"^run/{name} cannot be written: .*File too large"):
                predictions.write(Predicted(prompts, responses, None), Path("run"))
        raise SystemExit(7)

    assert fork(limited) == 7


def test_a_model_in_a_folder_that_cannot_be_made_is_one_message(in_tmp: Path, tiny_model: str):
    Path("run").write_text("a file where the folder should be")
    policy = Policy.load(PolicyConfig(tiny_model, dtype="float32"))
    with pytest.raises(UserError, match=r"^run/model cannot be written: "):
        policy.save(Path("run/model"))
