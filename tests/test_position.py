"""Killed any number of times, at any batch, with any cadence of checkpoints, a run ends as the whole one."""

import contextlib
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny import adamw, fit, on_policy, write_pairs, write_prompts

from lit_align.callbacks import Drift, Interruption, ReferenceRefresh, RunReport, WinRate
from lit_align.data import FunctionScorer, OfflinePairs
from lit_align.data.samplers import generate
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reporting.metrics_csv import read_metrics


class Killed(BaseException):
    pass


class Kill(Callback):
    """Ends the run without any clean-up of its own, before the given batch (counted over the whole run) begins."""

    def __init__(self, at: int | None):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.at is not None and trainer.fit_loop.epoch_loop.total_batch_idx >= self.at:
            raise Killed


class KillAtEnd(Callback):
    """Ends the run at the end of its first epoch, after the checkpoint of its last step."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        raise Killed


class Killing:
    """Ends the run at the n-th batch of prompts that is sampled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.at: int | None = None

        def draw(*args, **kwargs):
            if self.at is not None:
                self.at -= 1
                if self.at == 0:
                    raise Killed
            return sample(*args, **kwargs)

        sample = generate.sample_responses
        monkeypatch.setattr(generate, "sample_responses", draw)


class Account(Callback):
    """Every hook that a run passes, as a whole run passes each once."""

    def __init__(self, passed: list):
        self.passed = passed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.passed.append(("batch", trainer.current_epoch, batch_idx, trainer.global_step, batch.index.tolist()))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.passed.append(("validation", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.passed.append(("epoch", trainer.current_epoch, trainer.global_step))


def run(
    model, folder: Path, log: list, kill: int | None, data, every, *callbacks, target=None, **options
) -> dict[str, torch.Tensor]:
    module = DPO(PolicyConfig(model, dtype="float32"), optimizer=adamw(1e-2), warmup_steps=2, **(target or {}))
    saving = ModelCheckpoint(folder / "ckpt", save_top_k=-1, save_last=True, enable_version_counter=False, **every)
    last = folder / "ckpt" / "last.ckpt"
    options |= {"enable_checkpointing": True, "default_root_dir": folder, "num_sanity_val_steps": 0}
    path = str(last) if last.exists() else None
    fit(module, data(), Account(log), Kill(kill), *callbacks, saving, ckpt_path=path, **options)
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def artefacts(folder: Path) -> dict[str, object]:
    """The files that a run leaves, without measured times."""
    rows = read_metrics(folder / "metrics.csv")
    untimed = [{k: v for k, v in row.items() if "seconds" not in k and "per_minute" not in k} for row in rows]
    held_out = {path.name: path.read_bytes() for path in sorted(folder.glob("held_out/*"))}
    rounds = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("rounds/*/*.parquet"))}
    return {"metrics": untimed, "summary": (folder / "summary.json").read_text(), **held_out, **rounds}


