"""Contents of an evaluation: responses with their rewards, log-probabilities, and the summary."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.data.formats.rows import Row
from lit_align.data.sampling import Response
from lit_align.data.scorers.base import GroupScores
from lit_align.errors import UserError
from lit_align.evaluation.answering import TokenizedPrompts
from lit_align.evaluation.rows import HeldOutRow, ScoredRow
from lit_align.evaluation.summary import (
    TRAINING,
    BestOfN,
    DataComparison,
    Diversity,
    PartSummary,
    ScorerSummary,
    Summary,
)
from lit_align.metrics import best_of_n, best_of_n_kl, distinct_n, self_bleu
from lit_align.metrics.win_rate import Estimate, compare_rewards, length_gap, win_rates

METRICS = (
    "reward",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "win_rate_length_controlled",
    "kl_from_start",
    "length",
    "distinct_2",
    "self_bleu",
    "seconds",
)
"""Names of the metrics that are logged as val/NAME whatever the judges."""


class Scored(NamedTuple):
    """The rewards of all responses by one scorer, and the parts that they are made of, [P, n] each."""

    rewards: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def stack(cls, scores: Sequence[GroupScores]) -> "Scored":
        parts = {name: torch.tensor([(each.parts or {})[name] for each in scores]) for name in scores[0].parts or {}}
        return cls(torch.tensor([each.scores for each in scores]), parts)

    def with_more(self, others: "Scored") -> "Scored":
        """The rewards and parts of these and of other responses to the same prompts."""
        parts = {name: torch.cat([part, others.parts[name]], 1) for name, part in self.parts.items()}
        return Scored(torch.cat([self.rewards, others.rewards], 1), parts)


@dataclass(frozen=True)
class ScoredResponses:
    """Responses to P prompts, n each, with their rewards by scorer."""

    responses: Sequence[list[Response]]
    scores: dict[str, Scored]

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each response, [P, n]."""
        return torch.tensor([[len(response.ids) for response in group] for group in self.responses])

    @property
    def finished(self) -> float:
        """Share of responses that ended by themselves within the longest length."""
        finished = [response.finished for group in self.responses for response in group]
        return sum(finished) / len(finished)

    def texts(self) -> Iterator[str]:
        return (response.text for group in self.responses for response in group)

    @property
    def diversity(self) -> Diversity:
        return Diversity(distinct_n(self.texts(), 1), distinct_n(self.texts(), 2), self_bleu(self.texts()))


@dataclass(frozen=True)
class HeldOutPrompts:
    """Held-out prompts with the responses of the start, and of the data set itself where these are compared."""

    prompts: TokenizedPrompts
    batches: list[list[int]]
    start: ScoredResponses
    own: ScoredResponses | None


@dataclass(frozen=True)
class Evaluation:
    """The policy on held-out prompts, against the start and against the data set's own responses."""

    held_out: HeldOutPrompts
    policy: ScoredResponses
    logps: Tensor  # [P, n] of the policy's responses, under the policy
    start_logps: Tensor  # and under the start
    summary: Summary

    def metrics(self) -> dict[str, float]:
        """Values to log during training, by name."""
        summary, ours = self.summary, self.summary.training
        values = {"reward": ours.reward_end.value} | ours.win_rate.named("win_rate")
        values["win_rate_length_controlled"] = ours.win_rate_length_controlled.value
        for name, judged in summary.scorers.items():
            if name != TRAINING:
                values |= {f"reward_{name}": judged.reward_end.value, f"win_rate_{name}": judged.win_rate.value}
        values |= {"kl_from_start": summary.kl_from_start.value, "length": summary.length_end}
        diversity = summary.diversity_end
        return values | {"distinct_2": diversity.distinct_2, "self_bleu": diversity.self_bleu}

    def rows(self) -> Iterator[HeldOutRow]:
        """One row per prompt."""
        return (self._row(place, row) for place, row in enumerate(self.held_out.prompts.rows))

    def _row(self, place: int, row: Row) -> HeldOutRow:
        ours, start = self.policy.responses[place], self.held_out.start.responses[place]
        own = self.held_out.own
        return HeldOutRow(
            source=row.source,
            prompt=row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False),
            prompt_ids=self.held_out.prompts.ids[place],
            responses=[response.text for response in ours],
            responses_start=[response.text for response in start],
            response_ids=[response.ids for response in ours],
            response_ids_start=[response.ids for response in start],
            finished=[response.finished for response in ours],
            finished_start=[response.finished for response in start],
            logps=self.logps[place].tolist(),
            logps_start=self.start_logps[place].tolist(),
            scorers=[self._scored_row(place, name, each.identity) for name, each in self.summary.scorers.items()],
            response_data=own.responses[place][0].text if own else None,
        )

    def _scored_row(self, place: int, name: str, identity: str) -> ScoredRow:
        rewards = self.policy.scores[name].rewards[place]
        start = self.held_out.start.scores[name].rewards[place]
        own = self.held_out.own
        return ScoredRow(
            name=name,
            identity=identity,
            rewards=rewards.tolist(),
            rewards_start=start.tolist(),
            win_rate=win_rates(rewards[None], start[None]).item(),
            reward_data=own.scores[name].rewards[place, 0].item() if own else None,
        )


