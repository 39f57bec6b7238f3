"""The prompts of each round."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_align.errors import UserError

PromptsPerRound = int | Literal["all", "chunk"]


def places_of_round(count: int, per_round: PromptsPerRound, index: int, rounds: int, seed: int) -> NDArray[np.int64]:
    """Places of the prompts of one round: with `all` in the file's order, otherwise in one random order.

    Args:
        count: How many prompts there are.
        per_round: all; chunk, an equal share for each round; or a number, the next N each round, cycling.
        rounds: Number of rounds in the run; used for chunks.
    """
    if per_round == "all":
        return np.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    if per_round == "chunk":
        return order[index::rounds]
    return order[np.arange(index * per_round, (index + 1) * per_round) % count]


def share_of_round(per_round: PromptsPerRound, rounds: int) -> int | str:
    """Identifies which prompts a round has; arguments as in `places_of_round`."""
    return f"chunk of {rounds} rounds" if per_round == "chunk" else per_round


def check_prompts(count: int, per_round: PromptsPerRound, rounds: int, path: str) -> None:
    """Check that every round has prompts, and no round has one twice (its samples would be the same).

    Raises:
        UserError: there are too few prompts.
    """
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
