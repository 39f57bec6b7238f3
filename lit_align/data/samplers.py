"""Samplers: what draws a round's responses, with the policy's present weights.

    GenerateSampler     transformers' `generate`, a batch of prompts at once (`sampling.py`); the default
    ContinuousBatchingSampler   transformers' continuous batching: a response that ends makes room for the next
    VLLMSampler         vLLM's engine on the GPU that trains, asleep between rounds; not run by us yet

Before a round's first response each proves, bit by bit, that its weights are the policy's (`check_weights`). None of
them has a say in log π_s: the policy itself computes it of what was drawn.
"""

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from lit_align.data.sampling import Response, Sampling, cut, sample_responses, stream, without_generation_defaults
from lit_align.errors import UserError
from lit_align.packing import PACKED
from lit_align.policy import Policy
from lit_align.sharding import full_tensor, rank


class Sampler(ABC):
    """Draws responses. A round loads the policy's weights, draws batch after batch, and releases what is not needed."""

    @property
    def identity(self) -> str:
        """What decides the samples beside weights, prompts and `Sampling`; part of a round's key."""
        return type(self).__name__

    @abstractmethod
    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        """Take the policy's present weights, in this type; where they lie in shards, every process does."""

    @abstractmethod
    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        """Whether it draws with these weights and no others, bit by bit. Takes all of them, whatever it finds."""

    @abstractmethod
    def sample(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        keys: Sequence[Hashable],
        count: int,
        sampling: Sampling,
        end_ids: Sequence[int],
    ) -> list[list[Response]]:
        """`count` responses to each prompt of one batch.

        Args:
            policy: Whose tokenizer is meant.
            prompts: Token ids of each prompt.
            keys: What identifies each prompt's random streams.
            end_ids: Tokens that end a response.
        """

    @abstractmethod
    def release(self) -> None:
        """Free what a training step could use; called once a round is drawn, or failed."""

    @contextmanager
    def ready(self, policy: Policy, dtype: torch.dtype) -> Iterator[None]:
        """Draw meanwhile, with the policy's weights of now."""
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
        assert self._model is not None, "load comes before draw"
        return self._model


class GenerateSampler(_TransformersSampler):
    """transformers' `generate`: a batch goes on until its last response has ended.

    Each sample has a random stream of its own: from equal weights the same batches give the same bytes, however often
    they are drawn and by whatever process.
    """

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        keys: Sequence[Hashable],
        count: int,
        sampling: Sampling,
        end_ids: Sequence[int],
    ) -> list[list[Response]]:
        return sample_responses(self.model, policy.tokenizer, prompts, keys, count, sampling, end_ids)


