"""Pairing rules: which of a prompt's K scored responses are trained on. All dropped responses are counted by reason.

K responses ──drop empty, repeated, too long──▶ distinct ──threshold──▶ the rule's pairs ──margin, ties──▶ examples
"""

import itertools
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import torch

from lit_align.arguments import CheckedArguments
from lit_align.data.batches import Example
from lit_align.data.sampling import uniform_numbers
from lit_align.errors import UserError, check_number
from lit_align.needs import DataNeeds
from lit_align.objectives import win_probabilities_from_pairwise, win_probabilities_from_rewards

E = TypeVar("E", bound=Sequence[Example], covariant=True)


@dataclass(frozen=True)
class Pairs(Generic[E]):
    """The examples that a rule selects from groups, and counts of what it drops."""

    examples: E
    counts: Counter[str]  # prompts dropped, by reason
    partial_drops: Counter[str] = field(default_factory=Counter)  # responses and pairs dropped from prompts that stay


class PairingRule(metaclass=CheckedArguments):
    """Selects examples from groups; a group holds one prompt, K responses and their rewards.

    First, empty responses (no text, at most an end token), repeated responses and too long responses are dropped. A
    group with fewer than two responses left (for Best, none) is dropped whole.

    Args:
        min_margin: Drop pairs whose rewards differ by this or less.
        reward_temperature: β_r of the probabilities P(y_i ≻ y_j) = σ((r_i − r_j)/β_r), which SPPO and soft labels use,
            unless a pairwise scorer gives its own probabilities.
        threshold: Drop prompts whose best reward is below this; null keeps all.
        duplicates: Drop responses of equal text or tokens (exact), or also those that differ only in case, white space
            or Unicode form (normalised).
        max_length: Drop responses of more tokens than this; null keeps all.
    """

    def __init__(
        self,
        min_margin: float = 0.0,
        reward_temperature: float = 1.0,
        *,
        threshold: float | None = None,
        duplicates: Literal["exact", "normalised"] = "exact",
        max_length: int | None = None,
    ):
        check_number("pairing.min_margin", min_margin, least=0)
        check_number("pairing.reward_temperature", reward_temperature, above=0)
        check_number("pairing.threshold", threshold)
        check_number("pairing.max_length", max_length, least=1)
        self.min_margin = min_margin
        self.reward_temperature = reward_temperature
        self.threshold = threshold
        self.duplicates = duplicates
        self.max_length = max_length

    gives_labels = False
    """Whether examples carry the probability that their first response wins."""

    gives_groups = False
    """Whether examples are whole groups, not pairs."""

    gives_texts = False
    """Whether examples are single responses to imitate, not pairs."""

    fewest = 2
    """Number of distinct responses that a group must have."""

    @property
    def reads_temperature(self) -> bool:
        """Whether the rule's examples depend on reward_temperature, beside the win probabilities."""
        return True

    @property
    def is_default(self) -> bool:
        """Whether it is the default rule with default options."""
        return type(self) is BestWorst and vars(self) == vars(BestWorst())

    def __call__(self, groups: Sequence[Example]) -> Pairs[list[Example]]:
        counts: Counter[str] = Counter()
        partial_drops: Counter[str] = Counter()
        return Pairs(list(self.select(groups, counts, partial_drops)), counts, partial_drops)

    def select(self, groups: Sequence[Example], counts: Counter[str], partial_drops: Counter[str]) -> Iterator[Example]:
        """The examples that the rule selects, one group after another; what it drops is counted as in `Pairs`."""
        for whole in groups:
            group = self._with_win_probabilities(whole)
            distinct = self._distinct(group, partial_drops)
            if len(distinct) < self.fewest:
                counts["all responses equal or empty" if self.max_length is None else "all equal, empty or long"] += 1
                continue
            group = take(group, distinct)
            assert group.rewards is not None
            if self.threshold is not None and max(group.rewards) < self.threshold:
                counts["below the threshold"] += 1
                continue
            chosen, reason = self.choose(group, partial_drops)
            if reason:
                counts[reason] += 1
            yield from (replace(example, preferences=None) for example in chosen)

    def _with_win_probabilities(self, group: Example) -> Example:
        """Win probabilities against all K sampled responses, before any is dropped."""
        assert group.rewards is not None
        if group.preferences is not None:
            wins = win_probabilities_from_pairwise(torch.tensor([group.preferences], dtype=torch.float64))
        else:
            rewards = torch.tensor([group.rewards], dtype=torch.float64)
            wins = win_probabilities_from_rewards(rewards, self.reward_temperature)
        return replace(group, win_probabilities=wins[0].tolist())

    def _distinct(self, group: Example, partial_drops: Counter[str]) -> list[int]:
        """Indices of the first of each set of equal responses, without empty and too long responses."""
        tokens: set[tuple[int, ...]] = set()
        texts: set[str] = set()
        kept = []
        for place, ids in enumerate(group.response_ids):
            text = None if group.texts is None else group.texts[place]
            key = text if text is None or self.duplicates == "exact" else normalised(text)
            if not ids or (text is not None and not text.strip()):
                partial_drops["empty responses"] += 1
            elif self.max_length is not None and len(ids) > self.max_length:
                partial_drops["too long responses"] += 1
            elif key is not None and key in texts:
                partial_drops["repeated responses"] += 1
            elif tuple(ids) in tokens:
                partial_drops["repeated responses" if key is None else "responses equal after truncation"] += 1
            else:
                kept.append(place)
            tokens.add(tuple(ids))
            texts |= set() if key is None else {key}
        return kept

    @abstractmethod
    def choose(self, group: Example, partial_drops: Counter[str]) -> tuple[list[Example], str]:
        """The examples of one group, or none and the reason.

        Args:
            partial_drops: Counts pairs that are dropped although other pairs of the group stay, by reason.
        """


