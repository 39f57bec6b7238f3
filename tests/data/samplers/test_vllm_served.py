"""`VLLMServerSampler` with real servers, started by `lit-align serve`, where vLLM is installed: `make test-vllm`.

Greedy choices are compared in float32, where vLLM and transformers round too little to disagree.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import free_port, run_in
from served import check_changed_bit, check_same_samples, move, run
from tiny import byte_tokenizer, llama_config, write_prompts
from transformers import LlamaForCausalLM

from lit_align.data import GenerateSampler, Sampler, SampleRequest, Sampling, VLLMServerSampler
from lit_align.data.sampling import Response
from lit_align.policy import LoRAConfig, Policy, PolicyConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

ROOT = Path(__file__).parents[3]
PROMPTS = [list(range(70, 150)), [80], list(range(70, 150)), [90, 91, 92]]
LONGEST = 120
SECONDS_TO_START = 600


class Server:
    """`lit-align serve`, as a user runs it.

    Args:
        model: Folder of the policy.
        workers: Processes that share the model.
    """

    def __init__(self, folder: Path, model: str, workers: int):
        self.url = f"http://127.0.0.1:{free_port()}"
        sampler = {"url": self.url, "tensor_parallel": workers, "memory": 0.05}
        data = {
            "prompts": write_prompts(folder),
            "scorer": {"class_path": "FunctionScorer", "init_args": {"function": f"{folder}/rewards.py:reward"}},
            "sampler": {"class_path": "VLLMServerSampler", "init_args": sampler},
            "sampling_dtype": "policy",
        }
        config = {
            "model": {"class_path": "DPO", "init_args": {"policy": {"path": model}}},
            "data": {"class_path": "OnPolicyPairs", "init_args": data},
            "trainer": {"default_root_dir": str(folder)},
        }
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.log = (folder / "server.log").open("ab")
        self.start()

    def start(self) -> None:
        """Start, or start again at the same address."""
        command = [sys.executable, str(ROOT / "train.py"), "serve", "--config", str(self.config)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=10)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(Path(self.log.name).read_text()[-5000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tied Llama whose heads are large enough for vLLM's attention, and whose sizes three workers can share.

    The workers have copies of keys and values.
    """
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 192, "intermediate_size": 96}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 1}
    LlamaForCausalLM(llama_config(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[1, 3], ids=["one worker", "three workers"])
def server(request, model, tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"), model, request.param)
    try:
        running.wait()
        yield running
    finally:
        running.kill()


def sample(sampler: Sampler, policy: Policy, **sampling: Any) -> list[list[Response]]:
    options = Sampling(**({"max_new_tokens": 20} | sampling))
    with sampler.ready(policy, torch.float32, LONGEST):
        return sampler.sample(policy, SampleRequest(PROMPTS, list("abcd"), 2, options, [0, 5]))


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_each_refresh_of_a_tied_model_samples_with_the_new_weights(model, server, lora):
    policy, sampler, seen = Policy.load(PolicyConfig(model, dtype="float32"), lora), VLLMServerSampler(server.url), []
    for _ in range(3):
        expected = sample(GenerateSampler(), policy, temperature=0)
        assert sample(sampler, policy, temperature=0) == expected
        assert expected not in seen
        seen.append(expected)
        move(policy)


def test_one_changed_bit_is_noticed(model, server):
    check_changed_bit(VLLMServerSampler(server.url), Policy.load(PolicyConfig(model)), LONGEST)


def test_a_batch_gives_the_same_responses_again(model, server):
    policy, sampler = Policy.load(PolicyConfig(model)), VLLMServerSampler(server.url)
    first = sample(sampler, policy)
    assert sample(sampler, policy) == first
    assert all(group[0] != group[1] for group in first)


def test_a_stop_string_ends_a_response(model, server):
    policy, sampler = Policy.load(PolicyConfig(model)), VLLMServerSampler(server.url)
    free = [r for group in sample(sampler, policy) for r in group]
    letter = next(c for r in free for c in r.text[3:] if c.isascii() and c.isalnum())
    stopped = [r for group in sample(sampler, policy, stop=[letter]) for r in group]
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.partition(letter)[0]
        assert after.finished == (before.finished or letter in before.text)


@pytest.mark.parametrize("server", [3], indirect=True, ids=["three workers"])
def test_a_killed_server_that_restarts_changes_no_sample_of_two_processes(model, server, tmp_path):
    """One process samples undisturbed; two with FSDP2 lose the server in the second of two rounds."""
    run(model, tmp_path / "one", server.url, "auto", 0.0, None)

    def kill_and_restart() -> None:
        while len(list((tmp_path / "two").glob("rounds/round_001*/samples*"))) < 2:
            time.sleep(0.01)
        server.kill()
        server.start()

    killing = threading.Thread(target=kill_and_restart)
    killing.start()
    run_in(2, lambda: run(model, tmp_path / "two", server.url, "fsdp2", 0.0, None), timeout=SECONDS_TO_START)
    killing.join()
    check_same_samples(tmp_path / "one", tmp_path / "two")
