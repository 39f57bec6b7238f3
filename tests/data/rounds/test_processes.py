"""Rounds that several processes make together: the same bytes as one makes, no hang, and who is missing is named."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from processes import Weights, endings, processes_of, run_in, train
from tiny import adamw, fit, on_policy, write_pairs

from lit_align.callbacks import Drift, ReferenceRefresh
from lit_align.data import ContinuousBatchingSampler, OfflinePairs, Sampler
from lit_align.errors import UserError
from lit_align.objectives import DPO, KTO
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference.config import ReferenceConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics
from lit_align.sharding import barrier_with_timeout

LORA = LoRAConfig(r=4, alpha=8)


def run(
    model: str,
    folder: Path,
    strategy: str,
    lr: float,
    lora: LoRAConfig | None = None,
    objective: Any = DPO,
    sampler: Sampler | None = None,
    rounds: int = 3,
    **options: Any,
) -> Weights:
    """Rounds of 9 prompts in batches of 4; gives the weights."""
    folder.mkdir(exist_ok=True)
    module = objective(PolicyConfig(model, dtype="float32"), lora=lora, optimizer=adamw(lr), **options)
    batch_size = 4 // processes_of(strategy)
    data = on_policy(folder, batch_size=batch_size, sampling_batch_size=8, prompts_per_round=9, sampler=sampler)
    refresh = [] if options.get("reference") else [ReferenceRefresh(1.0, 1, "round")]
    trainer = {"max_epochs": rounds, "log_every_n_steps": 1, "default_root_dir": folder, "logger": MetricsCSV(folder)}
    return train(module, data, *refresh, Drift(prompts=3), strategy=strategy, **trainer)


def stored(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The stored samples and scores, by round and file."""
    files = sorted(folder.glob("rounds/*/*.parquet"))
    names = [re.sub("-[0-9a-f]{8}(?=[-/])", "", f"{file.parent.name}/{file.name}") for file in files]
    return {name: pq.read_table(file).to_pylist() for name, file in zip(names, files, strict=True)}


def without_logps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("_logps")} for row in rows]


@pytest.mark.parametrize(
    ("strategy", "lora", "sampler"),
    [
        ("ddp", None, None),
        ("ddp", LORA, None),
        ("fsdp2", None, None),
        ("fsdp2", LORA, None),
        pytest.param("fsdp2", LORA, ContinuousBatchingSampler(512), marks=pytest.mark.slow),
    ],
    ids=["ddp", "ddp, LoRA", "fsdp2", "fsdp2, LoRA", "continuous batching"],
)
def test_pairs_are_the_same_whatever_the_number_of_processes(tiny_model, in_tmp, strategy, lora, sampler):
    """With a learning rate of 0 weights stay equal, and so must all that is drawn from them."""
    options = {"sampler": sampler, "rounds": 1 if sampler else 3}
    run(tiny_model, in_tmp / "one", "auto", 0.0, lora, **options)
    run_in(2, lambda: run(tiny_model, in_tmp / "two", strategy, 0.0, lora, **options))
    one, two = stored(in_tmp / "one"), stored(in_tmp / "two")
    samples = [name for name in one if "samples" in name]
    assert len(samples) == options["rounds"] * 5  # batches of two prompts
    assert one.keys() == two.keys()
    for name in one:
        if "scores" in name:
            assert [row["scores"] for row in one[name]] == [row["scores"] for row in two[name]]
    for name in samples:
        assert without_logps(one[name]) == without_logps(two[name]), name
        for row, other in zip(one[name], two[name], strict=True):
            assert row["sampler_logps"] == pytest.approx(other["sampler_logps"], abs=1e-4)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {}),
        ("fsdp2", {}),
        ("fsdp2", {"lora": LORA}),
        ("fsdp2", {"objective": KTO}),
        ("fsdp2", {"proximal": 0.1, "proximal_target": 0.5}),
        ("fsdp2", {"reference": ReferenceConfig(form="recorded")}),
    ],
    ids=["ddp", "fsdp2", "LoRA", "KTO", "λ adapted", "recorded reference"],
)
def test_processes_go_through_rounds_together(tiny_model, in_tmp, strategy, options):
    start = run(tiny_model, in_tmp / "start", "auto", 0.0, **options)
    first, second = run_in(2, lambda: run(tiny_model, in_tmp / "two", strategy, 1e-3, **options))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((first[name] - start[name]).abs().max() > 1e-4 for name in first)
    rows = read_metrics(in_tmp / "two" / "metrics.csv")
    panel = [row for row in rows if "drift/kl_policy_start" in row]
    assert len(panel) == 3
    assert panel[0]["drift/kl_policy_start"] == pytest.approx(0, abs=1e-4)
    assert abs(panel[2]["drift/kl_policy_start"]) > 1e-3
    assert len([row for row in rows if row.get("drift/kl_policy_sampler", 0) > 0]) == 3


