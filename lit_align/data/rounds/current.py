"""The round that is trained on, and what a checkpoint holds of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from lit_align.data.table import ExampleTable
from lit_align.errors import UserError


@dataclass(frozen=True)
class CurrentRound:
    """The round that is trained on."""

    index: int  # from 0
    step: int  # the optimizer step at which its responses are sampled
    key: dict[str, Any]  # all that determines the samples
    trained_at: int  # the step at which its training begins
    groups: ExampleTable = ExampleTable([])  # noqa: RUF009  # every prompt with its K responses; empty until made
    examples: ExampleTable = ExampleTable([])  # noqa: RUF009  # the examples that are trained on; never written

    @classmethod
    def of(cls, step: int | None, key: dict[str, Any], trained_at: int | None = None) -> Self | None:
        """The round of a checkpoint; None without a step."""
        return None if step is None else cls(int(key["round"]), step, key, step if trained_at is None else trained_at)


class RoundsState(NamedTuple):
    """The place of a run in its rounds, in a checkpoint.

    Args:
        rounds_made: Rounds begun.
        made_at: The optimizer step at which the current one began; None before the first.
        epoch: The epoch that it belongs to.
        key: All that determines its samples.
        trained_at: The step at which its training began; None in checkpoints of an early version.
        next_at: The same as made_at, of the next round if that is sampled ahead.
        next_key: The key of that round.
    """

    rounds_made: int
    made_at: int | None
    epoch: int | None
    key: dict
    trained_at: int | None = None
    next_at: int | None = None
    next_key: dict | None = None

    @classmethod
    def of(cls, made: int, epoch: int | None, now: CurrentRound | None, later: CurrentRound | None) -> Self:
        """The state after `made` rounds, with the current round and the one that is sampled ahead."""
        key, trained_at = (now.key, now.trained_at) if now else ({}, None)
        return cls(made, now and now.step, epoch, key, trained_at, later and later.step, later and later.key)


def check_settings(begun: CurrentRound, settings: dict[str, Any]) -> None:
    """Check that a round that a checkpoint is in the middle of has the same prompts and settings now.

    Raises:
        UserError: one differs.
    """
    if different := [name for name, value in settings.items() if begun.key.get(name, value) != value]:
        options = [_OPTIONS.get(name, f"data.{name}") for name in different]
        raise UserError(
            f"the checkpoint is from the middle of round {begun.index + 1}, whose responses were sampled with "
            f"another {' and '.join(options)}. (data.prompts, prompts_per_round, seed and, for chunks, "
            "trainer.max_epochs determine a round's prompts.) Resume with the settings that the round began with, "
            "or from a checkpoint at the end of a round."
        )


_OPTIONS = {"policy.temperature": "model.policy.temperature", "end_ids": "end token (the model's or the tokenizer's)"}
"""What decides a setting that is not an option of the data."""
