import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.simpo import simpo_loss


def test_a_pair_worked_by_hand():
    # means −2 and −3 per token: −log σ(2·1 − 0.5)
    logps, lengths = torch.tensor([[-10.0, -6.0]]).double(), torch.tensor([[5, 2]])
    loss = simpo_loss(logps, lengths, beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-14)


@pytest.mark.parametrize("length", [1, 7, 120])
def test_without_margin_at_equal_lengths_it_is_reference_free_dpo(length, random):
    logps = 10 * random(4, 2) - 60
    lengths = torch.full((4, 2), length)
    loss = simpo_loss(logps, lengths, beta=2.0, gamma=0.0)
    assert_close(loss, dpo_loss(logps, torch.zeros_like(logps), beta=2.0 / length), rtol=1e-12, atol=1e-12)


def test_a_longer_response_at_the_same_rate_gains_nothing(random):
    logps, lengths = 10 * random(4, 2) - 60, torch.randint(1, 9, (4, 2))
    stretch = torch.tensor([3, 5])
    loss = simpo_loss(logps, lengths, beta=2.0, gamma=0.5)
    assert_close(simpo_loss(logps * stretch, lengths * stretch, beta=2.0, gamma=0.5), loss)


def test_the_optimum_without_margin_is_a_softmax_of_reward_by_beta(bandit, solve):
    def loss(logps):
        ones = torch.ones(25, 2)
        return (bandit.weights * bandit.wins * simpo_loss(logps[bandit.pairs], ones, beta=2.0, gamma=0.0)).mean()

    optimum = (bandit.rewards / 2).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 3), (3, 3)), r"`logps` has shape \[3, 3\], but needs \[B, 2\]"),
        (((3, 2), (3,)), r"`lengths` has shape \[3\], but needs \[3, 2\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        simpo_loss(*map(torch.zeros, shapes), beta=2.0, gamma=0.5)
