import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.ipo import ipo_loss


def loss_of_margin(h, beta, **options):
    logps = torch.stack([h, torch.zeros_like(h)], -1)
    return ipo_loss(logps, torch.zeros_like(logps), beta=beta, **options)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_value_slope_and_curvature_where_the_policy_is_its_anchor(beta):
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = loss_of_margin(h, beta)
    (slope,) = torch.autograd.grad(loss.sum(), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), h)
    assert loss.item() == pytest.approx(1 / (4 * beta**2), rel=1e-14)
    assert slope.item() == pytest.approx(-1 / beta, rel=1e-14)
    assert curvature.item() == pytest.approx(2, rel=1e-14)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_best_margin_is_2p_minus_1_over_twice_beta(beta, p):
    label = torch.tensor([p], dtype=torch.float64)
    best = torch.tensor([(2 * p - 1) / (2 * beta)], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of_margin(best, beta, labels=label).sum(), best)
    assert slope.item() == pytest.approx(0, abs=1e-13)


def test_a_pair_worked_by_hand():
    # h = (−10 + 12) − (−11 + 10) = 3;  1/(2β) = 5;  (3 − 5)² = 4
    logps, anchor = torch.tensor([[-10.0, -11.0]]).double(), torch.tensor([[-12.0, -10.0]]).double()
    assert ipo_loss(logps, anchor, beta=0.1).item() == pytest.approx(4, rel=1e-14)
    # the other order: (−3 − 5)² = 64; a quarter of the time: 0.75·4 + 0.25·64 = 19
    labels = torch.tensor([0.75]).double()
    assert ipo_loss(logps, anchor, beta=0.1, labels=labels).item() == pytest.approx(19, rel=1e-14)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_tilts_the_anchor_by_the_preference_probability(beta, bandit, solve):
    drawn = bandit.sampler.exp()  # μ, who answers the pairs
    weights = drawn[bandit.pairs].prod(-1)

    def loss(logps):
        pairs, labels = bandit.pairs, bandit.preferences.flatten()
        return (weights * ipo_loss(logps[pairs], bandit.reference[pairs], beta=beta, labels=labels)).sum()

    optimum = (bandit.reference + bandit.preferences @ drawn / beta).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-6, rtol=0)


def test_sampled_hard_labels_and_their_probability_have_one_gradient(random):
    logps, anchor = random(1, 2).requires_grad_(), random(1, 2)
    soft = ipo_loss(logps, anchor, beta=0.2, labels=torch.tensor([0.7]).double())
    hard = ipo_loss(logps.expand(10, 2), anchor.expand(10, 2), beta=0.2, labels=torch.arange(10) < 7).mean()
    assert_close(torch.autograd.grad(soft.sum(), logps), torch.autograd.grad(hard, logps))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3, 4), "anchor_logps": (3, 4)}, r"`logps` has shape \[3, 4\], but needs \[B, 2\]"),
        ({"anchor_logps": (2,)}, r"`anchor_logps` has shape \[2\], but needs \[3, 2\]"),
        ({"labels": (1,)}, r"`labels` has shape \[1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3, 2), "anchor_logps": (3, 2)} | change
    with pytest.raises(ValueError, match=message):
        ipo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)
