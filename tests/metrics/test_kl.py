"""The estimate of KL(π‖π_s) from the sampler's own responses, against the sum over a softmax bandit."""

import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.metrics import kl_from_sampler


@pytest.fixture
def policies():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0) for _ in range(2)]


def test_responses_in_the_sampler_s_own_proportions_give_the_kl():
    policy, sampler = torch.tensor([[0.125, 0.375, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64).log()
    drawn = torch.tensor([[0, 0], [1, 2]])
    assert_close(kl_from_sampler(policy[drawn], sampler[drawn]), (policy.exp() * (policy - sampler)).sum())


def test_many_samples_come_near_and_a_selection_of_them_does_not(policies):
    policy, sampler = policies
    exact = (policy.exp() * (policy - sampler)).sum().item()
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    pairs = drawn.view(-1, 4).sort(-1).values[:, [0, -1]]  # best and worst, by a reward that is the response's number
    assert kl_from_sampler(policy[drawn], sampler[drawn]).item() == pytest.approx(exact, rel=0.02)
    assert kl_from_sampler(policy[pairs], sampler[pairs]).item() != pytest.approx(exact, rel=0.05)


def test_far_from_the_sampler_kl_still_rises_unlike_the_plain_mean():
    """Log-normal weights: log w ~ N(−KL, 2 KL) under the sampler has mean weight 1 and this KL."""
    noise = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    medians, plain = [], []
    for kl in (0.1, 1.0, 2.0, 4.0, 6.0):
        log_w = -kl + (2 * kl) ** 0.5 * noise
        estimates = torch.stack([kl_from_sampler(each, torch.zeros(64)) for each in log_w])
        assert estimates.max() <= math.log(64)
        medians.append(estimates.median().item())
        plain.append((log_w.exp() * log_w - torch.expm1(log_w)).mean(1).median().item())
    assert medians == sorted(medians)
    assert medians[0] == pytest.approx(0.1, rel=0.05)
    assert plain != sorted(plain)


def test_kl_is_zero_at_the_sampler_and_exact_for_small_steps():
    logps = torch.tensor([-80.0, -3.0])
    assert kl_from_sampler(logps, logps) == 0
    step = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert kl_from_sampler(step, torch.zeros(2)).item() == pytest.approx(0.5e-12, rel=1e-5)
