"""`VLLMSampler` with the real engine, where vLLM is installed: `make test-vllm`.

Greedy choices are compared in float32, where vLLM and transformers round too little to disagree.
"""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from served import check_changed_bit, move
from tiny import byte_tokenizer, llama_config
from transformers import LlamaForCausalLM

from lit_align.data import GenerateSampler, Sampler, SampleRequest, Sampling, VLLMSampler
from lit_align.data.generation import filtered_probabilities
from lit_align.data.sampling import Response
from lit_align.errors import UserError
from lit_align.policy import LoRAConfig, Policy, PolicyConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

ROOT = Path(__file__).parents[3]
SMOLLM2 = ROOT / "data/quickstart/model"
PROMPTS = [list(range(70, 150)), [80], list(range(70, 150)), [90, 91, 92]]
LONGEST, LONGER = 120, 320
MEMORY = 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tied Llama whose heads are large enough for vLLM's attention."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(hidden_size=128, tie_word_embeddings=True)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(model) -> Policy:
    return Policy.load(PolicyConfig(model))


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMSampler]:
    """One engine for all tests."""
    sampler = VLLMSampler(MEMORY)
    yield sampler
    sampler.stop()


def sample(
    sampler: Sampler,
    policy: Policy,
    keys: str = "abcd",
    count: int = 2,
    prompts: list[list[int]] = PROMPTS,
    end: tuple[int, ...] = (0, 5),
    longest: int = LONGEST,
    **sampling: Any,
) -> list[list[Response]]:
    options = Sampling(**({"max_new_tokens": 20} | sampling))
    with sampler.ready(policy, torch.float32, longest):
        return sampler.sample(policy, SampleRequest(prompts, list(keys), count, options, end))


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_each_refresh_of_a_tied_model_samples_with_the_new_weights(model, engine, lora):
    policy, seen = Policy.load(PolicyConfig(model), lora), []
    for _ in range(3):
        expected = sample(GenerateSampler(), policy, temperature=0)
        assert sample(engine, policy, temperature=0) == expected
        assert expected not in seen
        seen.append(expected)
        move(policy)


def test_one_changed_bit_is_noticed(policy, engine):
    check_changed_bit(engine, policy, LONGEST)


def test_a_batch_gives_the_same_responses_after_other_batches(policy, engine):
    first = sample(engine, policy)
    other = sample(engine, policy, keys="efgh")
    assert sample(engine, policy) == first
    assert other != first
    assert all(group[0] != group[1] for group in first)


def test_the_end_tokens_given_end_a_response_and_no_others(policy, engine):
    free = sample(engine, policy, temperature=0, end=(258,))
    token = free[1][0].ids[4]
    ended = sample(engine, policy, temperature=0, end=(token,))
    assert ended == sample(GenerateSampler(), policy, temperature=0, end=(token,))
    assert ended[1][0].finished
    assert ended[1][0].ids[-1] == token


def test_a_stop_string_ends_a_response(policy, engine):
    free = [r for group in sample(engine, policy, count=4) for r in group]
    letter = next(c for r in free for c in r.text[3:] if c.isascii() and c.isalnum())
    stopped = [r for group in sample(engine, policy, count=4, stop=[letter]) for r in group]
    assert any(letter in response.text for response in free)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.partition(letter)[0]
        assert after.finished == (before.finished or letter in before.text)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {}], ids=str)
def test_first_tokens_follow_the_filtered_distribution(policy, engine, filters):
    """Frequencies against the model's own, rare tokens counted together; 4.5 standard errors."""
    rows, sampling = 400, Sampling(max_new_tokens=1, temperature=0.7, **filters)
    with engine.ready(policy, torch.float32, LONGEST):
        sampled = engine.sample(policy, SampleRequest([PROMPTS[1]], ["a"], rows, sampling, [258]))
    with torch.no_grad():
        expected = filtered_probabilities(policy.model(torch.tensor([PROMPTS[1]])).logits[0, -1:], sampling)[0]
    expected /= expected.sum()
    found = torch.bincount(torch.tensor([response.ids[0] for response in sampled[0]]), minlength=259) / rows
    assert not found[expected == 0].any()
    rare = expected < 0.02
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    found = torch.cat([found[~rare], found[rare].sum(0, keepdim=True)])
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / rows).sqrt() + 1e-6).all()


