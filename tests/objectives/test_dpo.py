import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from lit_align.objectives.dpo import dpo_loss


def from_margin(h):
    """Log-probabilities [B, 2] whose margin to an anchor of zeros is h [B]."""
    return torch.stack([h, torch.zeros_like(h)], -1)


def loss_of_margin(h, beta, **options):
    logps = from_margin(h)
    return dpo_loss(logps, torch.zeros_like(logps), beta=beta, **options)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "robust": True}])
def test_the_loss_is_ln_2_where_the_policy_is_its_anchor(beta, options, random):
    logps = 10 * random(6, 2) - 60
    loss = dpo_loss(logps, logps.clone(), beta=beta, **options)
    assert_close(loss, torch.full((6,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_gradient_and_curvature_at_the_anchor_are_those_of_beta(beta):
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of_margin(h, beta).sum(), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), h)
    assert slope.item() == pytest.approx(-beta / 2, rel=1e-14)
    assert curvature.item() == pytest.approx(beta**2 / 4, rel=1e-14)


def test_the_chosen_response_is_pushed_up_as_the_rejected_one_down(random):
    logps = random(3, 2).requires_grad_()
    dpo_loss(logps, random(3, 2), beta=0.1).sum().backward()
    assert (logps.grad[:, 0] < 0).all()
    assert torch.equal(logps.grad[:, 0], -logps.grad[:, 1])


def test_a_pair_worked_by_hand():
    # h = (−10 + 12) − (−11 + 10) = 3;  βh = 1.5;  −log σ(1.5) = log(1 + e^−1.5)
    logps, anchor = torch.tensor([[-10.0, -11.0]]).double(), torch.tensor([[-12.0, -10.0]]).double()
    assert dpo_loss(logps, anchor, beta=0.5).item() == pytest.approx(0.2014132779827524, rel=1e-14)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_is_the_rlhf_optimum_for_any_pair_weights(beta, bandit, solve):
    def loss(logps):
        pairs = bandit.pairs
        losses = dpo_loss(logps[pairs], bandit.reference[pairs], beta=beta, labels=bandit.wins)
        return (bandit.weights * losses).mean()

    optimum = (bandit.reference + bandit.rewards / beta).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reward_temperature", [1.0, 0.5])
def test_with_rewards_the_kl_weight_is_the_product_of_both_betas(reward_temperature, bandit, solve):
    groups = torch.combinations(torch.arange(5), 3)

    def loss(logps):
        rewards, reference = bandit.rewards[groups], bandit.reference[groups]
        return dpo_loss(
            logps[groups], reference, beta=0.8, rewards=rewards, reward_temperature=reward_temperature
        ).mean()

    optimum = (bandit.reference + bandit.rewards / (0.8 * reward_temperature)).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.4])
def test_smoothed_labels_stop_the_margin_at_logit_1_minus_epsilon(epsilon):
    beta = 0.1
    best = math.log((1 - epsilon) / epsilon) / beta
    h = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of_margin(h, beta, label_smoothing=epsilon).sum(), h)
    assert slope.item() == pytest.approx(0, abs=1e-16)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.4])
def test_the_robust_loss_of_flipped_labels_averages_to_the_clean_loss(epsilon, random):
    z = 5 * random(20)
    kept = loss_of_margin(z, 1.0, label_smoothing=epsilon, robust=True)
    flipped = loss_of_margin(-z, 1.0, label_smoothing=epsilon, robust=True)
    assert_close((1 - epsilon) * kept + epsilon * flipped, loss_of_margin(z, 1.0), rtol=1e-12, atol=1e-12)


def test_soft_labels_are_an_average_over_who_wins(random):
    logps, anchor, p = random(5, 2), random(5, 2), torch.rand(5, dtype=torch.float64)
    there, back = dpo_loss(logps, anchor, beta=0.7), dpo_loss(logps.flip(1), anchor.flip(1), beta=0.7)
    assert_close(dpo_loss(logps, anchor, beta=0.7, labels=p), p * there + (1 - p) * back)


