"""Interruption by real signals to this process: the checkpoint, the message and the resumed run."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, OnExceptionCheckpoint
from processes import fork
from tiny import adamw, fit, on_policy, sgd, write_pairs, write_prompts

from lit_align.callbacks import Drift, Interruption, ReferenceRefresh, RunReport, WinRate
from lit_align.callbacks.interruption import Interrupted
from lit_align.data import FunctionScorer, OfflinePairs
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reporting.metrics_csv import read_metrics


class Signal(Callback):
    """Sends this process a signal in one of its hooks, once."""

    def __init__(self, hook: str, step: int, signum: int = signal.SIGTERM):
        def send(trainer, *args, **kwargs):
            if trainer.global_step >= step and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signum)

        self.sent = False
        setattr(self, hook, send)


def run(model: str, folder: Path, *callbacks: Callback, ckpt_path: str | None = None) -> DPO:
    """Two rounds of three steps each, λ set at the end of each."""
    proximal = {"proximal": 0.1, "proximal_target": 0.05}
    module = DPO(PolicyConfig(model, dtype="float32"), optimizer=adamw(1e-2), **proximal)
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    write_prompts(folder)
    verdict = WinRate("prompts.jsonl", FunctionScorer("rewards.py:reward"), validation="prompts.jsonl")
    options = {"default_root_dir": str(folder), "max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 1}
    data = on_policy(folder)
    acting = [verdict, Drift(), RunReport(save_model=False), Interruption(), checkpoint]
    fit(module, data, *callbacks, *acting, ckpt_path=ckpt_path, **options)
    return module


def assert_same_weights(first: DPO, second: DPO) -> None:
    assert first.policy
    assert second.policy
    for name, weight in first.policy.model.named_parameters():
        torch.testing.assert_close(second.policy.model.get_parameter(name), weight, rtol=0, atol=0)


def untimed(path: str) -> list[dict[str, float]]:
    """The rows of a metrics.csv, without measured times."""
    rows = read_metrics(path)
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_minute" not in k} for row in rows]


@pytest.mark.parametrize(
    ("hook", "step", "saved_at"),
    [
        ("on_train_batch_start", 1, 2),  # in a step, which is finished
        ("on_train_batch_start", 2, 3),  # in a round's last step: what belongs to its end is done, too
        ("on_train_batch_start", 4, 5),
        ("on_train_batch_start", 5, 6),  # in the run's last step: the verdict is left to the resumed run
        ("on_train_epoch_end", 1, 3),  # before the evaluation, which the resumed run makes; Lightning would not hear it
        ("on_train_end", 6, None),  # at the verdict, which the resumed run makes
    ],
)
def test_an_interrupted_run_resumes_as_the_whole_run(tiny_model, in_tmp, capsys, blank_figures, hook, step, saved_at):
    for name in ("whole", "cut"):
        (in_tmp / name).mkdir()
    os.chdir("whole")
    whole = run(tiny_model, Path())
    os.chdir("../cut")
    with pytest.raises(Interrupted) as exit:
        run(tiny_model, Path(), Signal(hook, step))
    assert exit.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    checkpoint = "checkpoints/interrupted.ckpt" if saved_at else "checkpoints/last.ckpt"
    assert f"SIGTERM at step {saved_at or 6}. Saved. Resume:" in said
    assert f"python train.py fit --config config.yaml --ckpt_path {checkpoint}" in said
    if saved_at:
        assert torch.load(checkpoint, weights_only=True)["global_step"] == saved_at

    resumed = run(tiny_model, Path(), ckpt_path=checkpoint)
    assert not Path("checkpoints/interrupted.ckpt").exists()
    assert_same_weights(whole, resumed)
    assert resumed.proximal == whole.proximal != 0.1
    answered, again = ({path.stem for path in in_tmp.glob(f"{name}/held_out/*")} for name in ("whole", "cut"))
    assert answered == again == {"validation-000003", "validation-000006", "test"}
    assert untimed("metrics.csv") == untimed("../whole/metrics.csv")


@pytest.mark.parametrize(("batch", "saved_at"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_a_step_is_finished_with_its_accumulation_and_refresh(tiny_model, in_tmp, batch, saved_at):
    """Two batches a step and a refresh every two steps; `Interruption` stands before the refresh."""
    write_pairs(in_tmp, 16)

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> DPO:
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=sgd(0.05))
        acting = [Interruption(), ReferenceRefresh(1.0, 2), ModelCheckpoint("checkpoints")]
        options = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
        fit(module, OfflinePairs("pairs.jsonl", batch_size=2), *callbacks, *acting, ckpt_path=ckpt_path, **options)
        return module

    def ask(trainer, module, batch_, number):
        if number == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run()
    with pytest.raises(Interrupted):
        run(LambdaCallback(on_train_batch_start=ask))
    path = "checkpoints/interrupted.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == saved_at
    assert_same_weights(whole, run(ckpt_path=path))


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_terminal_that_closes_ends_the_run_as_sigterm(tiny_model, in_tmp, ignored):
    """The system sends SIGHUP, the shell a second one, and writing to the terminal fails."""
    write_pairs(in_tmp, 16)

    def train() -> None:
        os.setsid()  # so that the terminal is this process's
        terminal, other_end = os.openpty()
        printed = os.open("nohup.out" if ignored else os.ttyname(other_end), os.O_RDWR | os.O_CREAT)
        os.close(other_end)
        for descriptor in (1, 2):
            os.dup2(printed, descriptor)
        os.close(printed)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

        def close(trainer, module, batch, number):
            if trainer.global_step == 2:
                os.close(terminal)
                os.kill(os.getpid(), signal.SIGHUP)

        acting = [LambdaCallback(on_train_batch_start=close), Interruption(), ModelCheckpoint("checkpoints")]
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=sgd(0.05))
        fit(module, OfflinePairs("pairs.jsonl", batch_size=2), *acting, enable_checkpointing=True)

    assert fork(train) == (0 if ignored else 128 + signal.SIGHUP)
    (saved,) = Path("checkpoints").iterdir()
    assert saved.name == ("epoch=0-step=8.ckpt" if ignored else "interrupted.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == (8 if ignored else 3)


def test_an_interrupted_run_keeps_the_checkpoint_of_its_step(tiny_model, in_tmp):
    write_pairs(in_tmp, 16)

    def kept(*callbacks: Callback, ckpt_path: str | None = None) -> set[str]:
        saving = ModelCheckpoint("checkpoints", every_n_train_steps=3, save_top_k=2, monitor="step", mode="max")
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=sgd(0.05))
        data, options = OfflinePairs("pairs.jsonl", batch_size=2), {"max_epochs": 2, "enable_checkpointing": True}
        fit(module, data, *callbacks, Interruption(), saving, ckpt_path=ckpt_path, **options)
        return {path.name for path in Path("checkpoints").iterdir()}

    with pytest.raises(Interrupted):
        kept(Signal("on_train_batch_start", 11))
    assert kept(ckpt_path="checkpoints/interrupted.ckpt") == {"epoch=1-step=12.ckpt", "epoch=1-step=15.ckpt"}


def test_ctrl_c_in_the_first_rounds_sampling_says_to_start_again(tiny_model, in_tmp, capsys):
    lines = ["import os, signal", "def reward(prompts, responses):", "    os.kill(os.getpid(), signal.SIGINT)"]
    (in_tmp / "slow.py").write_text("\n".join(lines) + "\n")
    data = on_policy(in_tmp)
    data.scorer = FunctionScorer("slow.py:reward")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    with pytest.raises(Interrupted) as exit:
        fit(DPO(PolicyConfig(tiny_model)), data, Interruption(), enable_checkpointing=True, default_root_dir="run")
    assert exit.value.code == 130
    said = capsys.readouterr().out
    assert "SIGINT at step 0. Nothing was saved. Start again:" in said
    assert "python train.py fit --config run/config.yaml\n" in said
    with pytest.raises(KeyboardInterrupt):  # after the run, Ctrl-C is what it was before
        signal.raise_signal(signal.SIGINT)


def test_saving_at_an_epochs_end_is_not_interrupted_by_a_second_ctrl_c(tiny_model, in_tmp, capsys):
    class Impatient(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            signal.raise_signal(signal.SIGINT)

    write_pairs(in_tmp, 4)
    callbacks = [Signal("on_train_epoch_end", 1, signal.SIGINT), Interruption(), Impatient()]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted):
        fit(DPO(PolicyConfig(tiny_model)), OfflinePairs("pairs.jsonl"), *callbacks, enable_checkpointing=True)
    assert "SIGINT at step 1. Saved. Resume:" in capsys.readouterr().out


def test_a_signal_before_the_steps_of_a_second_fit_ends_it_at_once(tiny_model, in_tmp, capsys):
    """The first fit was interrupted within its steps; in a notebook, the second one has the same callback."""
    write_prompts(in_tmp)
    again, options = Interruption(), {"enable_checkpointing": True, "default_root_dir": "run"}
    for hook in ("on_train_batch_start", "on_train_start"):
        with pytest.raises(Interrupted):
            fit(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp), again, Signal(hook, 0), **options)
    assert "SIGTERM at step 0. Nothing was saved. Start again:" in capsys.readouterr().out


def test_the_named_checkpoint_is_this_runs_last_not_an_older_one(tiny_model, in_tmp, capsys):
    with pytest.raises(Interrupted):
        run(tiny_model, Path(), Signal("on_train_batch_start", 1))
    old = "checkpoints/interrupted.ckpt"
    with pytest.raises(Interrupted):  # before it has made a step of its own
        run(tiny_model, Path(), Signal("on_train_start", 0), ckpt_path=old)
    assert f"--ckpt_path {old}\n" in capsys.readouterr().out.rpartition("SIGTERM")[2]
    with pytest.raises(Interrupted):  # while round 2 is sampled
        run(tiny_model, Path(), Signal("on_train_epoch_start", 3), ckpt_path=old)
    assert "--ckpt_path checkpoints/last.ckpt\n" in capsys.readouterr().out.rpartition("SIGTERM")[2]
    with pytest.raises(Interrupted):  # a fresh run in the same folder
        run(tiny_model, Path(), Signal("on_train_start", 0))
    assert "interrupted.ckpt" not in capsys.readouterr().out.rpartition("SIGTERM")[2]


def test_a_sweeps_stop_of_a_trial_is_no_failure(monkeypatch):
    """W&B's agent counts exit codes above 0 as failures, and gives up after five."""
    assert Interrupted(signal.SIGTERM).code == 128 + 15
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert Interrupted(signal.SIGTERM).code == 0
    assert Interrupted(signal.SIGINT).code == 128 + 2


@pytest.mark.parametrize("step", [2, 4], ids=["within an epoch", "at its end"])
def test_a_validation_that_fails_is_repeated_by_the_resumed_run(tiny_model, in_tmp, step):
    write_pairs(in_tmp)

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> list[dict[str, float]]:
        data = OfflinePairs("pairs.jsonl", batch_size=2, validation="pairs.jsonl")
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=sgd(0.05))
        options = {"val_check_interval": 0.5, "max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": True}
        acting = [RunReport(save_model=False), Interruption(), OnExceptionCheckpoint("kept")]
        fit(module, data, *callbacks, *acting, ckpt_path=ckpt_path, default_root_dir=".", **options)
        return untimed("metrics.csv")

    def fail(trainer, module, batch, number, *more):
        if trainer.global_step == step and number == 1:
            raise ValueError("out of memory")

    whole = run()
    with pytest.raises(ValueError, match="out of memory"):
        run(LambdaCallback(on_validation_batch_start=fail))
    assert run(ckpt_path="kept/on_exception.ckpt") == whole
