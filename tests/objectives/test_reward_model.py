import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.reward_model import bradley_terry_loss


def test_a_pair_worked_by_hand():
    rewards = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    assert bradley_terry_loss(rewards).item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-14)
    for margin in (0.5, torch.tensor([0.5])):
        loss = bradley_terry_loss(rewards, margin=margin)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-14)


def test_equal_rewards_cost_ln_2_and_push_apart_by_one_half():
    rewards = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(rewards)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert rewards.grad.tolist() == [[-0.5, 0.5]]


def test_the_population_optimum_is_the_true_reward_up_to_a_constant(bandit, solve):
    def loss(scores):  # log-softmax scores: one representative of "up to a constant"
        return (bandit.weights * bandit.wins * bradley_terry_loss(scores[bandit.pairs])).mean()

    assert_close(solve(loss, bandit.reference), bandit.rewards.log_softmax(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"rewards": (3,)}, r"`rewards` has shape \[3\], but needs \[B, 2\]"),
        ({"rewards": (3, 2), "margin": (3, 1)}, r"`margin` has shape \[3, 1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()})
