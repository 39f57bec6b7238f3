"""Win rate of the policy's responses against another model's, with intervals, and at equal response length.

For a prompt with n responses of the policy (rewards r) and m of the other model (rewards s):

    win rate            mean over the n × m pairs of  1[r_i > s_j] + ½·1[r_i = s_j]
    ties as wins        mean over the n × m pairs of  1[r_i ≥ s_j]         (the PRPO paper's rule; ½ becomes 62.5 % for
                                                                            n = 4 when both are the same responses)

and then the mean over prompts. Prompts, not pairs, are the independent units of all intervals. The interval of a mean
reward is a percentile bootstrap over prompts, widened by Student's t for few prompts. That of a win rate p is Wilson's,
where the number of trials is the one that would give the variance between prompts:

    n = P/r,     r = (P·s² + c) / (P·p(1 − p) + c),     c = (1 − 2p)²/16,     z → t of P − 1 degrees of freedom

where s² is the variance of the prompts' win rates. With c = 0, r is the share of a comparison's variance p(1 − p) that
is between prompts: near 0 if each prompt has many independent comparisons, 1 if those of a prompt all agree (n = P).
Near p = 0 and 1, the few prompts that differ decide s², which is mostly too small: c moves r toward 1 there. It is 0 at
p = ½. So the interval keeps its width where a bootstrap collapses (`benchmarks/intervals.py` measures its coverage).

**Length-controlled win rate.** Judges tend to prefer long responses, so a policy can win by length alone. As in
AlpacaEval 2 (Dubois et al., arXiv 2404.04475), a logistic regression explains the outcome w ∈ {0, ½, 1} of each pair by
a constant and the difference in length,

    P(win) = σ(θ + φ·tanh((ℓ_i − ℓ_j) / sd(ℓ_i − ℓ_j)))       and reported is  σ(θ),

the win rate at equal lengths. AlpacaEval has a third term, the difficulty of each prompt, estimated from many models'
answers; it is left out here, where only two models are compared. Lengths are in tokens. The interval is σ(θ ± 1.96·se),
with the sandwich error of θ clustered by prompt. The method adjusts for all that length explains in these data: it
cannot distinguish a length that the judge prefers from a length that the content needs. Where the mean difference is
beyond 1.5 of its standard deviations (`length_gap`), few pairs are of equal length, θ is an extrapolation, and its
interval covers the truth too rarely: it is then not shown.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

BOOTSTRAP_CHUNK = 1 << 22
"""Number of values that a bootstrap resamples at once."""
GREATEST_GAP = 1.5
"""The largest `length_gap` at which a win rate at equal length is shown."""
RIDGE = 1e-6
"""Keeps θ finite if every pair is won: σ(θ) is at most 0.99999."""


def pair_wins(rewards: Tensor, other: Tensor, *, tie: float = 0.5) -> Tensor:
    """Outcome of every pair of responses, [P, n, m]: 1, `tie` or 0.

    Args:
        rewards: [P, n], rewards of the policy's responses.
        other: [P, m], rewards of the other model's responses.
        tie: Value of a pair with equal rewards.
    """
    difference = rewards[:, :, None] - other[:, None, :]
    return (difference > 0).double() + tie * (difference == 0).double()


def win_rates(rewards: Tensor, other: Tensor, *, tie: float = 0.5) -> Tensor:
    """Win rate of each prompt, [P]; arguments as in `pair_wins`."""
    return pair_wins(rewards, other, tie=tie).mean((1, 2))


def bootstrap_interval(
    values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of independent values, [P]."""
    generator = torch.Generator().manual_seed(seed)
    values, count = values.double().cpu(), len(values)
    at_once = max(1, BOOTSTRAP_CHUNK // count)
    means = torch.cat(
        [
            values[torch.randint(count, (min(at_once, resamples - start), count), generator=generator)].mean(1)
            for start in range(0, resamples, at_once)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def rate_interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of independent rates in [0, 1], [P]: Wilson's, with the variance between them."""
    P, p = len(values), values.double().mean().item()
    binomial = p * (1 - p)
    between = values.double().var().item() if P > 1 else binomial
    few = (1 - 2 * p) ** 2 / 16  # c
    common = min(1.0, (P * between + few) / (P * binomial + few))  # r
    share = student_t(P - 1) ** 2 * common / P  # t²/n
    center = (p + share / 2) / (1 + share)
    reach = math.sqrt(share * binomial + share**2 / 4) / (1 + share)
    return max(0.0, center - reach), min(1.0, center + reach)


def student_t(degrees: float) -> float:
    """97.5 % quantile of Student's t by its expansion at the normal one; within 1 % from 3 degrees of freedom on."""
    z, v = 1.959963985, max(degrees, 1)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def mean_interval(values: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of independent values, [P]: the bootstrap's, as wide as few values need it."""
    P, mean = len(values), values.double().mean().item()
    low, high = bootstrap_interval(values)
    wider = student_t(P - 1) / student_t(math.inf) * math.sqrt(P / max(P - 1, 1))
    return mean + wider * (low - mean), mean + wider * (high - mean)


def length_gap(lengths: Tensor, other_lengths: Tensor) -> float:
    """Mean difference in length over all pairs, in its standard deviations.

    Args:
        lengths: [P, n], lengths of the policy's responses.
        other_lengths: [P, m], lengths of the other model's responses.
    """
    difference = (lengths[:, :, None] - other_lengths[:, None, :]).double()
    return (difference.mean() / difference.std(correction=0).clamp(min=0.5)).item()


def length_controlled_win_rate(wins: Tensor, lengths: Tensor, other_lengths: Tensor) -> tuple[float, float, float]:
    """Win rate at equal length, and its 95 % interval.

    Args:
        wins: [P, n, m], outcomes of pairs in [0, 1].
        lengths: [P, n], lengths of the policy's responses.
        other_lengths: [P, m], lengths of the other model's responses.
    """
    difference = (lengths[:, :, None] - other_lengths[:, None, :]).double().cpu()
    spread = difference.std(correction=0)
    feature = torch.tanh(difference / spread) if spread > 0 else torch.zeros_like(difference)
    X = torch.stack([torch.ones_like(feature), feature], -1)  # [P, n, m, 2]
    y = wins.double().cpu()
    ridge = RIDGE * torch.eye(2, dtype=torch.float64)

    coefficients = torch.zeros(2, dtype=torch.float64)
    hessian = ridge
    for _ in range(100):  # Newton's method; usually far fewer steps
        p = torch.sigmoid(X @ coefficients)
        gradient = ((p - y)[..., None] * X).mean((0, 1, 2)) + ridge @ coefficients
        hessian = torch.einsum("pnm,pnma,pnmb->ab", p * (1 - p), X, X) / p.numel() + ridge
        step = torch.linalg.solve(hessian, gradient)
        coefficients = coefficients - step * min(1.0, 2.0 / max(step.abs().max().item(), 1e-300))
        if step.abs().max() < 1e-10:
            break
    scores = ((torch.sigmoid(X @ coefficients) - y)[..., None] * X).mean((1, 2))  # [P, 2], one per cluster
    bread = torch.linalg.inv(hessian)
    P = len(scores)
    variance = (bread @ (scores.T @ scores) @ bread)[0, 0] / (P * max(P - 2, 1))
    theta, reach = coefficients[0].item(), 1.96 * math.sqrt(max(variance.item(), 0.0))
    return _sigmoid(theta), _sigmoid(theta - reach), _sigmoid(theta + reach)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """Mean of the prompts' values, [P], with its interval (`mean_interval`)."""
        return cls(values.double().mean().item(), *mean_interval(values))

    @classmethod
    def of_rates(cls, values: Tensor) -> "Estimate":
        """Mean of the prompts' win rates, [P], with its interval (`rate_interval`)."""
        return cls(values.double().mean().item(), *rate_interval(values))

    def named(self, name: str) -> dict[str, float]:
        """The three numbers as NAME, NAME_low and NAME_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class RewardComparison:
    """One scorer's comparison of two models' responses to the same prompts."""

    reward: Estimate
    other_reward: Estimate
    win_rate: Estimate
    win_rate_ties_as_wins: float
    win_rate_length_controlled: Estimate
    length: float
    other_length: float


def compare_rewards(rewards: Tensor, other: Tensor, lengths: Tensor, other_lengths: Tensor) -> RewardComparison:
    """Compare the policy's rewards and lengths in tokens, [P, n], with those of another model, [P, m]."""
    wins = pair_wins(rewards, other)
    return RewardComparison(
        reward=Estimate.of(rewards.double().mean(1)),
        other_reward=Estimate.of(other.double().mean(1)),
        win_rate=Estimate.of_rates(wins.mean((1, 2))),
        win_rate_ties_as_wins=win_rates(rewards, other, tie=1.0).mean().item(),
        win_rate_length_controlled=Estimate(*length_controlled_win_rate(wins, lengths, other_lengths)),
        length=lengths.double().mean().item(),
        other_length=other_lengths.double().mean().item(),
    )


class WinRateMetric(Metric):
    """Mean rewards, lengths and win rates with their intervals, over all prompts seen; `compute` returns them by name.

    Args:
        other: Name of the model that the policy is compared with.
    """

    full_state_update = False
    rewards: list[Tensor]
    other: list[Tensor]
    lengths: list[Tensor]
    other_lengths: list[Tensor]

    def __init__(self, other: str = "start", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.other_name = other
        for name in ("rewards", "other", "lengths", "other_lengths"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, other: Tensor, lengths: Tensor, other_lengths: Tensor) -> None:
        """Add P prompts; arguments as in `compare_rewards`."""
        self.rewards.append(rewards)
        self.other.append(other)
        self.lengths.append(lengths)
        self.other_lengths.append(other_lengths)

    def compute(self) -> dict[str, float]:
        columns = (self.rewards, self.other, self.lengths, self.other_lengths)
        found = compare_rewards(*(dim_zero_cat(column) for column in columns))
        values = found.other_reward.named(f"reward_{self.other_name}") | found.reward.named("reward_end")
        values |= found.win_rate.named("win_rate") | {"win_rate_ties_as_wins": found.win_rate_ties_as_wins}
        values |= found.win_rate_length_controlled.named("win_rate_length_controlled")
        return values | {f"length_{self.other_name}": found.other_length, "length_end": found.length}
