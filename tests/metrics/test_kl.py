"""The estimate of KL(π‖π_s) from the sampler's own responses, against the sum over a softmax bandit."""

import pytest
import torch
from torch.testing import assert_close

from lit_align.metrics import kl_from_sampler


@pytest.fixture
def policies():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=random, dtype=torch.float64).log_softmax(0) for _ in range(2)]


def test_its_mean_over_the_sampler_is_the_kl(policies):
    policy, sampler = policies
    terms = torch.stack([kl_from_sampler(policy[i], sampler[i]) for i in range(6)])
    assert (terms >= 0).all()
    assert_close((sampler.exp() * terms).sum(), (policy.exp() * (policy - sampler)).sum())


def test_many_samples_come_near_and_a_selection_of_them_does_not(policies):
    policy, sampler = policies
    exact = (policy.exp() * (policy - sampler)).sum().item()
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    pairs = drawn.view(-1, 4).sort(-1).values[:, [0, -1]]  # best and worst, by a reward that is the response's number
    assert kl_from_sampler(policy[drawn], sampler[drawn]).item() == pytest.approx(exact, rel=0.02)
    assert kl_from_sampler(policy[pairs], sampler[pairs]).item() != pytest.approx(exact, rel=0.05)


def test_a_policy_that_is_its_sampler_is_nowhere_and_small_steps_lose_no_digit():
    logps = torch.tensor([-80.0, -3.0])
    assert kl_from_sampler(logps, logps) == 0
    step = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert kl_from_sampler(step, torch.zeros(2)).item() == pytest.approx(0.5e-12, rel=1e-5)