def process_state() -> list[Any]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)]
    threads = torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0)
    rng = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    return [handlers, threads, rng, dist.is_initialized()]


def test_a_longer_prompt_restarts_the_engine_and_changes_nothing_here(policy, engine):
    """The engine is that of the longer prompt; this process keeps its random state, threads, signals and modules."""
    request = SampleRequest(
        [[70 + i % 100 for i in range(300)]], ["a"], 1, Sampling(max_new_tokens=20, temperature=0), [0]
    )
    expected = GenerateSampler()
    with expected.ready(policy, torch.float32, LONGER):
        responses = expected.sample(policy, request)
    before, environment, threads = process_state(), dict(os.environ), threading.active_count()
    with engine.ready(policy, torch.float32, LONGER):
        assert engine.sample(policy, request) == responses
    assert process_state() == before
    assert dict(os.environ) == environment
    assert threading.active_count() <= threads
    assert "vllm" not in sys.modules


def test_an_engine_that_is_killed_is_named_and_starts_again(policy, engine):
    expected = sample(engine, policy, longest=LONGER)
    os.kill(engine._engine._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"vLLM's process ended with exit code -9, perhaps for lack of memory"):
        sample(engine, policy, longest=LONGER)
    assert sample(engine, policy, longest=LONGER) == expected


def test_a_failure_in_vllm_stops_the_round_with_its_message(policy, engine):
    with pytest.raises(UserError, match=r"VLLMSampler: vLLM failed: .*Error: .*Else use ContinuousBatching"):
        sample(engine, policy, prompts=[[70] * (LONGER + 1)], keys="a", longest=LONGER)


# --- runs ---

RUN = """
import os, signal, sys
from pathlib import Path
from tiny import adamw, fit, on_policy
from lit_align.data import VLLMSampler
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig

model, store, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Sampler(VLLMSampler):
    batches = 0

    def sample(self, policy, request):
        self.batches += 1
        if self.batches == kill_at:
            print("engine", self._engine._process.pid, flush=True)
            self._engine.ask("sleep")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(policy, request)

data = on_policy(Path.cwd(), sampler=Sampler(0.1), store=store)
fit(DPO(PolicyConfig(model), proximal=0.1, optimizer=adamw()), data, max_epochs=2)
"""


def run(folder: Path, model: str, store: str, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", RUN, model, store, str(kill_at)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def files(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name[:9]}/{path.name}": path.read_bytes() for path in folder.glob("*/*.parquet")}


def test_a_killed_run_resumes_to_the_same_bytes_and_leaves_no_engine(model, tmp_path):
    killed = run(tmp_path, model, "killed", kill_at=4)
    assert killed.returncode == -signal.SIGKILL
    pid = int(killed.stdout.partition("engine ")[2].split()[0])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)

    resumed, whole = run(tmp_path, model, "killed"), run(tmp_path, model, "whole")
    for each in (resumed, whole):
        assert each.returncode == 0
        assert "Traceback" not in each.stderr
        assert "sync_dist" not in each.stderr
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) >= 8


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="data/quickstart is not prepared: make install")
def test_smollm2_in_bfloat16_takes_new_weights_twice(capsys):
    policy, sampler = Policy.load(PolicyConfig(str(SMOLLM2))), VLLMSampler(MEMORY)
    prompts = [policy.tokenizer.encode(f"The number {i} is", add_special_tokens=False) for i in range(8)]
    request = SampleRequest(prompts, range(8), 4, Sampling(max_new_tokens=16), [policy.tokenizer.eos_token_id])
    seen = []
    for _ in range(3):
        with sampler.ready(policy, torch.bfloat16, 64):
            sampled = sampler.sample(policy, request)
            assert sampler.sample(policy, request) == sampled
        assert len({tuple(response.ids) for group in sampled for response in group}) == 32
        assert sampled not in seen
        seen.append(sampled)
        with torch.no_grad():
            policy.model.get_input_embeddings().weight.mul_(1.02)
    sampler.stop()
