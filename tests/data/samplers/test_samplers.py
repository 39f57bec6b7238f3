"""Samplers: the same responses from every engine where the choice is greedy, and always with the policy's weights."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import adamw, fit, on_policy

from lit_align.data import ContinuousBatchingSampler, GenerateSampler, Sampler, SampleRequest, Sampling, VLLMSampler
from lit_align.data.samplers.base import check_weights
from lit_align.data.samplers.fastest import fastest_sampler
from lit_align.data.samplers.weights import CHUNK, weight_sums
from lit_align.data.sampling import Response
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, Policy, PolicyConfig

PROMPTS = [list(range(70, 150)), [80], list(range(70, 150)), [90, 91, 92]]  # two share pages of the cache
END = [0, 5]
LONGEST = 400
ENGINES = {"generate": GenerateSampler, "continuous": ContinuousBatchingSampler}


@pytest.fixture(scope="module")
def policy(tiny_model):
    return Policy.load(PolicyConfig(tiny_model))


def sample(
    sampler: Sampler, policy: Policy, keys: str = "abcd", count: int = 2, end: list[int] = END, **sampling: Any
) -> list[list[Response]]:
    options = Sampling(**({"max_new_tokens": 20} | sampling))
    with sampler.ready(policy, torch.float32, LONGEST):
        return sampler.sample(policy, SampleRequest(PROMPTS, list(keys), count, options, end))


@pytest.mark.parametrize("cache_tokens", [1 << 16, 256], ids=["all at once", "one waits for another"])
def test_greedy_continuous_batching_equals_generate(policy, cache_tokens):
    end = [0, sample(GenerateSampler(), policy, temperature=0)[1][0].ids[9]]
    expected = sample(GenerateSampler(), policy, temperature=0, end=end)
    assert sample(ContinuousBatchingSampler(cache_tokens), policy, temperature=0, end=end) == expected
    assert {response.finished for group in expected for response in group} == {True, False}


def test_continuous_batching_repeats_a_batch_and_leaves_torchs_rng(policy):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = sample(ContinuousBatchingSampler(), policy)
    assert sample(ContinuousBatchingSampler(), policy) == first
    assert torch.equal(torch.rand(2), expected)
    assert sample(ContinuousBatchingSampler(), policy, keys="efgh") != first
    assert all(group[0] != group[1] for group in first)


def test_continuous_batching_follows_the_filtered_distribution(policy):
    """Frequencies of the first token against the model's own, with temperature and top-k; 4 standard errors."""
    rows, sampler = 400, ContinuousBatchingSampler()
    sampling = Sampling(max_new_tokens=1, temperature=0.7, top_k=5)
    with sampler.ready(policy, torch.float32, LONGEST):
        sampled = sampler.sample(policy, SampleRequest([PROMPTS[1]], ["a"], rows, sampling, END))
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.7
    expected = torch.zeros_like(logits)
    best = logits.topk(5)
    expected[best.indices] = best.values.softmax(-1)
    found = torch.bincount(torch.tensor([response.ids[0] for response in sampled[0]]), minlength=len(logits)) / rows
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt()).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_string_ends_a_response_with_every_sampler(policy, engine):
    sampler = ENGINES[engine]()
    free = [r for group in sample(sampler, policy, count=4) for r in group]
    letter = next(c for r in free for c in r.text[3:] if c.isascii() and c.isalnum())
    stopped = [r for group in sample(sampler, policy, count=4, stop=[letter]) for r in group]
    assert any(letter in response.text for response in free)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.partition(letter)[0]
        assert after.finished == (before.finished or letter in before.text)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_models_own_repetition_penalty_does_not_bend_the_policy(tiny_model, policy, engine):
    """Chat models are published with one, and transformers applies it wherever it is not overridden."""
    bent = Policy.load(PolicyConfig(tiny_model))
    bent.model.generation_config.repetition_penalty = 5.0
    bent.model.generation_config.eos_token_id = 7
    assert sample(ENGINES[engine](), bent) == sample(ENGINES[engine](), policy)
    assert bent.model.generation_config.repetition_penalty == 5.0


def test_a_cache_too_small_for_one_response_is_refused(policy):
    with pytest.raises(UserError, match=r"cache_tokens=256 must be at least 416, .* of up to 380 tokens"):
        sample(ContinuousBatchingSampler(256), policy, max_new_tokens=300)
    with pytest.raises(UserError, match="cache_tokens=8 must be at least 256"):
        ContinuousBatchingSampler(8)


