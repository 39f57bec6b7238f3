"""Sampling responses: fixed batches, one random stream per sample, so that a crash or another machine changes nothing.

Each sample's uniform numbers come from a generator seeded by (seed, round, prompt, sample) and decide its tokens by
inverting the distribution function. The round alone determines how prompts are sorted by length and cut into batches.
Equal weights, type and thread count then give equal bytes, regardless of the order of the batches and of the process
that samples each. (Equal batches matter: in bfloat16 another batch shape alone moves the logits enough to change every
sample.)
"""

import hashlib
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from lit_align.data.template import special_tokens
from lit_align.errors import UserError

CPU_CHUNK_ELEMENTS = 1 << 18
"""Elements of [rows, vocabulary] that a CPU processes at once, so that they stay in its cache."""


@dataclass
class Sampling:
    """Length, temperature and filters of sampling.

    Args:
        max_new_tokens: Longest response, in tokens.
        temperature: Divides the logits; 1 is the model's own distribution, 0 the greedy choice.
        top_p: Keep the fewest tokens whose probabilities reach this sum (1: all).
        top_k: Keep this many of the likeliest tokens (0: all).
        stop: A response ends before the first of these strings; special tokens cannot be among them.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # "not ≥" also refuses NaN
        if not self.max_new_tokens >= 1:
            raise UserError(f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not self.temperature >= 0:
            raise UserError(f"sampling.temperature={self.temperature} must be ≥ 0; 0 is the greedy choice.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p} must be in (0, 1]; 1 keeps every token.")
        if not self.top_k >= 0:
            raise UserError(f"sampling.top_k={self.top_k} must be ≥ 0; 0 keeps every token.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            name, value = ("top_k", self.top_k) if self.top_k else ("top_p", self.top_p)
            raise UserError(f"sampling.{name}={value} has no effect at temperature=0, the greedy choice. Leave it out.")
        if isinstance(self.stop, str):
            raise UserError(f"sampling.stop={self.stop!r} must be a list of strings. Write [{self.stop!r}].")
        if "" in self.stop:
            raise UserError("sampling.stop holds an empty string, at which every response would end. Take it out.")

    def described_for(self, temperature: float) -> str:
        """What makes these samples other than samples of the model at a temperature; empty if nothing does."""
        parts = [f"temperature {self.temperature:g}"] if self.temperature != temperature else []
        parts += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top_k {self.top_k}"] if self.top_k else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Response:
    """A sampled response."""

    ids: list[int]  # its tokens, with the end token if there is one
    text: str  # without special tokens, and without the stop string it ended at
    finished: bool  # whether it ended by itself within max_new_tokens


def sampling_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut prompts into batches of `size`, the longest first, so that a lack of memory shows in the first batch.

    Args:
        lengths: Length of each prompt, in tokens.

    Returns:
        Indices into `lengths`, batch by batch; a function of its arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    keys: Sequence[Hashable],
    count: int,
    sampling: Sampling,
    end_ids: Sequence[int],
) -> list[list[Response]]:
    """Sample `count` responses to each prompt of one batch.

    Args:
        model: A plain transformers model in eval mode.
        prompts: Token ids of each prompt.
        keys: Identifies each prompt's random streams; sample k of a prompt uses the stream (key, k).
        end_ids: Tokens that end a response.

    Raises:
        UserError: a stop string holds a special token.
    """
    check_stop(sampling.stop, tokenizer)
    uniforms = torch.stack([uniform_numbers(sampling.max_new_tokens, key, k) for key in keys for k in range(count)])
    tokens = generate(model, prompts, sampling, uniforms, end_ids, tokenizer)
    responses = [cut(ids, tokenizer, sampling.stop, end_ids) for ids in tokens]
    return [responses[start : start + count] for start in range(0, len(responses), count)]


def cut(ids: list[int], tokenizer: Any, stop: Sequence[str], end_ids: Sequence[int]) -> Response:
    """Decode a response, cut after the token that completes the first stop string.

    The token is found by bisection, with log2(tokens) decodings. Trying one token after another would find the same,
    unless a later token changes the end of the text (half a character, �).
    """

    def text_of(size: int) -> str:
        return tokenizer.decode(ids[:size], skip_special_tokens=True)

    def stops(text: str) -> bool:
        return any(string in text for string in stop)

    text = text_of(len(ids))
    if not stops(text):
        return Response(ids, text, finished=ids[-1] in end_ids)
    size = 1 + bisect_left(range(1, len(ids)), True, key=lambda size: stops(text_of(size)))
    text = text_of(size)
    return Response(ids[:size], text[: min(text.find(string) for string in stop if string in text)], finished=True)


def check_positions(positions: int | None, longest: int, sampling: Sampling, where: str) -> None:
    """Check that a model has places for the longest prompt and its responses.

    Args:
        positions: How many tokens the model can read, if it says so.
        longest: Tokens of the longest prompt.
        where: The prompts' file, for the message.

    Raises:
        UserError: it does not have them.
    """
    if positions is not None and longest + sampling.max_new_tokens > positions:
        raise UserError(
            f"sampling.max_new_tokens={sampling.max_new_tokens} must be at most {positions - longest}: the model has "
            f"{positions} positions, and the longest prompt of {where} has {longest} tokens. Lower it, or lower "
            "data.max_prompt_length and set long_prompts."
        )


def check_stop(stop: Sequence[str], tokenizer: Any) -> None:
    """Refuse stop strings that could never be found.

    Raises:
        UserError: one holds a special token, which the text of a response does not show.
    """
    for string in stop:
        if token := next((token for token in special_tokens(tokenizer).values() if token in string), None):
            raise UserError(
                f"sampling.stop: {string!r} would never be found, since {token!r} is a special token, and responses "
                "are read without those. Take it out: the end-of-turn token ends a response by itself."
            )


def uniform_numbers(count: int, *key: Hashable) -> Tensor:
    """Uniform numbers in [0, 1) that belong to a key, such as (seed, round, prompt, sample); equal on every platform.

    They come from a hash of the whole key. torch's generator on CPUs would use 32 bits of it, so that two of 200,000
    responses would often share their numbers.

    Returns:
        [count], multiples of 2⁻²⁴ in float32.
    """
    octets = bytearray(hashlib.shake_256(repr(key).encode()).digest(3 * count))
    digits = torch.frombuffer(octets, dtype=torch.uint8).view(count, 3)  # to the base of 256
    return (digits * torch.tensor([2.0**-8, 2.0**-16, 2.0**-24])).sum(-1)


def seed_of(*key: Hashable) -> int:
    """The 63-bit seed that belongs to a key, for engines with generators of their own."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: Tensor,
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """Sample responses by inverting the model's distribution function at given uniform numbers.

    A prompt's keys and values are computed once for all its responses, where the model's cache can be repeated.

    Args:
        model: A plain transformers model in eval mode.
        prompts: Token ids of each of n prompts.
        sampling: Filters, the longest response, and stop strings.
        uniforms: [n·count, max_new_tokens] in [0, 1): row i, step t decides token t of response i; the `count`
            responses of a prompt are consecutive.
        end_ids: Tokens that end a response.
        tokenizer: Needed for stop strings.

    Returns:
        Token ids of each response, with the end token if there is one; padding follows a stop string.
    """
    count = len(uniforms) // len(prompts)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the choice is made by `_InverseTransform`
        use_cache=True,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
    )
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(_InverseTransform(sampling, uniforms.to(model.device), width))
    stopping = StoppingCriteriaList()
    if sampling.stop:
        stopping.append(_StopStrings(sampling.stop, tokenizer, width))
    with torch.inference_mode(), without_generation_defaults(model), _contiguous_head(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.repeat_interleave(count, 0),
            attention_mask=mask.repeat_interleave(count, 0),
            past_key_values=_repeated_prefix(model, ids, mask, count) if count > 1 else None,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=stopping,
        )
    return [_until_end(row, end_ids) for row in output[:, width:].tolist()]


