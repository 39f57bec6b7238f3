"""The prompts of each round."""

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch

from lit_align.errors import UserError

T = TypeVar("T")
PromptsPerRound = int | Literal["all", "chunk"]


def prompts_of_round(prompts: list[T], per_round: PromptsPerRound, index: int, rounds: int, seed: int) -> list[T]:
    """The prompts of one round: with `all` in the file's order, otherwise in one random order.

    Args:
        per_round: all; chunk, an equal share for each round; or a number, the next N each round, cycling.
        rounds: Number of rounds in the run; used for chunks.
    """
    if per_round == "all":
        return prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    if per_round == "chunk":
        return [prompts[i] for i in order[index::rounds]]
    start = index * per_round
    return [prompts[order[i % len(order)]] for i in range(start, start + per_round)]


def share_of_round(per_round: PromptsPerRound, rounds: int) -> int | str:
    """Identifies which prompts a round has; arguments as in `prompts_of_round`."""
    return f"chunk of {rounds} rounds" if per_round == "chunk" else per_round


def check_prompts(prompts: Sequence[object], per_round: PromptsPerRound, rounds: int, path: str) -> None:
    """Check that every round has prompts, and no round has one twice (its samples would be the same).

    Raises:
        UserError: there are too few prompts.
    """
    count = len(prompts)
    if isinstance(per_round, int) and per_round > count:
        raise UserError(
            f"data.prompts_per_round={per_round} must be at most {count}, the number of prompts in {path}. Lower it, "
            "or use all."
        )
    if per_round == "chunk" and count < rounds:
        raise UserError(
            f"data.prompts_per_round=chunk: {path} has {count} prompts for trainer.max_epochs={rounds} rounds, so that "
            "some rounds would have none. Lower max_epochs, or use all."
        )