class _RuleOfPairs(PairingRule):
    """The common part of rules that make pairs of a chosen and a rejected response.

    Args:
        ties: Drop pairs of equal reward (drop), or train on them with the label ½ (half).
        labels: The better response's label: 1 (hard), or P(y_i ≻ y_j) from the pairwise scorer or
            σ((r_i − r_j)/β_r) (soft).
    """

    def __init__(
        self,
        *args: Any,
        ties: Literal["drop", "half"] = "drop",
        labels: Literal["hard", "soft"] = "hard",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.ties = ties
        self.labels = labels
        self.gives_labels = ties == "half" or labels == "soft"

    @property
    def reads_temperature(self) -> bool:
        return self.labels == "soft"

    @abstractmethod
    def candidates(self, group: Example, order: Sequence[int]) -> Sequence[tuple[int, int]]:
        """Pairs of indices, the better response first, given all indices in order of reward."""

    def choose(self, group: Example, partial_drops: Counter[str]) -> tuple[list[Example], str]:
        assert group.rewards is not None
        made: list[Example] = []
        left_out: Counter[str] = Counter()
        for best, worst in self.candidates(group, ranked(group.rewards)):
            margin = group.rewards[best] - group.rewards[worst]
            if margin == 0 and self.ties == "drop":
                left_out["tied"] += 1
            elif 0 < margin <= self.min_margin:
                left_out["margin too small"] += 1
            else:
                labels = self._label(group, best, worst) if self.gives_labels else None
                made.append(replace(take(group, [best, worst]), labels=labels))
        if not made:
            return [], "margin too small" if left_out["margin too small"] else "tied"
        partial_drops.update({f"pairs {reason}": count for reason, count in left_out.items()})
        return made, ""

    def _label(self, group: Example, best: int, worst: int) -> float:
        assert group.rewards is not None
        if group.rewards[best] == group.rewards[worst]:
            return 0.5
        if self.labels == "hard":
            return 1.0
        if group.preferences is not None:
            return group.preferences[best][worst]
        margin = group.rewards[best] - group.rewards[worst]
        return torch.sigmoid(torch.tensor(margin / self.reward_temperature, dtype=torch.float64)).item()


class BestWorst(_RuleOfPairs):
    """Pairs the response of the highest reward with the response of the lowest."""

    def candidates(self, group: Example, order: Sequence[int]) -> Sequence[tuple[int, int]]:
        return [(order[0], order[-1])]


class BestRandom(_RuleOfPairs):
    """Pairs the response of the highest reward with a random lower one, always the same for the same responses."""

    def candidates(self, group: Example, order: Sequence[int]) -> Sequence[tuple[int, int]]:
        assert group.rewards is not None
        best, *others = order
        below = [place for place in others if group.rewards[best] - group.rewards[place] > self.min_margin] or others
        (random,) = uniform_numbers(1, "best/random", group.source, repr(group.response_ids)).tolist()
        return [(best, below[int(random * len(below))])]


class AllPairs(_RuleOfPairs):
    """Pairs all responses with each other: K(K−1)/2 pairs per prompt. Each dropped pair is counted."""

    def candidates(self, group: Example, order: Sequence[int]) -> Sequence[tuple[int, int]]:
        return list(itertools.combinations(order, 2))


class Listwise(PairingRule):
    """Keeps all K responses, the best first, for objectives over groups. Groups with a dropped response are dropped.

    `min_margin` applies to the difference between the best and the worst reward; groups of equal rewards are dropped.
    """

    gives_groups = True
    _size = 0

    @property
    def reads_temperature(self) -> bool:
        return False

    def select(self, groups: Sequence[Example], counts: Counter[str], partial_drops: Counter[str]) -> Iterator[Example]:
        self._size = max(len(group.response_ids) for group in groups)
        yield from super().select(groups, counts, partial_drops)

    def choose(self, group: Example, partial_drops: Counter[str]) -> tuple[list[Example], str]:
        assert group.rewards is not None
        if len(group.response_ids) < self._size:
            return [], "with a response taken out"
        margin = max(group.rewards) - min(group.rewards)
        if margin <= self.min_margin:
            return [], "margin too small" if margin else "tied"
        return [take(group, ranked(group.rewards))], ""


class Best(PairingRule):
    """Keeps the response of the highest reward alone, for SFT: best-of-K distillation (rejection sampling).

    The best of K samples has a KL of at most log K − (K−1)/K from the policy that sampled them (`metrics.best_of_n`).

    Args:
        threshold: Drop prompts whose best reward is below this; null keeps all.
        duplicates: Of equal responses, the first is kept.
        max_length: Drop responses of more tokens than this; null keeps all.
    """

    gives_texts = True
    fewest = 1

    def __init__(
        self,
        *,
        threshold: float | None = None,
        duplicates: Literal["exact", "normalised"] = "exact",
        max_length: int | None = None,
    ):
        super().__init__(threshold=threshold, duplicates=duplicates, max_length=max_length)

    @property
    def reads_temperature(self) -> bool:
        return False

    def choose(self, group: Example, partial_drops: Counter[str]) -> tuple[list[Example], str]:
        assert group.rewards is not None
        return [take(group, ranked(group.rewards)[:1])], ""


def normalised(text: str) -> str:
    """The text in one case, Unicode form and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def ranked(rewards: Sequence[float]) -> list[int]:
    """Indices from the highest reward to the lowest; equal rewards keep their order."""
    return sorted(range(len(rewards)), key=lambda i: -rewards[i])


def take(group: Example, branches: Sequence[int]) -> Example:
    """The same prompt with some of its responses, in the order given."""

    def some(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [values[i] for i in branches]

    return replace(
        group,
        response_ids=[group.response_ids[i] for i in branches],
        rewards=some(group.rewards),
        sampler_logps=some(group.sampler_logps),
        reference_logps=some(group.reference_logps),
        win_probabilities=some(group.win_probabilities),
        texts=some(group.texts),
        preferences=None if group.preferences is None else [some(group.preferences[i]) or [] for i in branches],
    )


def with_labels(example: Example) -> Example:
    """A pair with a label for each response: the chosen one is desirable (1), the other is not (0).

    Raises:
        UserError: it has more than two responses.
    """
    if len(example.response_ids) > 2:
        raise UserError("data.pairing must make pairs, since labels apply to pairs. Use BestWorst.")
    return example if example.labels else replace(example, labels=[1.0, 0.0])


def with_mismatched(examples: Sequence[Example]) -> Iterator[Example]:
    """Give each example labels, and a response to another prompt as one more branch.

    The response comes from the next example with another prompt. This happens once per data set or round, since a batch
    may hold a single example.

    Raises:
        UserError: all examples have the same prompt, or one has more than two responses.
    """
    if all(example.prompt_ids == examples[0].prompt_ids for example in examples):
        raise UserError("KTO's z0 needs responses to other prompts, but all rows have the same. Add other prompts.")
    for place, example in enumerate(examples):
        other = (place + 1) % len(examples)
        while examples[other].prompt_ids == example.prompt_ids:
            other = (other + 1) % len(examples)
        branch = examples[other].response_ids[place % len(examples[other].response_ids)]
        yield replace(with_labels(example), response_ids=[*example.response_ids, branch], mismatched=True)


def check_pairing(pairing: PairingRule, needs: DataNeeds, name: str, *, sampled: bool) -> None:
    """Check that an objective can train on a pairing rule's examples.

    Args:
        name: The objective's, in messages.
        sampled: The rule selects from a round's responses; rows of texts need no selection.

    Raises:
        UserError: it needs the other kind.
    """
    if needs.data_kind == "texts" and sampled and not pairing.gives_texts:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} imitates one response. Use data.pairing=Best, the best of "
            "each prompt's responses."
        )
    if pairing.gives_texts and needs.data_kind != "texts":
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} compares responses, and this rule keeps one. Use "
            "BestWorst, or SFT, which imitates one response."
        )
    if pairing.gives_groups and not needs.takes_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}, as configured, compares two responses. Use "
            "BestWorst, or learn from rewards (model.reward_temperature of DPO and EXO)."
        )
    if pairing.gives_labels and not needs.takes_labels:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: soft labels (labels=soft, ties=half) have no effect on {name}, "
            "as configured. Leave them out, or use DPO, IPO, CPO, ORPO or MPO."
        )
    temperature = pairing.reward_temperature
    if temperature != 1 and not (pairing.reads_temperature or needs.reads_win_probabilities):
        raise UserError(
            f"data.pairing.reward_temperature={temperature} has no effect: it scales the rewards for soft labels "
            f"(labels=soft) and for SPPO, and {name}, as configured, reads neither. Leave it out."
        )
    if needs.needs_whole_groups and not pairing.gives_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}'s constant is estimated from all responses that were "
            "sampled. Use Listwise, or leave model.estimate_baseline out."
        )
