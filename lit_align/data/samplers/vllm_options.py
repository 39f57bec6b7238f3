"""How vLLM is asked for responses, in this process's child or on a server."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
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


def seeded_prompts(request: SampleRequest) -> list[tuple[list[int], int]]:
    """The prompt and the seed of each response."""
    return [
        (prompt, seed_of(key, k))
        for prompt, key in zip(request.prompts, request.keys, strict=True)
        for k in range(request.count)
    ]


def stopped_at_nothing(stop_reason: object, ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether vLLM ended a response at a stop string that the response does not hold.

    Where a prompt ends within a character, vLLM reads the prompt's text as part of the response.
    """
    return isinstance(stop_reason, str) and stop_reason not in tokenizer.decode(ids, skip_special_tokens=True)


def save_without_weights(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model for vLLM, whose weights come from the policy."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # the weights come unpacked
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
