"""The time of an on-policy round with `data.rounds_ahead` 0 and 1: real fits of SmolLM2, one after the other.

Both forms sample the same prompts, record log π_s and train on the best and worst response. By default GenerateSampler
samples in the process that trains: in sequence with `--threads` threads, ahead with half of them for each side. With
`--url`, a vLLM server samples that `lit-align serve` has started; `--pad` has each batch take at least so many seconds,
as if the server were slower than it is and had cores of its own.

    python benchmarks/ahead.py                                      # two threads: 2 in sequence, 1 + 1 ahead
    python benchmarks/ahead.py --url http://127.0.0.1:8000 --pad 3

It prints medians over the rounds after the first two, in seconds: the whole round, its sampling and, in sequence, the
rest, which the training process does itself: new weights, log π_s, scores, training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from round import REWARD
from turns import weight_type

from lit_align.data import FunctionScorer, GenerateSampler, OnPolicyPairs, Sampling, VLLMServerSampler
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig


class Timed:
    """A sampler that keeps how long each round's batches took.

    Args:
        pad: Least seconds of a batch.
    """

    pad = 0.0
    seconds = 0.0

    def sample(self, policy: Any, request: Any) -> Any:
        started = time.perf_counter()
        sampled = super().sample(policy, request)  # type: ignore[misc]
        time.sleep(max(0.0, self.pad - (time.perf_counter() - started)))
        self.seconds += time.perf_counter() - started
        return sampled


class TimedGenerate(Timed, GenerateSampler):
    """In the process that trains."""


class TimedServer(Timed, VLLMServerSampler):
    """On a server."""


class Clock(L.Callback):
    """Keeps when each round's training begins, and how long all sampling has taken by then."""

    def __init__(self, sampler: Timed):
        self.sampler = sampler
        self.begins: list[float] = []
        self.sampled: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begins.append(time.perf_counter())
        self.sampled.append(self.sampler.seconds)


def fit(options: argparse.Namespace, ahead: Any) -> dict[str, float]:
    """The rounds of one form."""
    torch.set_num_threads(max(1, options.threads // (2 if ahead and not options.url else 1)))
    sampler: Any = TimedServer(options.url) if options.url else TimedGenerate()
    sampler.pad = options.pad
    clock = Clock(sampler)
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"Write one sentence about the number {i}:" for i in range(options.prompts)]
        Path(folder, "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        Path(folder, "reward.py").write_text(REWARD)
        data = OnPolicyPairs(
            f"{folder}/prompts.jsonl",
            FunctionScorer(f"{folder}/reward.py:reward"),
            sampling=Sampling(max_new_tokens=options.tokens),
            sampler=sampler,
            responses_per_prompt=options.responses,
            sampling_batch_size=options.responses * options.prompts,
            rounds_ahead=ahead,
            batch_size=8,
            store=f"{folder}/rounds",
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=options.rounds,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(DPO(PolicyConfig(options.model, dtype=weight_type()), schedule="constant"), data)
    whole = [later - begun for begun, later in zip(clock.begins, clock.begins[1:], strict=False)]
    sampling = [later - before for before, later in zip(clock.sampled, clock.sampled[1:], strict=False)]
    rows = {"round": whole, "sampling": sampling}
    if not ahead:
        rows["the rest"] = [each - used for each, used in zip(whole, sampling, strict=True)]
    return {name: statistics.median(values[1:]) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of the vLLM server")
    parser.add_argument("--pad", type=float, default=0.0, help="least seconds of a batch")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--responses", type=int, default=4, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="data/quickstart/model")
    parser.add_argument("--ahead", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ahead is not None:
        print(json.dumps(fit(options, options.ahead)))
        return
    for ahead in (0, 1):
        command = [sys.executable, *sys.argv, f"--ahead={ahead}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"rounds_ahead={ahead}: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
