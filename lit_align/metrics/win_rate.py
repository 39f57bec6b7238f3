"""How often the policy's responses beat another's, with an interval.

For a prompt with n responses of the policy (rewards r) and n of the other (rewards s):

    win rate            mean over the n × n pairs of  1[r_i > s_j] + ½·1[r_i = s_j]
    ties as wins        mean over the n × n pairs of  1[r_i ≥ s_j]         (the PRPO paper's rule; ½ becomes 62.5 % for
                                                                            n = 4 when both are the same responses)

and the mean of that over prompts. The interval is a percentile bootstrap over prompts: prompts, not pairs, are drawn,
since responses to one prompt are not independent.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def win_rates(rewards: Tensor, other: Tensor, *, tie: float = 0.5) -> Tensor:
    """Win rate of each prompt, [P].

    Args:
        rewards: [P, n] of the policy's responses.
        other: [P, m] of the other's.
        tie: What an equal pair counts.
    """
    difference = rewards[:, :, None] - other[:, None, :]
    return ((difference > 0).double() + tie * (difference == 0).double()).mean((1, 2))


def bootstrap_interval(
    values: Tensor, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of independent values, [P]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double().cpu()[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


class WinRateMetric(Metric):
    """Mean rewards and the win rate with its interval, over all prompts seen; `compute` returns them by name."""

    full_state_update = False
    rewards: list[Tensor]
    other: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rewards", [], dist_reduce_fx="cat")
        self.add_state("other", [], dist_reduce_fx="cat")

    def update(self, rewards: Tensor, other: Tensor) -> None:
        """Add P prompts with n rewards each, [P, n]."""
        self.rewards.append(rewards)
        self.other.append(other)

    def compute(self) -> dict[str, float]:
        rewards, other = dim_zero_cat(self.rewards), dim_zero_cat(self.other)
        rates = win_rates(rewards, other)
        low, high = bootstrap_interval(rates)
        return {
            "reward_start": other.double().mean().item(),
            "reward_end": rewards.double().mean().item(),
            "win_rate": rates.mean().item(),
            "win_rate_low": low,
            "win_rate_high": high,
            "win_rate_ties_as_wins": win_rates(rewards, other, tie=1.0).mean().item(),
        }
