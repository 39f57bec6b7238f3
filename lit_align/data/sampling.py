"""The inputs of sampling (options, fixed batches, one random stream per sample), and the cutting of responses.

Each sample's uniform numbers come from a hash of (seed, round, prompt, sample) and decide its tokens (`generation.py`).
The round alone determines how prompts are sorted by length and cut into batches. Equal weights, type and thread count
then give equal bytes, regardless of the order of the batches and of the process that samples each, so that a crash or
another machine changes nothing. (Equal batches matter: in bfloat16 another batch shape alone moves the logits enough to
change every sample.)
"""

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_align.arguments import CheckedArguments
from lit_align.data.template import special_tokens
from lit_align.errors import UserError, check_number


@dataclass
class Sampling(metaclass=CheckedArguments):
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
        check_number("sampling.max_new_tokens", self.max_new_tokens, least=1)
        check_number("sampling.temperature", self.temperature, least=0)
        check_number("sampling.top_p", self.top_p, above=0, most=1)
        check_number("sampling.top_k", self.top_k, least=0)
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            name, value = ("top_k", self.top_k) if self.top_k else ("top_p", self.top_p)
            raise UserError(f"sampling.{name}={value} has no effect at temperature=0, the greedy choice. Leave it out.")
        if "" in self.stop:
            raise UserError("sampling.stop holds an empty string, at which every response would end. Take it out.")

    def described_for(self, temperature: float) -> str:
        """The options that make these samples differ from the model's own at a temperature; empty if none does."""
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


_BEFORE = 4
"""Tokens of a prompt that are decoded with the response that continues it."""


@dataclass(frozen=True)
class SampleRequest:
    """One batch of prompts, and how to sample the responses to them."""

    prompts: Sequence[list[int]]  # token ids of each prompt
    keys: Sequence[Hashable]  # identifies each prompt's random streams
    count: int  # responses to each prompt
    sampling: Sampling
    end_ids: Sequence[int]  # tokens that end a response
    continued: Collection[Hashable] = ()  # keys of the prompts whose text the responses continue

    def grouped(self, tokens: Sequence[list[int]], tokenizer: Any) -> list[list[Response]]:
        """The responses of each prompt, decoded and cut at stop strings, from the tokens of all responses in order."""
        each = zip(self.prompts, self.keys, strict=True)
        before = [prompt[-_BEFORE:] if key in self.continued else [] for prompt, key in each]
        responses = [
            cut(ids, tokenizer, self.sampling.stop, self.end_ids, before[place // self.count])
            for place, ids in enumerate(tokens)
        ]
        return [responses[start : start + self.count] for start in range(0, len(responses), self.count)]


def sampling_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut prompts into batches of `size`, the longest first, so that a lack of memory shows in the first batch.

    Args:
        lengths: Length of each prompt, in tokens.

    Returns:
        Indices into `lengths`, batch by batch; a function of its arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def cut(
    ids: list[int], tokenizer: Any, stop: Sequence[str], end_ids: Sequence[int], before: Sequence[int] = ()
) -> Response:
    """Decode a response, cut after the token that completes the first stop string.

    Args:
        before: The last tokens of the prompt, if the response continues its text. Tokenizers such as Llama 2's leave
            out a space at the beginning of a text, which is kept here.

    The token is found by bisection, with log2(tokens) decodings. Trying one token after another would find the same,
    unless a later token changes the end of the text (half a character, �).
    """

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def text_of(size: int) -> str:
        text = decode(ids[:size])
        has_space = bool(before) and decode([*before, *ids[:size]]) == f"{decode(before)} {text}"
        return f" {text}" if has_space else text

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
    return (digits * torch.tensor([2.0**-8, 2.0**-16, 2.0**-24], dtype=torch.float32)).sum(-1)


def seed_of(*key: Hashable) -> int:
    """The 63-bit seed that belongs to a key, for engines with generators of their own."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
