"""Killed at any moment (SIGKILL, no clean-up) and resumed, a run ends in the weights of the run that was not killed."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import die_at, fork, run_in
from tiny import adamw, fit, on_policy, write_pairs, write_prompts

from lit_align.callbacks import Drift, ReferenceRefresh, WinRate
from lit_align.data import FunctionScorer, OfflinePairs, Sampling
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig

LIGHT = {"sampling in the second round", "in the middle of a refresh"}  # more in tests/test_kills.py
LORA = LoRAConfig(r=1, alpha=2, dropout=0.2)
# What is being done when the process dies, and at which call of it.
MOMENTS = {
    "sampling in the first round": ("lit_align.data.samplers.generate", "sample_responses", 2),
    "sampling in the second round": ("lit_align.data.samplers.generate", "sample_responses", 6),
    "scoring": ("lit_align.data.scorers.base", "score", 3),
    "writing a part of a round": ("lit_align.data.rounds.store", "os.replace", 9),
    "recording log-probabilities": ("lit_align.data.rounds.recorder", "record_logps", 2),
    "pairing": ("lit_align.data.pairing", "BestWorst.choose", 10),
    "in the middle of an epoch": ("torch.optim", "AdamW.step", 5),
    "in the middle of a refresh": ("torch", "Tensor.mul_", 25),
    "writing a checkpoint": ("torch", "save", 4),
    "moving a written checkpoint to its place": ("fsspec.implementations.local", "LocalFileOpener.commit", 5),
    "linking the last checkpoint": ("os", "symlink", 3),
    "between two epochs": ("lit_align.callbacks", "Drift.on_train_epoch_end", 2),
}


def run(model: str, folder: Path) -> dict[str, torch.Tensor]:
    """Three rounds of TR-PR-DPO, from the latest checkpoint if there is one."""
    saving = ModelCheckpoint(
        folder / "ckpt", every_n_train_steps=1, save_top_k=1, save_last="link", enable_version_counter=False
    )
    module = DPO(PolicyConfig(model, dtype="float32"), lora=LORA, proximal=0.1, optimizer=adamw(1e-2))
    refresh = ReferenceRefresh(0.7)  # a ring of 14 past adapters
    kept = sorted(folder.glob("ckpt/*.ckpt"), key=lambda path: path.stat().st_mtime)
    fit(
        module,
        on_policy(folder, batch_size=2),
        refresh,
        Drift(prompts=2),
        saving,
        max_epochs=3,
        enable_checkpointing=True,
        default_root_dir=folder,
        ckpt_path=str(kept[-1]) if kept else None,
    )
    assert refresh.count == module.trainer.global_step
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_in(1, run, tiny_model, tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=() if moment in LIGHT else pytest.mark.slow) for moment in MOMENTS]
)
def test_killed_and_resumed_a_run_ends_in_the_same_weights(tiny_model, uninterrupted, tmp_path, moment):
    def doomed() -> None:
        die_at(*MOMENTS[moment])
        run(tiny_model, tmp_path)

    assert fork(doomed) == -signal.SIGKILL, "it was to die, and did not"
    resumed = run_in(1, run, tiny_model, tmp_path)[0]
    assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())
    assert len(list(tmp_path.glob("rounds/*"))) == 3, "a round was made twice"


def judged(model: str, folder: Path) -> dict[str, bytes]:
    """The files of the verdict after one epoch, from the checkpoint at its end if there is one."""
    os.chdir(folder)
    prompts, scorer = write_prompts(Path(), 3), FunctionScorer("rewards.py:reward")
    saving = ModelCheckpoint("ckpt", save_last="link", enable_version_counter=False)
    kept = Path("ckpt/last.ckpt")
    fit(
        DPO(PolicyConfig(model, dtype="float32"), optimizer=adamw(1e-2)),
        OfflinePairs(write_pairs(Path(), 4), batch_size=2, cache_dir="cache"),
        WinRate(prompts, scorer, sampling=Sampling(max_new_tokens=4), batch_size=4),
        saving,
        enable_checkpointing=True,
        default_root_dir=".",
        ckpt_path=str(kept) if kept.exists() else None,
    )
    return {path.name: path.read_bytes() for path in (Path("summary.json"), *Path("held_out").iterdir())}


@pytest.mark.parametrize(
    "moment",
    [
        ("lit_align.data.samplers.generate", "sample_responses", 5),
        pytest.param(("lit_align.data.scorers.base", "score", 2), marks=pytest.mark.slow),
        pytest.param(("lit_align.evaluation.likelihoods", "record_logps", 3), marks=pytest.mark.slow),
        pytest.param(("lit_align.callbacks.win_rate", "write_held_out", 1), marks=pytest.mark.slow),
    ],
    ids=["answering", "scoring", "measuring", "writing"],
)
def test_killed_in_its_verdict_and_resumed_a_run_gives_the_same(tiny_model, tmp_path, blank_figures, moment):
    def doomed() -> None:
        die_at(*moment)
        judged(tiny_model, cut)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    (expected,) = run_in(1, judged, tiny_model, whole)
    assert fork(doomed) == -signal.SIGKILL, "it was to die, and did not"
    assert not (cut / "summary.json").exists()
    (left,) = run_in(1, judged, tiny_model, cut)
    assert left == expected
    assert expected.keys() > {"summary.json"}
