import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.cpo import cpo_loss
from lit_align.objectives.dpo import dpo_loss


def test_a_pair_worked_by_hand():
    logps, lengths = torch.tensor([[-10.0, -14.0]]).double(), torch.tensor([[5, 2]])
    preference = math.log1p(math.exp(-2))
    assert cpo_loss(logps, beta=0.5).item() == pytest.approx(preference + 10, rel=1e-14)
    assert cpo_loss(logps, beta=0.5, alpha=0.3).item() == pytest.approx(preference + 3, rel=1e-14)
    assert cpo_loss(logps, beta=0.5, lengths=lengths).item() == pytest.approx(preference + 2, rel=1e-14)


@pytest.mark.parametrize("constant", [0.0, -37.0])
def test_without_its_likelihood_it_is_dpo_with_a_uniform_reference(constant, random):
    logps = 10 * random(4, 2) - 60
    uniform = torch.full_like(logps, constant)
    assert_close(cpo_loss(logps, beta=0.1, alpha=0.0), dpo_loss(logps, uniform, beta=0.1), rtol=1e-12, atol=0)


def test_the_optimum_without_likelihood_is_a_softmax_of_reward_by_beta(bandit, solve):
    def loss(logps):
        losses = cpo_loss(logps[bandit.pairs], beta=0.5, alpha=0.0, labels=bandit.wins)
        return (bandit.weights * losses).mean()

    optimum = (2 * bandit.rewards).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_at_beta_1_likelihood_and_preference_agree_on_two_arms(alpha, solve):
    pairs, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.8, 0.2], dtype=torch.float64)

    def loss(logps):
        return (weights * cpo_loss(logps[pairs], beta=1.0, alpha=alpha)).sum()

    start = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert_close(solve(loss, start).exp(), weights, atol=1e-7, rtol=0)


def test_soft_labels_average_the_preference_and_leave_the_likelihood(random):
    logps, p = random(5, 2), torch.rand(5, dtype=torch.float64)
    there, back = cpo_loss(logps, beta=0.7, alpha=0), cpo_loss(logps.flip(1), beta=0.7, alpha=0)
    assert_close(cpo_loss(logps, beta=0.7, labels=p), p * there + (1 - p) * back - logps[:, 0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"logps": (3, 3)}, r"`logps` has shape \[3, 3\], but needs \[B, 2\]"),
        ({"lengths": (3,)}, r"`lengths` has shape \[3\], but needs \[3, 2\]"),
        ({"labels": (2,)}, r"`labels` has shape \[2\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    shapes = {"logps": (3, 2)} | shapes
    with pytest.raises(ValueError, match=message):
        cpo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)