def test_a_failure_in_continuous_batching_stops_the_round(policy, monkeypatch):
    sampler = ContinuousBatchingSampler()
    sampler.load(policy, torch.float32, LONGEST)
    monkeypatch.setattr(sampler.model.model, "forward", None)
    with pytest.raises(UserError, match=r"continuous batching failed: .*Use GenerateSampler"):
        sampler.sample(policy, SampleRequest(PROMPTS, "abcd", 1, Sampling(max_new_tokens=2), END))


def test_auto_takes_vllm_where_one_process_trains_on_a_gpu(monkeypatch):
    def sampler(processes: int, device: str) -> Sampler:
        strategy = SimpleNamespace(root_device=torch.device(device))
        return fastest_sampler(SimpleNamespace(world_size=processes, strategy=strategy))  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(sampler(1, "cuda"), GenerateSampler)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert isinstance(sampler(1, "cuda"), VLLMSampler)
    assert isinstance(sampler(2, "cuda"), GenerateSampler)
    assert isinstance(sampler(1, "cpu"), GenerateSampler)


# --- the weights are the policy's ---


def test_the_sums_of_weights_change_with_a_single_bit():
    a, b = torch.randn(6, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    stacked = torch.cat([b, a[torch.randperm(6)], torch.zeros(3, 4, dtype=torch.bfloat16)])
    assert weight_sums([stacked]) == weight_sums([a, b])
    changed = a.clone()
    changed.view(torch.int16)[2, 1] += 1
    assert weight_sums([changed, b]) != weight_sums([a, b])


def test_the_sums_of_weights_are_exact_beyond_one_chunk():
    extreme = torch.full((CHUNK["cpu"] + 3,), -(2**15), dtype=torch.int16)
    mixed = torch.arange(-5, 2**15, dtype=torch.int16)
    integers = [int(bits) for bits in torch.cat([extreme, mixed])]
    expected = sum(integers) % 2**64, sum(bits**2 for bits in integers) % 2**64
    assert (
        weight_sums([extreme.view(torch.bfloat16), mixed[:0].view(torch.bfloat16), mixed.view(torch.float16)])
        == expected
    )


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_matches_the_policy_until_the_policy_moves(tiny_model, lora, dtype):
    policy, sampler = Policy.load(PolicyConfig(tiny_model, dtype="float32"), lora), GenerateSampler()
    sampler.load(policy, dtype, LONGEST)
    check_weights(sampler, policy, dtype)
    with torch.no_grad():
        for _, weight in policy.trainable_weights():
            weight.add_(0.01)
    with pytest.raises(UserError, match="GenerateSampler does not have the policy's weights"):
        check_weights(sampler, policy, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_copy_that_differs_in_one_bit_is_refused(policy, dtype):
    sampler = GenerateSampler()
    sampler.load(policy, dtype, LONGEST)
    weight = sampler.model.model.norm.weight
    weight.data.view(torch.uint8)[0] ^= 1
    with pytest.raises(UserError, match="GenerateSampler does not have the policy's weights"):
        check_weights(sampler, policy, dtype)
    weight.data.view(torch.uint8)[0] ^= 1
    check_weights(sampler, policy, dtype)


class Stale(GenerateSampler):
    """Keeps the weights of its first round."""

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        if self._model is None:
            super().load(policy, dtype, longest)

    def release(self) -> None:
        pass


def test_a_sampler_with_old_weights_samples_nothing(tiny_model, in_tmp):
    module = DPO(PolicyConfig(tiny_model), optimizer=adamw())
    with pytest.raises(UserError, match=r"data.sampler=Stale does not have the policy's weights"):
        fit(module, on_policy(in_tmp, sampler=Stale()), max_epochs=2)
    assert len(list(Path("rounds").glob("round_000*/samples-*"))) == 2
    assert not list(Path("rounds").glob("round_001*/samples-*"))


# --- rounds ---


def files(folder: str) -> dict[str, bytes]:
    return {f"{path.parent.name[:9]}/{path.name}": path.read_bytes() for path in Path(folder).glob("*/*.parquet")}


def test_continuous_batching_samples_a_round_in_the_same_bytes(tiny_model, in_tmp):
    for store in ("first", "second"):
        data = on_policy(in_tmp, sampler=ContinuousBatchingSampler(), store=store)
        fit(DPO(PolicyConfig(tiny_model), proximal=0.1, optimizer=adamw()), data)
    assert files("first") == files("second")
