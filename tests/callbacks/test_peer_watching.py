"""A process of two that dies or hangs ends both, with one message; real processes, killed and stopped by signals."""

import os
import signal
import time

import pytest
from processes import die_at, endings
from tiny import adamw, fit, on_policy

from lit_align.callbacks import PeerWatching, ReferenceRefresh, WinRate
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


@pytest.mark.parametrize(("moment", "signum", "who"), CASES)
def test_a_lost_process_ends_both_with_one_message(tiny_model, in_tmp, moment, signum, who):
    def run() -> None:
        if int(os.environ["RANK"]) == who:
            die_at(*MOMENTS[moment], signum)
        data = on_policy(in_tmp, batch_size=2, sampling_batch_size=4)
        verdict = WinRate(data.prompts, FunctionScorer("rewards.py:reward"), responses_per_prompt=1)
        module = DPO(PolicyConfig(tiny_model, dtype="float32"), optimizer=adamw())
        acting = [ReferenceRefresh(0.5, 1), verdict, PeerWatching(MINUTES)]
        fit(module, data, *acting, strategy="ddp", devices=2, default_root_dir=in_tmp)

    started = time.monotonic()
    codes, printed = endings(2, run)
    assert codes == ([-KILLED, 1] if who == 0 else [1, -KILLED]), printed
    assert time.monotonic() - started < 58
    messages = [line for line in printed.splitlines() if line.startswith("error: ")]
    how = "has died" if signum == KILLED else "has not responded for 0.25 minutes and is ended"
    assert len(messages) == 1, printed
    assert f"error: process {who} (id " in messages[0]
    assert f" {how}, and the run ends in all processes." in messages[0]
    assert "Traceback" not in printed