CADENCES = [{"every_n_train_steps": n} for n in (1, 2, 3)] + [{"save_on_train_epoch_end": True}, {}]
OPTIONS = [
    {"max_epochs": 3},
    {"max_epochs": 3, "accumulate_grad_batches": 3},
    {"max_steps": 9, "max_epochs": -1},
    {"max_epochs": 3, "val_check_interval": 2},
    {"max_epochs": 3, "val_check_interval": 2, "max_steps": 10, "accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("every", CADENCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_offline_killed_twice_a_run_ends_as_the_whole_one(tiny_model, in_tmp, every, options):
    pairs = write_pairs(in_tmp, 9)
    data = lambda: OfflinePairs(pairs, validation=f"{pairs}[:3]", batch_size=2, seed=3)  # noqa: E731
    whole: list = []
    weights = run(tiny_model, in_tmp / "whole", whole, None, data, every, **options)
    total = sum(entry[0] == "batch" for entry in whole)
    chance = random.Random(repr((every, options)))
    for attempt in range(2):
        first = chance.randrange(1, total)
        second = chance.randrange(first, total)
        folder, log = in_tmp / f"cut{attempt}", []
        for kill in (first, second):
            with pytest.raises(Killed):
                run(tiny_model, folder, log, kill, data, every, **options)
        resumed = run(tiny_model, folder, log, None, data, every, **options)
        last = {entry[:3] if entry[0] == "batch" else entry: entry for entry in log}
        assert sorted(last.values(), key=repr) == sorted(whole, key=repr), (first, second)
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items()), (first, second)


@pytest.mark.parametrize(
    ("every", "reset", "attempts"),
    [
        ({}, False, 1),
        *(
            pytest.param(every, reset, 3, marks=pytest.mark.slow)
            for every, reset in [
                ({}, False),
                ({"every_n_train_steps": 2}, False),
                ({"every_n_train_steps": 2}, True),
                ({"every_n_train_steps": 3}, False),
                ({"every_n_train_steps": 3}, True),
                ({}, True),
            ]
        ),
    ],
    ids=str,
)
def test_on_policy_killed_twice_a_run_ends_as_the_whole_one(tiny_model, in_tmp, monkeypatch, every, reset, attempts):
    """Killed in steps and in sampling, with λ set each round and a reference that moves by step."""
    target = {"proximal": 0.1, "proximal_target": 0.05, "reset_optimizer_each_round": reset}
    sampled = Killing(monkeypatch)
    write_prompts(in_tmp)
    (in_tmp / "held_out.jsonl").write_text('{"prompt": "Say"}\n{"prompt": "Tell"}\n')

    def state(folder: Path, log: list, kill: int | None = None) -> dict[str, torch.Tensor]:
        refresh = ReferenceRefresh(0.5, tau=2)
        scorer = FunctionScorer(f"{in_tmp / 'rewards.py'}:reward")
        prompts = str(in_tmp / "held_out.jsonl")
        verdict = WinRate(prompts, scorer, validation=prompts, responses_per_prompt=1)
        data = lambda: on_policy(in_tmp, store=str(folder / "rounds"))  # noqa: E731
        others = (RunReport(save_model=False), Drift(prompts=2), Interruption())
        options = {"target": target, "max_epochs": 3, "log_every_n_steps": 1}
        weights = run(tiny_model, folder, log, kill, data, every, refresh, verdict, *others, **options)
        return weights | {"refreshes": torch.tensor(refresh.count)}

    whole: list = []
    weights = state(in_tmp / "whole", whole)
    chance = random.Random(repr((every, reset)))
    for attempt in range(attempts):
        folder, log = in_tmp / f"cut{attempt}", []
        for _ in range(2):
            kill = chance.choice([chance.randrange(1, 9), None])
            sampled.at = None if kill else chance.randrange(1, 7)
            with contextlib.suppress(Killed):
                state(folder, log, kill)
            sampled.at = None
        resumed = state(folder, log)
        last = {entry[:3] if entry[0] == "batch" else entry: entry for entry in log}
        assert sorted(last.values(), key=repr) == sorted(whole, key=repr), attempt
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items()), attempt
        assert artefacts(folder) == artefacts(in_tmp / "whole"), attempt


def test_a_round_that_is_over_records_no_reference_again(tiny_model, in_tmp):
    """The reference has moved at the round's last step, whose checkpoint the run resumes from."""

    def files(folder: Path, *callbacks: Callback) -> list[str]:
        refresh = ReferenceRefresh(0.5, unit="round")
        data = lambda: on_policy(in_tmp, store=str(folder / "rounds"))  # noqa: E731
        every = {"every_n_train_steps": 1}
        with contextlib.suppress(Killed):
            run(tiny_model, folder, [], None, data, every, refresh, *callbacks, max_epochs=2)
        return sorted(str(path.relative_to(folder)) for path in folder.glob("rounds/*/reference-*.parquet"))

    whole = files(in_tmp / "whole")
    assert len(whole) == 2
    assert files(in_tmp / "cut", KillAtEnd()) == whole[:1]
    assert files(in_tmp / "cut") == whole


def test_a_run_in_float64_resumes_with_all_digits(tiny_model, in_tmp):
    pairs = write_pairs(in_tmp, 9)
    options = {"max_epochs": 2, "precision": "64-true"}
    weights = {}
    for name, kills in {"whole": [None], "cut": [3, None]}.items():
        for kill in kills:
            with contextlib.suppress(Killed):
                data = lambda: OfflinePairs(pairs, batch_size=2)  # noqa: E731
                weights[name] = run(tiny_model, in_tmp / name, [], kill, data, {"every_n_train_steps": 1}, **options)
    assert all(weight.dtype == torch.float64 for weight in weights["cut"].values())
    assert all(torch.equal(weight, weights["cut"][name]) for name, weight in weights["whole"].items())


def test_an_epochs_end_that_is_left_to_do_is_monitored_by_its_last_step(tiny_model, in_tmp):
    pairs = write_pairs(in_tmp)
    seen = {}
    for name, kills in {"whole": [[]], "cut": [[KillAtEnd()], []]}.items():
        for kill in kills:
            stopping = EarlyStopping("train/loss", patience=9, check_on_train_epoch_end=True)
            with contextlib.suppress(Killed):
                data = lambda: OfflinePairs(pairs, batch_size=2)  # noqa: E731
                run(
                    tiny_model, in_tmp / name, [], None, data, {"every_n_train_steps": 1}, *kill, stopping, max_epochs=2
                )
            seen[name] = str(stopping.state_dict())
    assert seen["cut"] == seen["whole"]
