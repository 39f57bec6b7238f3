"""Pairs in a file; an exactly solvable problem, a softmax bandit, and a real optimizer to solve it with."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import write_pairs
from torch import Tensor

from lit_align.data import OfflinePairs


class Bandit(NamedTuple):
    """One prompt with V responses, in float64."""

    reference: Tensor  # [V], log π_ref
    sampler: Tensor  # [V], log π_s
    rewards: Tensor  # [V]
    preferences: Tensor  # [V, V], P(y_i≻y_j), not transitive and of no reward
    pairs: Tensor  # [V², 2], every ordered pair of responses
    wins: Tensor  # [V²], σ(r_i − r_j): how often the first of the pair wins
    weights: Tensor  # [V²], positive and arbitrary, the same for both orders of a pair


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def bandit(request: pytest.FixtureRequest) -> Bandit:
    V = 5
    random = torch.Generator().manual_seed(request.param)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    reference, sampler, rewards = normal(V).log_softmax(0), normal(V).log_softmax(0), normal(V)
    scores = 2 * normal(V, V)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    wins = torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
    weights = normal(V, V).exp()
    weights = (weights + weights.T).flatten()
    return Bandit(reference, sampler, rewards, torch.sigmoid(scores - scores.T), pairs, wins, weights)


def _solve(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """log π [V] of the softmax policy, near a starting one, at which the loss of log π is stationary."""
    logits = start.clone().requires_grad_()
    # one L-BFGS stops early where progress rounds to nothing: restart it until the gradient vanishes
    for _ in range(20):
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(logits.log_softmax(0))
            value.backward()
            return value

        optimizer.step(closure)
        gradient = torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]
        if gradient.abs().max() < 1e-10:
            break
    assert gradient.abs().max() < 1e-8, "not solved"
    return logits.detach().log_softmax(0)


@pytest.fixture
def solve() -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    return _solve


@pytest.fixture
def random() -> Callable[..., Tensor]:
    """Standard normal numbers in float64, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def pairs(in_tmp: Path) -> OfflinePairs:
    return OfflinePairs(write_pairs(in_tmp), batch_size=4)