def summarize_scorer(
    identity: str,
    name: str,
    policy: ScoredResponses,
    start: ScoredResponses,
    own: ScoredResponses | None,
    samples: Mapping[str, Scored] | None = None,
) -> ScorerSummary:
    """The results by one scorer.

    Args:
        samples: The start's rewards, by scorer, of which the best is taken; None leaves best of n out.
    """
    ours, before = policy.scores[name], start.scores[name]
    against_start = compare_rewards(ours.rewards, before.rewards, policy.lengths, start.lengths)
    data = None
    if own:
        against_data = compare_rewards(ours.rewards, own.scores[name].rewards, policy.lengths, own.lengths)
        data = DataComparison(
            reward=against_data.other_reward,
            win_rate=against_data.win_rate,
            win_rate_ties_as_wins=against_data.win_rate_ties_as_wins,
            win_rate_length_controlled=against_data.win_rate_length_controlled,
            length_gap=length_gap(policy.lengths, own.lengths),
        )
    parts = {
        part: PartSummary(
            start=Estimate.of(before.parts[part].double().mean(1)),
            end=Estimate.of(grades.double().mean(1)),
            data=Estimate.of(own.scores[name].parts[part].double().mean(1)) if own else None,
        )
        for part, grades in ours.parts.items()
    }
    return ScorerSummary(
        identity=identity,
        reward_start=against_start.other_reward,
        reward_end=against_start.reward,
        win_rate=against_start.win_rate,
        win_rate_ties_as_wins=against_start.win_rate_ties_as_wins,
        win_rate_length_controlled=against_start.win_rate_length_controlled,
        parts=parts,
        data=data,
        best_of_n=best_of(samples, name) if samples else {},
    )


def best_of(samples: Mapping[str, Scored], name: str) -> dict[str, BestOfN]:
    """Rewards by one scorer of the best of n = 2, 4, 8, … and all of each prompt's responses, by n."""
    selecting, values = samples[TRAINING].rewards, samples[name].rewards
    N = selecting.shape[1]
    sizes = sorted({N, *(2**k for k in range(1, N.bit_length()))} - {1})
    return {str(n): BestOfN(best_of_n_kl(n), Estimate.of(best_of_n(selecting, values, n))) for n in sizes}


def metric_names(scorers: Iterable[str]) -> list[str]:
    """Names of the metrics that are logged as val/NAME, with those by each judge."""
    return [*METRICS, *(f"{what}_{name}" for name in scorers if name != TRAINING for what in ("reward", "win_rate"))]


def check_judge_names(names: Sequence[str]) -> None:
    """Refuse names of judges that a metric, a file or the training scorer already has.

    Raises:
        UserError: names the judge.
    """
    for name in names:
        if not name or not name.replace("_", "a").replace("-", "a").isalnum():
            raise UserError(
                f"win_rate.judges: {name!r} must be letters, digits, _ and -. Rename the judge, since metrics are "
                "named after it."
            )
        if name == TRAINING:
            raise UserError(f"win_rate.judges: {name!r} is the scorer that training uses. Rename the judge.")
        for metric in (f"reward_{name}", f"win_rate_{name}"):
            if metric in METRICS:
                raise UserError(f"win_rate.judges: val/{metric} already exists. Rename the judge {name!r}.")
