"""A weighted mean of several scorers, and how far they disagree."""

import math
from collections.abc import Iterable, Sequence

import torch

from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import SCORER_FIXES, Scorer, Scores, score
from lit_align.errors import UserError, check_number


class EnsembleScorer(Scorer):
    """The weighted mean of several scorers, Σ w_m r_m / Σ w_m, and how far they disagree.

    Every member's reward is recorded and logged by round, with its parts (NAME_PART, such as a judge's criteria), and
    with `disagreement`, the weighted standard deviation of the members around the mean. If the members' rewards differ
    in scale, bring them to one scale by their weights.

    Args:
        scorers: The members, by name.
        weights: Weight of each member by name; the default is 1.
        batch_size: Most responses per call.
    """

    argument_fixes = SCORER_FIXES

    def __init__(self, scorers: dict[str, Scorer], weights: dict[str, float] | None = None, batch_size: int = 256):
        check_number("scorer.batch_size", batch_size, least=1)
        self.scorers = scorers
        self.weights = dict.fromkeys(scorers, 1.0) | (weights or {})
        self.batch_size = batch_size
        if len(scorers) < 2:
            raise UserError(f"scorer.scorers must have at least 2 members, but has {len(scorers)}. Add one.")
        for name, weight in self.weights.items():
            if name not in scorers:
                raise UserError(
                    f"scorer.weights.{name}={weight} has no effect: the members are {', '.join(scorers)}. Name one."
                )
            if not 0 < weight < math.inf:
                raise UserError(
                    f"scorer.weights.{name}={weight} must be above 0 and finite. To leave a member out, remove it."
                )
        if "disagreement" in scorers:
            raise UserError("scorer.scorers.disagreement: this name is reserved for the members' spread. Use another.")

    @property
    def identity(self) -> str:
        """The members' identities with their weights."""
        members = ", ".join(f"{self.weights[name]:g} {scorer.identity}" for name, scorer in self.scorers.items())
        return f"ensemble of {members}"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(scorer.reads for scorer in self.scorers.values()))

    def check(self, prompts: Iterable[Text]) -> None:
        prompts = list(prompts)
        for scorer in self.scorers.values():
            scorer.check(prompts)

    def start(self) -> None:
        for scorer in self.scorers.values():
            scorer.start()

    def release(self) -> None:
        for scorer in self.scorers.values():
            scorer.release()

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
        rewards = {name: score(scorer, prompts, responses) for name, scorer in self.scorers.items()}
        parts = {f"{name}_{part}": values for name, each in rewards.items() for part, values in each.parts.items()}
        weights_M1 = torch.tensor([self.weights[name] for name in rewards], dtype=torch.float64)[:, None]
        rewards_MN = torch.tensor([*rewards.values()], dtype=torch.float64)
        mean_N = (weights_M1 * rewards_MN).sum(0) / weights_M1.sum()  # of whole numbers, a tie stays a tie
        spread_N = ((weights_M1 * (rewards_MN - mean_N).square()).sum(0) / weights_M1.sum()).sqrt()
        return Scores(mean_N.tolist(), parts | rewards | {"disagreement": spread_N.tolist()})