@pytest.mark.parametrize("robust", [False, True])
def test_a_certain_label_given_softly_changes_nothing(robust, random):
    logps, anchor, options = random(5, 2), random(5, 2), {"label_smoothing": 0.2, "robust": robust}
    plain = dpo_loss(logps, anchor, beta=0.7, **options)
    for certain in (torch.ones(5).double(), torch.ones(5).bool(), torch.ones(5).long()):
        assert_close(dpo_loss(logps, anchor, beta=0.7, labels=certain, **options), plain)


def test_smoothing_flips_soft_labels_too(random):
    logps, anchor, p = random(5, 2), random(5, 2), torch.rand(5, dtype=torch.float64)
    smoothed = dpo_loss(logps, anchor, beta=0.7, labels=p, label_smoothing=0.1)
    assert_close(smoothed, dpo_loss(logps, anchor, beta=0.7, labels=0.9 * p + 0.1 * (1 - p)))


@pytest.mark.parametrize("reward_temperature", [0.1, 1.0, 3.0])
def test_two_rewards_are_one_soft_label_and_binary_cross_entropy(reward_temperature, random):
    logps, anchor, rewards = random(5, 2), random(5, 2), random(5, 2)
    loss = dpo_loss(logps, anchor, beta=0.7, rewards=rewards, reward_temperature=reward_temperature)
    p = torch.sigmoid((rewards[:, 0] - rewards[:, 1]) / reward_temperature)
    margins = 0.7 * ((logps - anchor)[:, 0] - (logps - anchor)[:, 1])
    assert_close(loss, binary_cross_entropy_with_logits(margins, p, reduction="none"))
    assert_close(loss, dpo_loss(logps, anchor, beta=0.7, labels=p))


def test_cold_rewards_are_plain_dpo(random):
    logps, anchor = random(5, 2), random(5, 2)
    rewards = torch.tensor([[1.0, 0.0]] * 5).double()
    cold = dpo_loss(logps, anchor, beta=0.7, rewards=rewards, reward_temperature=1e-3)
    assert_close(cold, dpo_loss(logps, anchor, beta=0.7), rtol=1e-14, atol=0)


def test_margins_of_hundreds_of_nats_lose_no_digit_in_float32():
    loss = loss_of_margin(torch.tensor([-1000.0, 50.0, 1000.0]), 1.0)
    assert_close(loss, torch.tensor([1000.0, math.exp(-50), 0.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3, 4), "anchor_logps": (3, 4)}, r"`logps` has shape \[3, 4\], but needs \[B, 2\]"),
        ({"logps": (3,)}, r"`logps` has shape \[3\], but needs \[B, 2\]"),
        ({"anchor_logps": (1, 2)}, r"`anchor_logps` has shape \[1, 2\], but needs \[3, 2\]"),
        ({"labels": (3, 1)}, r"`labels` has shape \[3, 1\], but needs \[3\]"),
        ({"rewards": (3, 3)}, r"`rewards` has shape \[3, 3\], but needs \[3, 2\]"),
        (
            {"logps": (3, 1), "anchor_logps": (3, 1), "rewards": (3, 1)},
            r"`logps` has shape \[3, 1\], but needs \[B, K>=2\]",
        ),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3, 2), "anchor_logps": (3, 2)} | change
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 1.0, float("nan")])
def test_a_label_smoothing_that_says_nothing_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"label_smoothing={epsilon}"):
        dpo_loss(torch.zeros(3, 2), torch.zeros(3, 2), beta=0.1, label_smoothing=epsilon)


@pytest.mark.parametrize("also", [{"labels": torch.ones(3)}, {"label_smoothing": 0.1}, {"robust": True}], ids=str)
def test_rewards_beside_labels_are_refused(also):
    zeros = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="replace labels"):
        dpo_loss(zeros, zeros, beta=0.1, rewards=zeros, **also)
