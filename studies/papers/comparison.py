"""Runs compared at equal KL from the start, over seeds and prompts.

A run's frontier is the curve of a value by prompt (such as gold wins) over √KL, through the start and the run's
evaluations. Its value at a KL of κ is taken where the run first reaches κ, by linear interpolation in √KL between that
evaluation and the one before. Two runs are compared at the greatest κ that both reach.

For the differences d[S, P] of S seeds and P prompts, both are random, and every seed has the same prompts:

    d_sp = δ + seed_s + prompt_p + rest_sp
    SE² = (max(MS_seed, MS_rest) + max(0, MS_prompt − MS_rest)) / (SP)      t = mean/SE with S − 1 degrees of freedom

MS are the mean squares of the two-way table. Without the two maxima, E[SE²] would be Var(mean) exactly; the maxima only
raise it. The degrees of freedom are those of the seeds, the fewest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

LEVEL, POWER = 0.05, 0.8
RESAMPLES = 4000


@dataclass(frozen=True)
class Frontier:
    """A run's evaluations.

    Args:
        kl: KL from the start, [T], in the order of the steps; the first is the start's, 0.
        values: A value of each prompt at each evaluation, [T, P].
    """

    kl: Array
    values: Array

    @property
    def reach(self) -> float:
        """The greatest KL of the run."""
        return float(self.kl.max())

    def at(self, kl: float) -> Array:
        """The values, [P], where the run first reaches a KL."""
        if kl > self.reach:
            raise ValueError(f"the run reaches a KL of {self.reach:.3g}, not {kl:.3g}")
        after = int(np.argmax(self.kl >= kl))
        if after == 0:
            return self.values[0]
        low, place, high = np.sqrt([self.kl[after - 1], kl, self.kl[after]])
        share = (place - low) / (high - low)
        return (1 - share) * self.values[after - 1] + share * self.values[after]


def at_equal_kl(a: Frontier | None, b: Frontier | None, share: float = 1.0) -> tuple[Array, float]:
    """The difference of A and B by prompt, [P], at a share of the greatest KL that both reach, and that KL.

    A run that failed (None) has the value of the start, the model that its user would keep.
    """
    if a is None and b is None:
        raise ValueError("both runs failed")
    kl = share * min(run.reach for run in (a, b) if run is not None)
    start = (a or b).values[0]  # type: ignore[union-attr]
    ours, theirs = (start if run is None else run.at(kl) for run in (a, b))
    return ours - theirs, kl


@dataclass(frozen=True)
class MeanTest:
    """A mean difference over seeds and prompts, with its 95 % interval.

    Args:
        error: Standard error of the mean.
        p: Two-sided, of a difference of 0; not corrected.
        sd: Standard deviation of the seeds' mean differences.
        detectable: The difference that is found with a probability of 80 % at this standard error.
    """

    seeds: int
    mean: float
    error: float
    low: float
    high: float
    p: float
    sd: float
    detectable: float

    @classmethod
    def of(cls, differences: Array) -> Self:
        """Test differences d[S, P]; at least two seeds.

        With P = 1, such as for a mean over fixed texts, this is Student's test over seeds.
        """
        S, _ = differences.shape
        error = standard_error(differences)
        mean, sd = float(differences.mean()), float(differences.mean(1).std(ddof=1))
        critical = float(stats.t.ppf(1 - LEVEL / 2, S - 1))
        p = float(2 * stats.t.sf(abs(mean) / error, S - 1)) if error > 0 else float(mean == 0)
        detectable = (critical + float(stats.t.ppf(POWER, S - 1))) * error
        return cls(S, mean, error, mean - critical * error, mean + critical * error, p, sd, detectable)


def standard_error(differences: Array) -> float:
    """Of the mean of d[S, P], where seeds and prompts are random."""
    S, P = differences.shape
    by_seed, by_prompt = differences.mean(1), differences.mean(0)
    seeds = P * by_seed.var(ddof=1)
    if P == 1:
        return float(np.sqrt(seeds / S))
    prompts = S * by_prompt.var(ddof=1)
    rest = differences - by_seed[:, None] - by_prompt + differences.mean()
    within = (rest**2).sum() / ((S - 1) * (P - 1))
    return float(np.sqrt((max(seeds, within) + max(0.0, prompts - within)) / (S * P)))


def bootstrap_interval(values: Array, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of [S, P], resampling seeds and prompts."""
    S, P = values.shape
    generator = np.random.default_rng(0)
    seeds = generator.multinomial(S, np.full(S, 1 / S), resamples) / S
    prompts = generator.multinomial(P, np.full(P, 1 / P), resamples) / P
    means = ((seeds @ values) * prompts).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = greatest
    return corrected


def p_above(test: MeanTest, bound: float) -> float:
    """One-sided p-value: the mean is at most `bound`, against above it."""
    if test.error == 0:
        return float(test.mean <= bound)
    return float(stats.t.sf((test.mean - bound) / test.error, test.seeds - 1))
