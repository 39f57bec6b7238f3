"""Sampling responses to a batch of prompts, by inverting the model's distribution function at given uniform numbers.

On CPUs, `decode` samples from models that share prefixes. Other models, and GPUs, take transformers' `generate`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from lit_align.data.sampling import Response, SampleRequest, Sampling, check_stop, uniform_numbers
from lit_align.decoding import can_decode, decode

CPU_CHUNK_ELEMENTS = 1 << 18
"""Elements of [rows, vocabulary] that a CPU processes at once, so that they stay in its cache."""


def sample_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: SampleRequest
) -> list[list[Response]]:
    """Sample the responses to each prompt of one batch; sample k of a prompt uses the random stream (key, k).

    Args:
        model: A plain transformers model in eval mode.

    Raises:
        UserError: a stop string holds a special token.
    """
    sampling = request.sampling
    check_stop(sampling.stop, tokenizer)
    streams = ((key, k) for key in request.keys for k in range(request.count))
    uniforms = torch.stack([uniform_numbers(sampling.max_new_tokens, key, k) for key, k in streams])
    tokens = generate(model, request.prompts, sampling, uniforms, request.end_ids, tokenizer)
    return request.grouped(tokens, tokenizer)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: Tensor,
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """Sample responses by inverting the model's distribution function at given uniform numbers.

    Args:
        model: A plain transformers model in eval mode.
        prompts: Token ids of each of n prompts.
        sampling: Filters, the longest response, and stop strings.
        uniforms: [n·count, max_new_tokens] in [0, 1): row i, step t decides token t of response i; the `count`
            responses of a prompt are consecutive.
        end_ids: Tokens that end a response.
        tokenizer: Needed for stop strings.

    Returns:
        Token ids of each response, with the end token if there is one; padding may follow a stop string.
    """
    if can_decode(model):

        def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            return pick(logits, uniforms[rows, step], sampling)

        def have_ended(responses: Sequence[list[int]]) -> list[bool]:
            stopped = hold_stop(responses, sampling.stop, tokenizer)
            return [stop or ids[-1] in end_ids for stop, ids in zip(stopped, responses, strict=True)]

        count = len(uniforms) // len(prompts)
        tokens = decode(model, prompts, count, sampling.max_new_tokens, choose, have_ended)
        if tokens is not None:
            return tokens
    return generate_with_transformers(model, prompts, sampling, uniforms, end_ids, tokenizer)


def generate_with_transformers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: Tensor,
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """`generate` by transformers; a prompt is computed once where the model's cache can be repeated."""
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
    """Give an infinite score to the token that `pick` chooses."""

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_width: int):
        self.sampling = sampling
        self.uniforms = uniforms
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        tokens = pick(scores, self.uniforms[:, input_ids.shape[1] - self.prompt_width], self.sampling)
        return scores.scatter_(1, tokens[:, None], torch.inf)  # `generate` passes a copy


class _StopStrings(StoppingCriteria):
    """A row is done when its last tokens hold a stop string."""

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt_width: int):
        self.strings = strings
        self.tokenizer = tokenizer
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        done = hold_stop(input_ids[:, self.prompt_width :].tolist(), self.strings, self.tokenizer)
        return torch.tensor(done, device=input_ids.device)


def hold_stop(responses: Sequence[list[int]], strings: Sequence[str], tokenizer: Any) -> list[bool]:
    """Whether the text of each response's last tokens holds one of the strings.

    transformers' own criterion compares strings with the vocabulary's entries and misses characters of several bytes.
    """
    if not strings:
        return [False] * len(responses)
    tail = max(len(string.encode()) for string in strings) + 4  # tokens; one may be a single byte
    texts = tokenizer.batch_decode([ids[-tail:] for ids in responses], skip_special_tokens=True)
    return [any(string in text for string in strings) for text in texts]


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Tokens [rows] at which the filtered distribution function exceeds the uniform numbers; at temperature 0 the best.

    CPUs process a few rows at a time, so that intermediate results stay in the cache; that halves the time.

    Args:
        logits: [rows, V]
        uniforms: [rows]
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = len(logits) if logits.is_cuda else max(1, CPU_CHUNK_ELEMENTS // logits.shape[1])
    chunks = zip(logits.split(rows), uniforms[:, None].split(rows), strict=True)
    return torch.cat([_inverted(filtered_probabilities(some, sampling), points) for some, points in chunks])


def _inverted(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [rows] at which the distribution functions of [rows, V] exceed the uniform numbers [rows, 1]."""
    cumulative = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # rounding can put the point at the very end, past the last token that has any probability
    beyond = tokens == probabilities.shape[-1]
    tokens = torch.where(beyond, probabilities.argmax(-1, keepdim=True), tokens) if beyond.any() else tokens
    return tokens[:, 0]


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
