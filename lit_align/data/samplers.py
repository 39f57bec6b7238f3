"""Samplers: engines that sample a round's responses with the policy's current weights.

    GenerateSampler             transformers' `generate`, a batch of prompts at once (`sampling.py`); the default
    ContinuousBatchingSampler   transformers' continuous batching: a response that ends makes room for the next
    VLLMSampler                 vLLM's engine on the GPU that trains, asleep between rounds; not run by us yet

Before a round's first response, each proves bit by bit that its weights are the policy's (`check_weights`). No sampler
influences log π_s: the policy itself computes it from the sampled tokens.
"""

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from lit_align.data.sampling import Response, Sampling, cut, sample_responses, seed_of, without_generation_defaults
from lit_align.errors import UserError
from lit_align.packing import PACKED
from lit_align.policy import Policy
from lit_align.sharding import full_tensor, rank


@dataclass(frozen=True)
class SampleRequest:
    """One batch of prompts, and how to sample the responses to them."""

    prompts: Sequence[list[int]]  # token ids of each prompt
    keys: Sequence[Hashable]  # identifies each prompt's random streams
    count: int  # responses to each prompt
    sampling: Sampling
    end_ids: Sequence[int]  # tokens that end a response

    def grouped(self, tokens: Sequence[list[int]], tokenizer: Any) -> list[list[Response]]:
        """The responses of each prompt, decoded and cut at stop strings, from the tokens of all responses in order."""
        responses = [cut(ids, tokenizer, self.sampling.stop, self.end_ids) for ids in tokens]
        return [responses[start : start + self.count] for start in range(0, len(responses), self.count)]


class Sampler(ABC):
    """Samples responses. A round loads the policy's weights, samples all its batches, and frees what it can."""

    @property
    def identity(self) -> str:
        """All that determines the samples except weights, prompts and `Sampling`; part of a round's key."""
        return type(self).__name__

    @abstractmethod
    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        """Take the policy's current weights, in this type; if they are sharded, every process calls it."""

    @abstractmethod
    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether it samples with exactly these weights, bit by bit. It reads all of them, even after a difference."""

    @abstractmethod
    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        """The responses to each prompt of one batch; the policy's tokenizer decodes them."""

    @abstractmethod
    def release(self) -> None:
        """Free memory that training could use; called after a round is sampled, or fails."""

    @contextmanager
    def ready(self, policy: Policy, dtype: torch.dtype) -> Iterator[None]:
        """Within this context, sample with the policy's current weights."""
        try:
            self.load(policy, dtype)
            check_weights(self, policy, dtype)
            yield
        finally:
            self.release()


class _TransformersSampler(Sampler):
    """A sampler that runs a copy of the policy in transformers."""

    _model: PreTrainedModel | None = None

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        self._model = policy.merged_copy(dtype)

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        own = dict(self.model.named_parameters())
        same = [name in own and _same_bits(own.pop(name), weight) for name, weight in weights]
        return all(same) and not own

    def release(self) -> None:
        self._model = None

    @property
    def model(self) -> PreTrainedModel:
        assert self._model is not None, "call load before sample"
        return self._model


class GenerateSampler(_TransformersSampler):
    """transformers' `generate`: a batch continues until its last response has ended.

    Each sample has its own random stream: equal weights and batches give equal bytes, regardless of which process
    samples them, and how often.
    """

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        return sample_responses(
            self.model,
            policy.tokenizer,
            request.prompts,
            request.keys,
            request.count,
            request.sampling,
            request.end_ids,
        )