class ContinuousBatchingSampler(_TransformersSampler):
    """transformers' continuous batching: a response that ends makes room for the next, and no token is padding.

    It pays on GPUs, for responses of very different length, with a large data.sampling_batch_size. A batch has one
    random stream: drawn again on the same machine it has the same samples, but each depends on those beside it. Strings
    of data.sampling.stop are looked for when a response is whole, and what was drawn behind them is thrown away.

    Args:
        cache_tokens: Most tokens of prompts and responses in memory at once; the rest of a batch waits.
    """

    PAGE = 32
    """Tokens of one block of the cache; on GPUs 256, as fast attention needs."""

    def __init__(self, cache_tokens: int = 1 << 16):
        if cache_tokens < 256:
            raise UserError(f"data.sampler.cache_tokens={cache_tokens} must be at least 256.")
        self.cache_tokens = cache_tokens

    @property
    def identity(self) -> str:
        return f"ContinuousBatchingSampler of {self.cache_tokens} tokens"

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        super().load(policy, dtype)
        if self.model.config._attn_implementation == PACKED:  # of which transformers has no paged form
            self.model.set_attn_implementation("sdpa")

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        keys: Sequence[Hashable],
        count: int,
        sampling: Sampling,
        end_ids: Sequence[int],
    ) -> list[list[Response]]:
        requests = [prompt for prompt in prompts for _ in range(count)]
        tokens = self._generate(requests, stream("batch", *keys).initial_seed() >> 1, sampling, end_ids)
        drawn = [cut(ids, policy.tokenizer, sampling.stop, end_ids) for ids in tokens]
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]

    def _generate(
        self, requests: Sequence[list[int]], seed: int, sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        with without_generation_defaults(self.model), torch.random.fork_rng():
            manager: Any = self.model.init_continuous_batching(  # type: ignore[operator]
                generation_config=_generation_config(sampling, end_ids),
                continuous_batching_config=self._config(requests, seed, sampling),
            )
            # all requests wait before the first step, so that no clock decides which are drawn together
            names = manager.add_requests(requests, max_new_tokens=sampling.max_new_tokens)
            manager.warmup()
            manager.start()
            try:
                return _results(manager, names)
            finally:
                manager.stop(hard_stop=True)  # if not all is drawn, nobody waits for the rest
                manager.destroy()

    def _config(self, requests: Sequence[list[int]], seed: int, sampling: Sampling) -> ContinuousBatchingConfig:
        page = 256 if self.model.device.type == "cuda" else self.PAGE
        longest = max(map(len, requests)) + sampling.max_new_tokens
        each = -(-longest // page) + 1
        if each * page > self.cache_tokens:
            raise UserError(
                f"data.sampler.cache_tokens={self.cache_tokens} cannot hold one prompt with its response, which may "
                f"have {longest} tokens. Give at least {each * page}."
            )
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=min(each * len(requests), self.cache_tokens // page),
            max_batch_tokens=max(1024, len(requests)),
            seed=seed - rank(),  # to which it adds the rank: a batch is the same whoever draws it
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
    """vLLM's engine, on the one GPU that also trains. Not run by us: no vLLM was at hand; see the README.

    The engine is made once, without weights; each round wakes it, loads the policy's in place, empties its cache of
    prompts, and puts it to sleep again, when it holds neither weights nor cache. Each sample has a seed of its own, but
    vLLM promises no equal bytes for a batch that is drawn again. Needs `pip install 'lit-align[vllm]'`.

    Args:
        memory: Share of the GPU's memory that the engine may take while it draws; training's model stays beside it.
    """

    def __init__(self, memory: float = 0.4):
        if not 0 < memory < 1:
            raise UserError(f"data.sampler.memory={memory} must lie in (0, 1): a share of the GPU's memory.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"data.sampler=VLLMSampler: vllm is not installed. Run pip install 'lit-align[vllm]', or {_INSTEAD}."
            )
        if not torch.cuda.is_available():
            raise UserError(f"data.sampler=VLLMSampler needs a CUDA GPU, and there is none: {_INSTEAD}.")
        self.memory = memory
        self._engine: Any = None

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(f"data.sampler=VLLMSampler works with one process: set trainer.devices=1, or {_INSTEAD}.")
        if self._engine is None:
            self._engine = self._start(policy, dtype)
        else:
            self._engine.wake_up(tags=["weights"])
        weights = [(name, value.detach().to(dtype)) for name, value in policy.full_weights()]
        self._engine.apply_model(lambda model: model.load_weights(weights))
        self._engine.wake_up(tags=["kv_cache"])
        self._engine.reset_prefix_cache()  # what it holds is of the old weights

    def _start(self, policy: Policy, dtype: torch.dtype) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that weights can be handed over
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

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        keys: Sequence[Hashable],
        count: int,
        sampling: Sampling,
        end_ids: Sequence[int],
    ) -> list[list[Response]]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        options = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop": sampling.stop,
            "include_stop_str_in_output": True,  # `cut` takes it off the text, and keeps its tokens
            "stop_token_ids": list(end_ids),
        }
        asked = [
            (prompt, stream(key, k).initial_seed())
            for prompt, key in zip(prompts, keys, strict=True)
            for k in range(count)
        ]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asked],
            [SamplingParams(seed=seed, **options) for _, seed in asked],
            use_tqdm=False,
        )
        drawn = [cut(list(each.outputs[0].token_ids), policy.tokenizer, sampling.stop, end_ids) for each in outputs]
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]

    def release(self) -> None:
        if self._engine is not None:
            self._engine.sleep(level=2)  # neither weights nor cache


_INSTEAD = "take ContinuousBatchingSampler or GenerateSampler"


def _bits(weight: Tensor) -> Tensor:
    """A weight's bits, read as integers."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().contiguous().view(integer)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def weight_sums(weights: Iterable[Tensor]) -> tuple[int, int]:
    """Σ b and Σ b² over the bits of all weights, read as integers, modulo 2⁶⁴.

    Exact, and the same however an engine stacks weights, orders their rows, or fills them up with zeros.
    """
    total = squares = 0
    for weight in weights:
        for chunk in _bits(weight).view(-1).split(1 << 18):  # so much stays in a processor's cache
            wide = chunk.long()
            total += int(wide.sum())
            squares += int((wide * wide).sum())
    return total % 2**64, squares % 2**64


@torch.no_grad()
def check_weights(sampler: Sampler, policy: Policy, dtype: torch.dtype) -> None:
    """Make sure that a sampler draws with the policy's weights.

    Raises:
        UserError: it draws with others.
    """
    if not sampler.weights_match((name, full_tensor(value).to(dtype)) for name, value in policy.full_weights()):
        raise UserError(
            f"data.sampler={type(sampler).__name__} does not have the policy's weights, so that its samples would be "
            "another model's. This model and this engine do not go together: take GenerateSampler."
        )
