"""`VLLMSampler` without vLLM: what it says, what its process is given, and how weights travel and are proved."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer

from lit_align.data import SampleRequest, Sampling, VLLMSampler
from lit_align.data.samplers.vllm import engine_environment
from lit_align.data.samplers.vllm_engine import received_weights, send_weight
from lit_align.data.samplers.vllm_options import Completion, GenerateOptions, SeededPrompt, complete_all
from lit_align.data.samplers.vllm_weights import multiplies_by_its_weight
from lit_align.errors import UserError


def test_a_share_of_the_memory_is_between_0_and_1():
    with pytest.raises(UserError, match=r"data.sampler.memory=1.5 must be in \(0, 1\)"):
        VLLMSampler(1.5)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_message_says_what_to_install():
    with pytest.raises(UserError, match=r"not installed. Run pip install 'lit-align\[vllm\]', without a GPU pip"):
        VLLMSampler()


def test_the_engine_gets_the_policys_gpu_and_no_process_group():
    ours = {"CUDA_VISIBLE_DEVICES": "3,5", "RANK": "1", "MASTER_ADDR": "x", "HOME": "y"}
    theirs = engine_environment(ours, torch.device("cuda", 1))
    assert theirs["CUDA_VISIBLE_DEVICES"] == "5"
    assert theirs["HOME"] == "y"
    assert not {"RANK", "MASTER_ADDR"} & set(theirs)
    assert engine_environment({}, torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment({}, torch.device("cpu"))


def test_the_engines_idle_threads_leave_the_cores_to_training():
    def spins(**ours: str) -> str | None:
        return engine_environment(ours, torch.device("cpu")).get("GOMP_SPINCOUNT")

    assert spins() == "1000"
    assert spins(GOMP_SPINCOUNT="5") == "5"
    assert spins(OMP_WAIT_POLICY="PASSIVE") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_travel_to_another_process_unchanged(dtype):
    sent = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(4, 3).to(dtype).T, "c": torch.ones((), dtype=dtype)}
    near, far = Pipe()
    for name, weight in sent.items():
        send_weight(near, name, weight)
    near.send(None)
    received = {name: weight.clone() for name, weight in received_weights(far)}
    assert received.keys() == sent.keys()
    assert all(torch.equal(received[name], weight) for name, weight in sent.items())


def test_a_weight_may_be_larger_than_the_pipes_buffer():
    weight, (near, far) = torch.randn(1 << 20), Pipe()
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(send_weight, near, "w", weight)
        (_, received) = next(received_weights(far))
        sending.result()
    assert torch.equal(received, weight)


def test_a_sender_that_dies_ends_the_receiver():
    near, far = Pipe()
    near.send(("w", torch.Size([4]), torch.float32))
    near.close()
    with pytest.raises(EOFError):
        next(received_weights(far))


def test_a_response_that_holds_no_stop_string_is_sampled_again_without():
    tokenizer, asked = byte_tokenizer(), []
    whole, cut, again = (tokenizer(text).input_ids for text in ("a. ", "b", "b c."))

    def complete(prompts: Sequence[SeededPrompt], options: GenerateOptions) -> list[Completion]:
        asked.append((prompts, options.stop))
        return [Completion(whole, "."), Completion(cut, ".")] if options.stop else [Completion(again, None)]

    prompts = [([1], 10), ([2], 20)]
    request = SampleRequest([[1], [2]], ["x", "y"], 1, Sampling(stop=["."]), [0])
    assert complete_all(complete, prompts, GenerateOptions.of(request), tokenizer) == [whole, again]
    assert asked == [(prompts, ["."]), ([([2], 20)], [])]


def test_a_layer_that_multiplies_by_an_old_copy_is_found():
    weight = torch.randn(8, 200).bfloat16()
    old = weight.clone()
    layer = SimpleNamespace(weight=weight, cpu_linear=lambda x, weight, bias: x @ old.T)
    assert multiplies_by_its_weight(layer)
    weight[3, 199] += 1
    assert not multiplies_by_its_weight(layer)
