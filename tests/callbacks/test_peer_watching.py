"""A process of two that dies or hangs ends both, with one message; real processes, killed and stopped by signals."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from processes import act_at, die_at, endings
from tiny import adamw, fit, on_policy, write_pairs

from lit_align.callbacks import PeerWatching, ReferenceRefresh, WinRate
from lit_align.cli import main
from lit_align.data import FunctionScorer
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig

MINUTES = 0.25  # a loaded machine lets a thread wait for seconds
KILLED, STOPPED = signal.SIGKILL, signal.SIGSTOP
MOMENTS = {
    "sampling": ("lit_align.data.samplers.generate", "sample_responses", 2),
    "scoring": ("lit_align.data.scorers.base", "score", 2),
    "a training step": ("torch.optim", "AdamW.step", 2),
    "a refresh": ("lit_align.reference.copied", "CopiedReference.mix", 1),
    "the verdict": ("lit_align.evaluation.held_out", "Evaluator.evaluate", 1),
}
LIGHT = {("scoring", KILLED, 1)}
CASES = [
    pytest.param(moment, signum, who, marks=() if (moment, signum, who) in LIGHT else pytest.mark.slow)
    for moment in MOMENTS
    for signum in (KILLED, STOPPED)
    for who in (0, 1)
]


def train(model: str, folder: Path) -> None:
    """Rounds with refreshes and a verdict, as one of two processes."""
    data = on_policy(folder, batch_size=2, sampling_batch_size=4)
    verdict = WinRate(data.prompts, FunctionScorer("rewards.py:reward"), responses_per_prompt=1)
    module = DPO(PolicyConfig(model, dtype="float32"), optimizer=adamw())
    acting = [ReferenceRefresh(0.5, 1), verdict, PeerWatching(MINUTES)]
    fit(module, data, *acting, strategy="ddp", devices=2, default_root_dir=folder)


@pytest.mark.parametrize(("moment", "signum", "who"), CASES)
def test_a_lost_process_ends_both_with_one_message(tiny_model, in_tmp, moment, signum, who):
    def run() -> None:
        if int(os.environ["RANK"]) == who:
            die_at(*MOMENTS[moment], signum)
        train(tiny_model, in_tmp)

    codes, printed = endings(2, run)
    assert codes == ([-KILLED, 1] if who == 0 else [1, -KILLED]), printed
    messages = [line for line in printed.splitlines() if line.startswith("error: ")]
    how = "has died" if signum == KILLED else "has not responded for 0.25 minutes and is killed"
    assert len(messages) == 1, printed
    assert f"error: process {who} (id " in messages[0]
    assert f" {how}, and the run ends in all processes." in messages[0]
    assert "Traceback" not in printed


def loop() -> None:
    while True:
        pass


HANGS = {
    "sleeps": lambda: time.sleep(1e9),
    "loops": loop,
    "holds Python": lambda: re.match("(a+)+$", "a" * 60 + "b"),  # a pattern of a reward, which no thread interrupts
}


@pytest.mark.slow
@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("moment", ["a training step", "a refresh", "the verdict"])
def test_a_process_whose_python_hangs_ends_both_and_is_named(tiny_model, in_tmp, moment, hang, who):
    def run() -> None:
        if int(os.environ["RANK"]) == who:
            act_at(*MOMENTS[moment], HANGS[hang])
        train(tiny_model, in_tmp)

    codes, printed = endings(2, run)
    assert None not in codes, printed
    messages = [line for line in printed.splitlines() if line.startswith("error: ")]
    how = "has not responded for" if hang == "holds Python" else "has kept the others waiting for"
    assert len(messages) == 1, printed
    assert f"error: process {who} (id " in messages[0]
    assert f" {how} 0.25 minutes and is killed, and the run ends in all processes. It was last in: " in messages[0]
    assert "tests/callbacks/test_peer_watching.py:" in messages[0] or hang == "holds Python"
    assert "Traceback" not in printed


BEFORE = {
    "before it starts": ("lightning.pytorch.strategies", "DDPStrategy.setup_environment", "only 1 of 2 processes have"),
    "in setup": ("lit_align.data", "OfflinePairs.setup", "a process has not joined within 0.05 minutes"),
}


@pytest.mark.parametrize("moment", ["before it starts", pytest.param("in setup", marks=pytest.mark.slow)])
def test_a_process_that_dies_before_the_watch_ends_the_other_in_time(tiny_model, in_tmp, moment):
    where, what, message = BEFORE[moment]
    write_pairs(in_tmp)
    options = f"--model=SFT --model.policy.path={tiny_model} --data=OfflinePairs --data.train=pairs.jsonl"
    options += " --data.wait_minutes=0.05 --trainer.accelerator=cpu --trainer.strategy=ddp --trainer.devices=2"

    def run() -> None:
        if os.environ["RANK"] == "1":
            die_at(where, what, 1)
        main(["fit", *options.split(), "--trainer.default_root_dir=run"])

    codes, printed = endings(2, run)
    assert codes == [2, -KILLED], printed
    (said,) = [line for line in printed.splitlines() if "error: " in line]
    assert said.startswith(f"error: {message}"), printed
    assert "Traceback" not in printed
