"""Sharded training with a served sampler: no process ever holds the whole model.

Memory is what no file backs (RssAnon); weights that are pages of their file can be dropped by the kernel. The C library
is told to give each tensor's memory back at once, so that the process has the memory that its tensors have.
"""

import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import run_in
from served import LoopbackServer
from tiny import byte_tokenizer, fit, llama_config, on_policy, sgd
from transformers import LlamaForCausalLM

from lit_align.callbacks import Drift, WinRate
from lit_align.callbacks.fsdp_sharding import FSDP2Strategy, FSDPSharding
from lit_align.data import FunctionScorer, OnPolicyPairs, Sampling, VLLMServerSampler
from lit_align.data.rounds.recorder import Recorder
from lit_align.evaluation.held_out import Evaluator
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig
from lit_align.reference.config import ReferenceConfig

LAYERS = 12
MMAP_THRESHOLD = -3  # in malloc.h


def anonymous_memory() -> int:
    """Memory of this process that no file backs, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peaks(threading.Thread):
    """The peak of each phase, beyond what the process had at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = anonymous_memory()
        self.phase = "between"
        self.of: dict[str, int] = {}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            phase, now = self.phase, anonymous_memory() - self.first
            self.of[phase] = max(self.of.get(phase, 0), now)
            time.sleep(0.001)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, patch: pytest.MonkeyPatch, kind: Any, name: str, phase: str) -> None:
        """Take the time in a method for a phase of its own."""
        method: Callable[..., Any] = getattr(kind, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return method(*args, **kwargs)

        patch.setattr(kind, name, watched)


def run(model: str, folder: Path, url: str) -> dict[str, int]:
    """One round with a recorded reference, drift from the start, validation, verdict and a checkpoint; gives peaks."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    data = on_policy(
        folder,
        sampler=VLLMServerSampler(url),
        sampling_dtype="policy",
        batch_size=1,
        prompts_per_round=6,
        responses_per_prompt=2,
        sampling_batch_size=2,
        sampling=Sampling(max_new_tokens=4),
    )
    few = folder / "few.jsonl"
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}:", "response": "some text"}) + "\n" for i in range(3))
    )
    few.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(keepends=True)[:3]))
    reference = ReferenceConfig(path=model, form="recorded")
    module = DPO(PolicyConfig(model, dtype="float32"), optimizer=sgd(), proximal=0.1, reference=reference)
    verdict = WinRate(
        str(few),
        FunctionScorer(f"{folder / 'rewards.py'}:reward"),
        forgetting={"few": str(folder / "texts.jsonl")},
        responses_per_prompt=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        peaks = Peaks()
        peaks.watch(patch, DPO, "configure_model", "start")
        peaks.watch(patch, FSDPSharding, "shard", "start")
        peaks.watch(patch, OnPolicyPairs, "_make_round", "round")
        peaks.watch(patch, Recorder, "with_reference", "log π_ref")
        peaks.watch(patch, Drift, "_measure", "drift")
        peaks.watch(patch, FSDP2Strategy, "optimizer_step", "training")
        peaks.watch(patch, Drift, "_kl_from_sampler", "drift at the end")
        peaks.watch(patch, Evaluator, "evaluate", "verdict")
        peaks.watch(patch, FSDP2Strategy, "save_checkpoint", "checkpoint")
        peaks.start()
        strategy = FSDP2Strategy(save_distributed_checkpoint=True)
        options = {"devices": 2, "default_root_dir": folder, "enable_checkpointing": True}
        fit(module, data, FSDPSharding(), Drift(prompts=2), verdict, strategy=strategy, **options)
        peaks.done.set()
    return peaks.of


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_model(tmp_path, in_tmp):
    """The file is in bfloat16 and the model in float32, so that all weights are converted."""
    shape: Any = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS}
    LlamaForCausalLM(llama_config(**shape)).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole = 2 * (tmp_path / "model.safetensors").stat().st_size
    server = LoopbackServer(str(tmp_path))
    found = run_in(2, lambda: run(str(tmp_path), in_tmp, server.url), timeout=600)
    share, block = whole / 2, whole / LAYERS
    beyond = block + 130 * 10**6  # what it computes with and imports, and less than the model
    shares = {
        "start": 1,
        "round": 1,
        "log π_ref": 2,  # and the reference's
        "drift": 2,  # and the start's
        "training": 2,  # and the gradients'
        "drift at the end": 2,
        "checkpoint": 1,
        "verdict": 2,
    }
    for peaks in found:
        assert peaks.keys() >= shares.keys()
        for phase, count in shares.items():
            assert peaks[phase] < count * share + beyond, f"{phase}: {peaks}"
