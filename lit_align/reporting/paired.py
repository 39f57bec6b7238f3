"""Two runs compared prompt by prompt, on the prompts that both have answered, by a scorer that both have.

| column | formula |
|---|---|
| difference | mean over prompts of (mean reward of A − mean reward of B), with its bootstrap interval |
| p | paired sign-flip test of that difference, 10,000 flips; not corrected for the number of comparisons |
| A beats B | win rate of A's responses against B's (`metrics/win_rate.py`), with its interval |

Rewards are compared only where the scorers have the same identity: the numbers of two reward functions have nothing in
common but their name.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lit_align.evaluation.rows import HeldOutRow
from lit_align.evaluation.summary import TRAINING, ScorerSummary
from lit_align.metrics.win_rate import Estimate, win_rates
from lit_align.reporting.page import number
from lit_align.reporting.run_folder import Run

FLIPS = 10_000
"""Random flips of all signs in the test."""


@dataclass(frozen=True)
class SharedScorer:
    """A scorer that one or several runs have, under whatever names.

    Args:
        label: Its name, with the identity where another scorer of the runs has the same name.
        names: Its name in each run that has it, by the run's name.
    """

    label: str
    identity: str
    names: dict[str, str]

    def summary(self, run: Run) -> ScorerSummary | None:
        """Its results for a run; None if the run does not have it."""
        name = self.names.get(run.name)
        return run.scorers[name] if name is not None else None


@dataclass(frozen=True)
class PairedComparison:
    """Run A against run B by one scorer, on the prompts that both have answered."""

    prompts: int
    difference: Estimate
    p: float
    win_rate: Estimate


def scorers_of(runs: Sequence[Run]) -> list[SharedScorer]:
    """The scorers of the runs, grouped by their identity."""
    names: dict[tuple[str, int], dict[str, str]] = {}
    for run in runs:
        seen: Counter[str] = Counter()  # a run may have a scorer twice, under two names
        for name, scorer in run.scorers.items():
            names.setdefault((scorer.identity, seen[scorer.identity]), {})[run.name] = name
            seen[scorer.identity] += 1
    labels = {key: " / ".join(dict.fromkeys(by_run.values())) for key, by_run in names.items()}
    used = Counter(labels.values())
    return [
        SharedScorer(label if used[label] == 1 else f"{label}: {key[0]}", key[0], names[key])
        for key, label in labels.items()
    ]


def paired_comparison(
    a: Sequence[HeldOutRow], b: Sequence[HeldOutRow], names: tuple[str, str] = (TRAINING, TRAINING)
) -> PairedComparison | None:
    """Compare two runs by one scorer; None if they have no prompt in common that it scored.

    Args:
        names: The scorer's name in run A and in run B.
    """
    ours, theirs = _rewards(a, names[0]), _rewards(b, names[1])
    both = [prompt for prompt in ours if prompt in theirs]
    if not both:
        return None
    differences = torch.stack([ours[prompt].mean() - theirs[prompt].mean() for prompt in both])
    rates = torch.stack([win_rates(ours[prompt][None], theirs[prompt][None])[0] for prompt in both])
    p = _sign_flip_p(differences, FLIPS)
    return PairedComparison(len(both), Estimate.of(differences), p, Estimate.of_rates(rates))


def _rewards(rows: Sequence[HeldOutRow], name: str) -> dict[str, Tensor]:
    """A scorer's rewards of all responses to each prompt, which may be there several times."""
    rewards: dict[str, list[float]] = {}
    for row in rows:
        if scored := row.scored_by(name):
            rewards.setdefault(row.prompt, []).extend(scored.rewards)
    return {prompt: torch.tensor(values).double() for prompt, values in rewards.items()}


def _sign_flip_p(differences: Tensor, flips: int, signs_at_once: int = 4_000_000) -> float:
    """p of the two-sided sign-flip test of a mean. Memory does not grow with the number of differences."""
    generator = torch.Generator().manual_seed(0)
    count, beyond = len(differences), 0
    for draws in torch.arange(flips).split(max(1, signs_at_once // count)):
        signs = torch.randint(2, (len(draws), count), generator=generator).double() * 2 - 1
        means = (signs @ differences).abs() / count
        beyond += int((means >= differences.mean().abs() - 1e-12).sum())
    return (1 + beyond) / (1 + flips)


PAIRED_HEAD = ["scorer", "A", "B", "prompts", "reward of A − B", "p", "A beats B"]


def paired_rows(runs: Sequence[Run], scorers: Sequence[SharedScorer]) -> list[list[str]]:
    """Cells of the paired comparisons, by the scorers that two runs have in common."""
    rows = []
    for scorer in scorers:
        for a, b in combinations([run for run in runs if run.name in scorer.names], 2):
            found = paired_comparison(a.held_out, b.held_out, (scorer.names[a.name], scorer.names[b.name]))
            if found is None:
                reason = "no prompt in common" if a.held_out and b.held_out else "no held_out/test.parquet"
                rows.append([scorer.label, a.name, b.name, "0", reason, "–", "–"])
                continue
            p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
            difference, beats = number(found.difference), number(found.win_rate, percent=True)
            rows.append([scorer.label, a.name, b.name, f"{found.prompts}", difference, p, beats])
    return rows


def not_compared(runs: Sequence[Run], scorers: Sequence[SharedScorer]) -> str:
    """A note on the scorers that only one run has; empty if there are none."""
    alone = [scorer for scorer in scorers if len(scorer.names) == 1]
    if not alone:
        return ""
    if len(alone) == len(scorers):
        note = "The runs have no scorer in common, so their rewards are not compared: "
    else:
        note = "Not compared, since only one run has the scorer: "
    listed = [
        f"{name} of {next(iter(each.names))} is {each.identity}" for each in alone for name in each.names.values()
    ]
    return note + "; ".join(listed) + "."
