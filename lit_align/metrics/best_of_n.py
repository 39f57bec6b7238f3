"""Best of n: the response of the highest reward among n that a model samples.

The simplest way to use a reward, and an honest baseline: it trains nothing. From N ≥ n samples of each prompt, the
mean value of the best of n is estimated without bias: it is the mean over all subsets of n samples. A response with
r − 1 others below it is the best of C(r−1, n−1) of the C(N, n) subsets; responses of equal reward share their weights.
"""

import math

import torch
from torch import Tensor


def best_of_n(rewards: Tensor, values: Tensor, n: int) -> Tensor:
    """Mean value of the response that has the highest reward of n, for each prompt, [P].

    Args:
        rewards: [P, N], by which a response is selected.
        values: [P, N], of the same responses; may be the rewards themselves, or another scorer's.
        n: From 1 (a random response) to N (the best of all).

    Raises:
        ValueError: n is not in that range.
    """
    N = rewards.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"n={n} must be from 1 to the number of responses, {N}.")
    weights = torch.tensor([math.comb(rank, n - 1) / math.comb(N, n) for rank in range(N)], dtype=torch.float64)
    rewards, values = rewards.double(), values.double()
    ordered = rewards.sort(dim=1).values
    low = torch.searchsorted(ordered, rewards)  # ranks of the responses of equal reward: low to high − 1
    high = torch.searchsorted(ordered, rewards, right=True)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)])
    shares = (cumulative[high] - cumulative[low]) / (high - low)
    return (shares * values).sum(1)


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ model) = log n − (n−1)/n, in nats per response.

    Exact where no two responses have equal rewards, and an upper bound otherwise (Beirami et al. 2024, arXiv
    2401.01879).
    """
    return math.log(n) - (n - 1) / n
