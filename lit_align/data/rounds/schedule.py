"""The prompts of each round."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_align.errors import UserError, check_number

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
        return order[index % rounds :: rounds]  # a second fit counts on from the rounds of the first
    return order[np.arange(index * per_round, (index + 1) * per_round) % count]


def share_of_round(per_round: PromptsPerRound, rounds: int) -> int | str:
    """Identifies which prompts a round has; arguments as in `places_of_round`."""
    return f"chunk of {rounds} rounds" if per_round == "chunk" else per_round


def prompts_in_words(per_round: PromptsPerRound) -> str:
    """Which prompts a round has, for the run's header."""
    return {"all": "all prompts", "chunk": "an equal share of the prompts"}.get(str(per_round), f"{per_round} prompts")


def check_rounds(responses: int, batch: int, per_round: PromptsPerRound) -> None:
    """Check the options that determine the size of rounds.

    Args:
        responses: To each prompt.
        batch: Responses that are sampled at once.

    Raises:
        UserError: one has no meaning.
    """
    check_number("data.responses_per_prompt", responses, least=2)
    if batch < responses:
        raise UserError(
            f"data.sampling_batch_size={batch} must be at least data.responses_per_prompt={responses}. Raise it."
        )
    if isinstance(per_round, int) and per_round < 1:
        raise UserError(f"data.prompts_per_round={per_round} must be at least 1, all or chunk. Change it.")


def check_known(per_round: PromptsPerRound, rounds: int) -> None:
    """Check that the number of rounds is known where it divides the prompts.

    Raises:
        UserError: it is not.
    """
    if per_round == "chunk" and rounds < 1:
        raise UserError("data.prompts_per_round=chunk divides the prompts by trainer.max_epochs. Set it.")


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
