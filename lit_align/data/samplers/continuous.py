"""`ContinuousBatchingSampler`: transformers' continuous batching."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from lit_align.data.generation import without_generation_defaults
from lit_align.data.samplers.generate import CopySampler
from lit_align.data.sampling import Response, SampleRequest, Sampling, seed_of
from lit_align.errors import UserError, check_number
from lit_align.packing import PACKED
from lit_align.policy import Policy
from lit_align.sharding import rank

PAGE_OPTION = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"
"""Its name changed between releases of transformers 5."""


class ContinuousBatchingSampler(CopySampler):
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
        check_number("data.sampler.cache_tokens", cache_tokens, least=256)
        self.cache_tokens = cache_tokens

    @property
    def identity(self) -> str:
        return f"ContinuousBatchingSampler of {self.cache_tokens} tokens"

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        super().load(policy, dtype, longest)
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
        page_size: dict[str, Any] = {PAGE_OPTION: page}
        return ContinuousBatchingConfig(
            **page_size,
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