class ContinuousBatchingSampler(_TransformersSampler):
    """transformers' continuous batching: a response that ends makes room for the next, and no token is padding.

    It is faster on GPUs if responses differ much in length and data.sampling_batch_size is large. A batch has one
    random stream: sampling it again on the same machine gives the same samples, but each sample depends on the rest of
    the batch. Stop strings (data.sampling.stop) are searched when a response is complete; the tokens after them are
    discarded.

    Args:
        cache_tokens: Most tokens of prompts and responses in memory at the same time; the rest of a batch waits.
    """

    PAGE = 32
    """Tokens in a block of the cache; on GPUs 256, which fast attention needs."""

    def __init__(self, cache_tokens: int = 1 << 16):
        if cache_tokens < 256:
            raise UserError(f"data.sampler.cache_tokens={cache_tokens} must be at least 256. Raise it.")
        self.cache_tokens = cache_tokens

    @property
    def identity(self) -> str:
        return f"ContinuousBatchingSampler of {self.cache_tokens} tokens"

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        super().load(policy, dtype)
        if self.model.config._attn_implementation == PACKED:  # transformers has no paged version of it
            self.model.set_attn_implementation("sdpa")

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
        seed = seed_of("batch", *request.keys) >> 1
        return request.grouped(self._generate(prompts, seed, request.sampling, request.end_ids), policy.tokenizer)

    def _generate(
        self, prompts: Sequence[list[int]], seed: int, sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        with without_generation_defaults(self.model), torch.random.fork_rng():
            manager: Any = self.model.init_continuous_batching(  # type: ignore[operator]
                generation_config=_generation_config(sampling, end_ids),
                continuous_batching_config=self._config(prompts, seed, sampling),
            )
            # all requests are queued before the first step, so that timing does not decide which requests share a step
            names = manager.add_requests(prompts, max_new_tokens=sampling.max_new_tokens)
            manager.warmup()
            manager.start()
            try:
                return _results(manager, names)
            finally:
                manager.stop(hard_stop=True)  # after a failure, do not wait for the other requests
                manager.destroy()

    def _config(self, prompts: Sequence[list[int]], seed: int, sampling: Sampling) -> ContinuousBatchingConfig:
        page = 256 if self.model.device.type == "cuda" else self.PAGE
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        each = -(-longest // page) + 1
        if each * page > self.cache_tokens:
            raise UserError(
                f"data.sampler.cache_tokens={self.cache_tokens} must be at least {each * page}, for one prompt and "
                f"its response of up to {longest} tokens in all. Raise it."
            )
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=min(each * len(prompts), self.cache_tokens // page),
            max_batch_tokens=max(1024, len(prompts)),
            seed=seed - rank(),  # transformers adds the rank; a batch must not depend on the process that samples it
            drop_unsupported_processors=False,
        )


def _generation_config(sampling: Sampling, end_ids: Sequence[int]) -> GenerationConfig:
    filters = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        **(filters if sampling.temperature > 0 else {}),
    )


def _results(manager: Any, names: Sequence[str]) -> list[list[int]]:
    """Tokens of each request, in the order of their names."""
    done: dict[str, list[int]] = {}
    while len(done) < len(names):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise _failed(f"it ended with {len(done)} of {len(names)} responses")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise _failed(result.error)
            done[result.request_id] = result.generated_tokens
    return [done[name] for name in names]


def _failed(what: str) -> UserError:
    return UserError(
        f"data.sampler=ContinuousBatchingSampler: transformers' continuous batching failed: {what}. Not every "
        "model supports it. Use GenerateSampler; the responses sampled so far are kept."
    )


class VLLMSampler(Sampler):
    """vLLM's engine, on the one GPU that also trains. Not run by us, since vLLM was not available; see the README.

    The engine is created once, without weights. Each round wakes it, loads the policy's weights in place, empties its
    prompt cache, and puts it to sleep again; asleep, it holds neither weights nor cache. Each sample has its own seed,
    but vLLM does not promise equal bytes if a batch is sampled again. Needs `pip install 'lit-align[vllm]'`.

    Args:
        memory: Share of the GPU's memory that the engine may use while it samples; the trained model stays in memory.
    """

    def __init__(self, memory: float = 0.4):
        if not 0 < memory < 1:
            raise UserError(f"data.sampler.memory={memory} must be in (0, 1), a share of the GPU's memory. Change it.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "data.sampler=VLLMSampler needs vllm, which is not installed. Run pip install 'lit-align[vllm]', or "
                f"{_INSTEAD}."
            )
        if not torch.cuda.is_available():
            raise UserError(f"data.sampler=VLLMSampler needs a CUDA GPU, and there is none. Instead {_INSTEAD}.")
        self.memory = memory
        self._engine: Any = None

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                f"data.sampler=VLLMSampler works with one process only. Set trainer.devices=1, or {_INSTEAD}."
            )
        if self._engine is None:
            self._engine = self._start(policy, dtype)
        else:
            self._engine.wake_up(tags=["weights"])
        weights = [(name, value.detach().to(dtype)) for name, value in policy.full_weights()]
        self._engine.apply_model(lambda model: model.load_weights(weights))
        self._engine.wake_up(tags=["kv_cache"])
        self._engine.reset_prefix_cache()  # it was computed with the old weights

    def _start(self, policy: Policy, dtype: torch.dtype) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # the engine runs in this process, so that it can take the weights
        )
        from vllm import LLM  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory() as folder:
            policy.model.config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            engine = LLM(
                model=folder,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=self.memory,
                enable_sleep_mode=True,
                seed=0,
            )
        engine.sleep(level=2)
        engine.wake_up(tags=["weights"])
        return engine

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        theirs = self._engine.apply_model(lambda model: weight_sums(model.parameters()))[0]
        return theirs == weight_sums(weight for _, weight in weights)

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        options = {
            "max_tokens": request.sampling.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": request.sampling.top_k or -1,
            "stop": request.sampling.stop,
            "include_stop_str_in_output": True,  # `cut` removes it from the text, and keeps its tokens
            "stop_token_ids": list(request.end_ids),
        }
        seeded = [
            (prompt, seed_of(key, k))
            for prompt, key in zip(request.prompts, request.keys, strict=True)
            for k in range(request.count)
        ]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in seeded],
            [SamplingParams(seed=seed, **options) for _, seed in seeded],
            use_tqdm=False,
        )
        return request.grouped([list(each.outputs[0].token_ids) for each in outputs], policy.tokenizer)

    def release(self) -> None:
        if self._engine is not None:
            self._engine.sleep(level=2)  # neither weights nor cache


_INSTEAD = "use ContinuousBatchingSampler or GenerateSampler"


def _bits(weight: Tensor) -> Tensor:
    """A weight's bits, read as integers."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().contiguous().view(integer)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def weight_sums(weights: Iterable[Tensor]) -> tuple[int, int]:
    """Σ b and Σ b² over the bits of all weights, read as integers, modulo 2⁶⁴.

    Exact, and independent of how an engine stacks weights, orders their rows, or pads them with zeros.
    """
    total = squares = 0
    for weight in weights:
        for chunk in _bits(weight).view(-1).split(1 << 18):  # fits into the CPU's cache
            wide = chunk.long()
            total += int(wide.sum())
            squares += int((wide * wide).sum())
    return total % 2**64, squares % 2**64


@torch.no_grad()
def check_weights(sampler: Sampler, policy: Policy, dtype: torch.dtype) -> None:
    """Check that a sampler samples with the policy's weights.

    Raises:
        UserError: it has other weights.
    """
    if not sampler.weights_match((name, full_tensor(value).to(dtype)) for name, value in policy.full_weights()):
        raise UserError(
            f"data.sampler={type(sampler).__name__} does not have the policy's weights, so its samples would be "
            "another model's. This engine does not support this model. Use GenerateSampler."
        )
