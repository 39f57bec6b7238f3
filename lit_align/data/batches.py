"""Tokenized examples, and the padded batches that they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lit_align.data.formats.rows import Text
from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy
from lit_align.sharding import largest


@dataclass(frozen=True)
class Example:
    """One prompt with its K responses, as tokens; the best first where they are ordered."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    source: str
    reference_logps: list[float] | None = None
    sampler_logps: list[float] | None = None
    rewards: list[float] | None = None
    labels: float | list[float] | None = None
    weight: float = 1.0  # in the loss and in all means
    win_probabilities: list[float] | None = None
    mismatched: bool = False
    # of prompts to sample from, which have no responses yet
    prompt: Text | None = None
    beside: dict[str, Any] | None = None  # the columns that the chat template reads beside it: tools, …
    continues: bool = False  # whether the responses continue the prompt's text
    # of groups that a pairing rule chooses from
    texts: list[str] | None = None
    preferences: list[list[float]] | None = None  # P(y_i ≻ y_j), [K, K]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and all its responses."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


FILLER = Example([0], [[0]], "filler")
"""The example that a process computes while others compute their own."""


def collate(examples: Sequence[Example], indices: Sequence[int]) -> PreferenceBatch:
    """Put examples of equal K into a batch; padding is on the right.

    Args:
        indices: Number of each example in its data set.
    """

    def column(name: str) -> Tensor | None:
        values = [getattr(example, name) for example in examples]
        return None if values[0] is None else torch.from_numpy(np.array(values, np.float64)).float()

    prompt_ids, prompt_mask = _pad([example.prompt_ids for example in examples])
    responses = [ids for example in examples for ids in example.response_ids]
    response_ids, response_mask = _pad(responses)
    shape = (len(examples), len(responses) // len(examples), response_ids.shape[1])
    return PreferenceBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids.view(shape),
        response_mask=response_mask.view(shape),
        index=torch.tensor(indices),
        reference_logps=column("reference_logps"),
        sampler_logps=column("sampler_logps"),
        rewards=column("rewards"),
        labels=column("labels"),
        win_probabilities=column("win_probabilities"),
        weights=column("weight"),
        mismatched=examples[0].mismatched,
    )


@torch.no_grad()
def record_logps(
    of: Callable[[PreferenceBatch], Tensor],
    policy: Policy,
    examples: Sequence[Example],
    batch_size: int,
    *,
    on_shards: bool = False,
) -> list[list[float]]:
    """Log-probabilities of every response of each example.

    Args:
        of: The policy itself, or a reference's `logps`.
        policy: In eval mode while it computes; batches go to its device.
        batch_size: Examples that are computed at once.
        on_shards: All processes call it at the same time, also one without examples, since each pass takes all of them.
    """
    logps: list[list[float]] = []
    starts = range(0, len(examples), batch_size)
    passes = largest(len(starts)) if on_shards else len(starts)
    with policy.evaluating():
        for start in starts:
            some = examples[start : start + batch_size]
            logps += of(move_data_to_device(collate(some, range(len(some))), policy.device)).tolist()
        for _ in range(passes - len(starts)):
            of(move_data_to_device(collate([FILLER], [0]), policy.device))
    return logps


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(ids), torch.arange(width) < lengths[:, None]
