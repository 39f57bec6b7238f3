import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.orpo import log1mexp, orpo_loss


@pytest.mark.parametrize("x", [-1e-12, -1e-8, -1e-3, -0.3, -0.6931, -0.6932, -0.7, -1.0, -20.0, -50.0, -700.0])
def test_log1mexp_has_all_its_digits_where_the_plain_expression_has_none(x):
    with localcontext() as context:
        context.prec = 400
        expected = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("x", [-1e-12, -0.3, -0.7, -20.0, -700.0])
def test_the_slope_of_log1mexp_is_that_of_its_function_in_each_branch(x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log1mexp(x), x)
    assert slope.item() == pytest.approx(math.exp(x.item()) / math.expm1(x.item()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [-1e-6, -1e-12, -1e-30, -1e-300, 0.0])
@pytest.mark.parametrize("learnt", [0, 1], ids=["chosen", "rejected"])
def test_a_response_learnt_by_heart_has_a_finite_loss_and_gradient(dtype, logp, learnt):
    logps = torch.full((1, 2), -8.0, dtype=dtype)
    logps[0, learnt] = logp
    logps.requires_grad_()
    loss = orpo_loss(logps, torch.tensor([[5, 4]]), beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad.isfinite().all()


def test_a_pair_worked_by_hand():
    # ½ and ¼ per token: odds 1 and 1/3, so −log σ(log 3) = log(4/3); and log 2 for the likelihood
    logps = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log() * torch.tensor([[6, 2]])
    loss = orpo_loss(logps, torch.tensor([[6, 2]]), beta=0.2)
    assert loss.item() == pytest.approx(math.log(2) + 0.2 * math.log(4 / 3), rel=1e-14)


def test_soft_labels_average_the_preference_and_leave_the_likelihood(random):
    logps, lengths, p = -(random(5, 2).exp()), torch.randint(1, 9, (5, 2)), torch.rand(5, dtype=torch.float64)
    likelihood = orpo_loss(logps, lengths, beta=0.0)
    assert_close(likelihood, -logps[:, 0] / lengths[:, 0])
    there = orpo_loss(logps, lengths, beta=0.3) - likelihood
    back = orpo_loss(logps.flip(1), lengths.flip(1), beta=0.3) + logps[:, 1] / lengths[:, 1]
    assert_close(orpo_loss(logps, lengths, beta=0.3, labels=p), likelihood + p * there + (1 - p) * back)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_two_armed_optimum_balances_likelihood_against_the_odds_ratio(beta, solve):
    p = 0.8
    pairs, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([p, 1 - p], dtype=torch.float64)

    def loss(logps):
        return (weights * orpo_loss(logps[pairs], torch.ones(2, 2), beta=beta)).sum()

    # π = σ(s), odds ratio 2s: (σ(s) − p) + 2β(σ(2s) − p) = 0, by bisection
    low, high, s = -10.0, 10.0, 0.0
    for _ in range(100):
        slope = 1 / (1 + math.exp(-s)) - p + 2 * beta * (1 / (1 + math.exp(-2 * s)) - p)
        low, high = (low, s) if slope > 0 else (s, high)
        s = (low + high) / 2
    start = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert solve(loss, start).exp()[0].item() == pytest.approx(1 / (1 + math.exp(-s)), abs=1e-7)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"logps": (3, 3), "lengths": (3, 3)}, r"`logps` has shape \[3, 3\], but needs \[B, 2\]"),
        ({"lengths": (2,)}, r"`lengths` has shape \[2\], but needs \[3, 2\]"),
        ({"labels": (3, 1)}, r"`labels` has shape \[3, 1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    shapes = {"logps": (3, 2), "lengths": (3, 2)} | shapes
    with pytest.raises(ValueError, match=message):
        orpo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)