def test_pairs_in_no_full_batch_are_counted_or_refused(tiny_model, in_tmp):
    def train(batch_size: int) -> int:
        data = on_policy(in_tmp, batch_size=batch_size)
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        fit(module, data, log_every_n_steps=1, strategy="ddp", devices=2, logger=MetricsCSV(in_tmp))
        return len(data.current_round.examples)

    def refused() -> str:
        with pytest.raises(UserError) as error:
            train(5)
        return str(error.value)

    assert run_in(2, lambda: train(3)) == [8, 8]
    (row,) = [row for row in read_metrics(in_tmp / "metrics.csv") if "round/pairs" in row]
    assert (row["round/pairs"], row["round/dropped_in_no_full_batch"]) == (6, 2)
    assert (
        "8 examples to train on cannot fill a batch for every process. Lower data.batch_size=5" in run_in(2, refused)[0]
    )


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_held_out_pairs_in_no_full_batch_are_counted_or_refused(tiny_model, in_tmp, capfd, stage):
    def evaluate(count: int) -> str | None:
        (in_tmp / "held").mkdir(exist_ok=True)
        data = OfflinePairs(write_pairs(in_tmp), batch_size=2, **{stage: write_pairs(in_tmp / "held", count)})
        module = DPO(PolicyConfig(tiny_model, dtype="float32"))
        try:
            trainer = fit(module, data, strategy="ddp", devices=2)
            if stage == "test":
                trainer.test(module, data, verbose=False)
        except UserError as error:
            return str(error)
        assert f"{stage.removesuffix('idation')}/loss" in trainer.callback_metrics
        return None

    assert run_in(2, lambda: evaluate(9)) == [None, None]
    said = capfd.readouterr().out
    assert said.count(f"left out: 1 pair of data.{stage}, too few for a batch of every process.") == 1
    refused = run_in(2, lambda: evaluate(3))
    assert all(
        f"data.{stage}=" in error and "its 3 examples cannot fill a batch for every" in error for error in refused
    )


def test_a_process_that_does_not_come_is_named():
    def go() -> str:
        torch.distributed.init_process_group("gloo")
        barrier_with_timeout("setup", minutes=1)
        if torch.distributed.get_rank() == 1:
            time.sleep(4)
            return ""
        with pytest.raises(UserError) as error:
            barrier_with_timeout("round 1, sample", minutes=1 / 60)
        return str(error.value)

    message, _ = run_in(2, go)
    assert "round 1, sample: a process has not arrived within 0.0166667 minutes" in message
    assert "1" in message.partition("Ranks")[2], message


def test_a_time_is_named_only_when_it_has_passed():
    def go() -> str:
        torch.distributed.init_process_group("gloo")
        barrier_with_timeout("setup", minutes=1)
        if torch.distributed.get_rank() == 1:
            os._exit(0)
        with pytest.raises(UserError, match="round 1, sample: a process has died: ") as error:
            barrier_with_timeout("round 1, sample", minutes=1)
        return str(error.value)

    (message,) = run_in(2, go)
    assert "minutes" not in message


def test_other_data_on_a_process_are_one_message(tiny_model, in_tmp):
    def go() -> None:
        folder = in_tmp / os.environ["RANK"]
        folder.mkdir()
        data = on_policy(folder, store=str(in_tmp / "rounds"), prompts_per_round=4)
        rows = Path(data.prompts).read_text().splitlines()
        Path(data.prompts).write_text("\n".join(rows[: 20 + int(os.environ["RANK"])]))
        fit(DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw()), data, strategy="ddp", devices=2)

    codes, printed = endings(2, go)
    assert codes == [1, 2], printed
    said = "UserError: process 1 differs from process 0 (process 0 → process 1):\n  data.prompts: "
    assert printed.count(said) == 1, printed
    assert printed.count("Traceback") == 1