def _repeated_prefix(model: PreTrainedModel, ids: Tensor, mask: Tensor, count: int) -> Cache | None:
    """Keys and values of all prompt tokens but the last, each prompt's `count` times; None if it cannot be cut."""
    if ids.shape[1] < 2:
        return None
    config = GenerationConfig(max_new_tokens=1, do_sample=False, use_cache=True, return_dict_in_generate=True)
    cache = model.generate(input_ids=ids, attention_mask=mask, generation_config=config).past_key_values  # type: ignore
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None  # sliding windows and recurrent states cannot be cut
    cache.crop(-1)
    cache.batch_repeat_interleave(count)
    return cache


@contextmanager
def without_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, take away the model's own generation settings.

    transformers takes from them whatever a `GenerationConfig` leaves open, such as the repetition penalty that many
    chat models are published with. The samples would then not be the policy's.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


@contextmanager
def _contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Give the output head contiguous hidden states.

    `generate` takes the last positions of a prefill as a slice, for which `linear` on CPU copies the head's weights
    once for every row. With 128 rows and 49,152 tokens that took four fifths of the prefill's time.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


class _InverseTransform(LogitsProcessor):
    """Give an infinite score to the token at which the filtered distribution function exceeds the uniform number.

    On CPUs it processes a few rows at a time, so that intermediate results stay in the cache; that halves the time.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_width: int):
        self.sampling = sampling
        self.uniforms = uniforms
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        uniforms = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None]
        rows = len(scores) if scores.is_cuda else max(1, CPU_CHUNK_ELEMENTS // scores.shape[1])
        chunks = zip(scores.split(rows), uniforms.split(rows), strict=True)
        tokens = torch.cat([self._tokens(some, points) for some, points in chunks])
        return scores.scatter_(1, tokens, torch.inf)  # `generate` passes a copy

    def _tokens(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        probabilities = filtered_probabilities(scores, self.sampling)
        cumulative = probabilities.cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        # rounding can put the point at the very end, past the last token that has any probability
        beyond = tokens == scores.shape[-1]
        return torch.where(beyond, probabilities.argmax(-1, keepdim=True), tokens) if beyond.any() else tokens


class _StopStrings(StoppingCriteria):
    """A row is done when the text of its last tokens holds one of the strings.

    transformers' own criterion compares strings with the vocabulary's entries and misses characters of several bytes.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt_width: int):
        self.strings = strings
        self.tokenizer = tokenizer
        self.prompt_width = prompt_width
        self.tail = max(len(string.encode()) for string in strings) + 4  # tokens; one may be a single byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(
            input_ids[:, self.prompt_width :][:, -self.tail :], skip_special_tokens=True
        )
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def filtered_probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """Next-token probabilities, [rows, V] float32, after temperature, top-k and top-p."""
    scores = scores.float() if sampling.temperature == 1 else scores.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        kth = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(beyond.scatter(1, order, beyond), 0.0)
    return probabilities


def _until_end(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[:end]
