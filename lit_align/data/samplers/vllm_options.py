"""How vLLM is asked for responses, in this process's child or on a server."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lit_align.data.sampling import SampleRequest, seed_of


@dataclass(frozen=True)
class GenerateOptions:
    """How to sample; the options that all responses share, under the names that vLLM gives them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    stop_token_ids: list[int]

    @classmethod
    def of(cls, request: SampleRequest) -> "GenerateOptions":
        return cls(
            max_tokens=request.sampling.max_new_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k or -1,
            stop=request.sampling.stop,
            stop_token_ids=list(request.end_ids),
        )

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams, or fields of a request."""
        return vars(self) | {
            "ignore_eos": True,  # only stop_token_ids end a response
            "include_stop_str_in_output": True,  # `cut` removes it from the text, and keeps its tokens
        }


@dataclass(frozen=True)
class Completion:
    """A sampled response."""

    ids: list[int]
    stop_reason: object  # the stop string or token that ended it


SeededPrompt = tuple[list[int], int]
"""The prompt of one response, and its seed."""


def seeded_prompts(request: SampleRequest) -> list[SeededPrompt]:
    """The prompt and the seed of each response."""
    return [
        (prompt, seed_of(key, k))
        for prompt, key in zip(request.prompts, request.keys, strict=True)
        for k in range(request.count)
    ]


def complete_all(
    complete: Callable[[Sequence[SeededPrompt], GenerateOptions], list[Completion]],
    prompts: Sequence[SeededPrompt],
    options: GenerateOptions,
    tokenizer: Any,
) -> list[list[int]]:
    """The tokens of one response to each prompt.

    Where a prompt ends within a character, vLLM reads the prompt's text as part of the response, and may end it at a
    stop string that the response does not hold. Such a response is sampled again without stop strings.

    Args:
        complete: Has vLLM sample one response to each of some prompts.
    """
    responses = complete(prompts, options)
    wrong = [place for place, response in enumerate(responses) if _stopped_at_nothing(response, tokenizer)]
    if wrong:
        again = complete([prompts[place] for place in wrong], replace(options, stop=[]))
        for place, response in zip(wrong, again, strict=True):
            responses[place] = response
    return [response.ids for response in responses]


def _stopped_at_nothing(response: Completion, tokenizer: Any) -> bool:
    """Whether vLLM ended a response at a stop string that the response does not hold."""
    if not isinstance(response.stop_reason, str):
        return False
    return response.stop_reason not in tokenizer.decode(response.ids, skip_special_tokens=True)


def save_without_weights(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model for vLLM, whose weights come from the policy."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # the weights come unpacked
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
