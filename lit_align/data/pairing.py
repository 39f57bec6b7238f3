"""Which of a prompt's K scored responses are trained on. What a rule leaves out is counted by its reason."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lit_align.data.collate import Example
from lit_align.errors import UserError
from lit_align.objectives import win_probabilities_from_rewards


@dataclass(frozen=True)
class Pairs:
    """What came of a round's groups."""

    examples: list[Example]
    counts: Counter[str]  # prompts left out, by reason


class PairingRule(ABC):
    """Chooses examples from groups: each group holds one prompt, K responses and their rewards.

    Before the rule sees a group, empty responses and repetitions of an earlier one are taken out. A group with fewer
    than two responses left is dropped whole.
    """

    def __init__(self, reward_temperature: float = 1.0):
        if reward_temperature <= 0:
            raise UserError(f"pairing.reward_temperature={reward_temperature} must be above 0.")
        self.reward_temperature = reward_temperature

    def __call__(self, groups: Sequence[Example]) -> Pairs:
        examples: list[Example] = []
        counts: Counter[str] = Counter()
        for whole in groups:
            group = self._with_win_probabilities(whole)
            distinct = _distinct(group)
            if len(distinct) < 2:
                counts["all responses equal or empty"] += 1
                continue
            chosen, reason = self.choose(take(group, distinct))
            if reason:
                counts[reason] += 1
            examples += chosen
        return Pairs(examples, counts)

    def _with_win_probabilities(self, group: Example) -> Example:
        """Against all K responses as they were drawn, before any is taken out."""
        assert group.rewards is not None
        rewards = torch.tensor([group.rewards], dtype=torch.float64)
        wins = win_probabilities_from_rewards(rewards, self.reward_temperature)
        return replace(group, win_probabilities=wins[0].tolist())

    @abstractmethod
    def choose(self, group: Example) -> tuple[list[Example], str]:
        """The examples of one group, or none and the reason."""


class BestWorst(PairingRule):
    """The response of the highest reward against that of the lowest.

    Args:
        min_margin: Drop the prompt if their rewards differ by no more than this; a tie is always dropped.
        reward_temperature: β_r of the win probabilities P(y_i ≻ y_j) = σ((r_i − r_j)/β_r), which SPPO learns from.
    """

    def __init__(self, min_margin: float = 0.0, reward_temperature: float = 1.0):
        super().__init__(reward_temperature)
        if min_margin < 0:
            raise UserError(f"pairing.min_margin={min_margin} must be ≥ 0.")
        self.min_margin = min_margin

    def choose(self, group: Example) -> tuple[list[Example], str]:
        assert group.rewards is not None
        order = ranked(group.rewards)
        margin = group.rewards[order[0]] - group.rewards[order[-1]]
        if margin == 0:
            return [], "tied"
        if margin <= self.min_margin:
            return [], "margin too small"
        return [take(group, [order[0], order[-1]])], ""


class Listwise(PairingRule):
    """All K responses, the best first, for objectives over groups. A group that lost a response is dropped whole.

    Args:
        min_margin: Drop the prompt if the best and the worst reward differ by no more than this; a tie is dropped.
        reward_temperature: β_r of the win probabilities P(y_i ≻ y_j) = σ((r_i − r_j)/β_r), which SPPO learns from.
    """

    def __init__(self, min_margin: float = 0.0, reward_temperature: float = 1.0):
        super().__init__(reward_temperature)
        self.min_margin = min_margin
        self._size = 0

    def __call__(self, groups: Sequence[Example]) -> Pairs:
        self._size = max(len(group.response_ids) for group in groups)
        return super().__call__(groups)

    def choose(self, group: Example) -> tuple[list[Example], str]:
        assert group.rewards is not None
        if len(group.response_ids) < self._size:
            return [], "with an equal or empty response"
        if max(group.rewards) - min(group.rewards) <= self.min_margin:
            return [], "tied" if self.min_margin == 0 else "margin too small"
        return [take(group, ranked(group.rewards))], ""


def ranked(rewards: Sequence[float]) -> list[int]:
    """Indices from the highest reward to the lowest; equal rewards keep their order."""
    return sorted(range(len(rewards)), key=lambda i: -rewards[i])


def take(group: Example, branches: Sequence[int]) -> Example:
    """The same prompt with some of its responses, in the order given."""

    def some(values: list[float] | None) -> list[float] | None:
        return None if values is None else [values[i] for i in branches]

    return replace(
        group,
        response_ids=[group.response_ids[i] for i in branches],
        rewards=some(group.rewards),
        sampler_logps=some(group.sampler_logps),
        reference_logps=some(group.reference_logps),
        win_probabilities=some(group.win_probabilities),
    )


def with_labels(examples: Sequence[Example]) -> list[Example]:
    """Pairs with a label for each response: the chosen one is desirable (1), the other is not (0)."""
    if any(len(example.response_ids) > 2 for example in examples):
        raise UserError("data.pairing: labels desirable and undesirable are given to pairs; take BestWorst.")
    return [example if example.labels else replace(example, labels=[1.0, 0.0]) for example in examples]


def with_mismatched(examples: Sequence[Example]) -> list[Example]:
    """Each example with a response to another prompt as one more branch: that of the next example that has another.

    Made where the data set or the round is made: a batch never looks at its neighbours, and may hold one example.
    """
    if len({tuple(example.prompt_ids) for example in examples}) < 2:
        raise UserError("KTO's z0 needs responses to other prompts, and all rows have the same. Give other prompts.")
    mismatched = []
    for place, example in enumerate(examples):
        other = (place + 1) % len(examples)
        while examples[other].prompt_ids == example.prompt_ids:
            other = (other + 1) % len(examples)
        branch = examples[other].response_ids[place % len(examples[other].response_ids)]
        mismatched.append(replace(example, response_ids=[*example.response_ids, branch], mismatched=True))
    return mismatched


def _distinct(group: Example) -> list[int]:
    """The first of each set of equal responses, without empty ones (at most an end token)."""
    first: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(group.response_ids):
        if len(ids) > 1:
            first.setdefault(tuple(ids), place)
    return list(first.values())
