import math

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.exo import exo_loss


def loss_of_margin(h, beta, **options):
    logps = torch.stack([h, torch.zeros_like(h)], -1)
    return exo_loss(logps, torch.zeros_like(logps), beta=beta, **options)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1 / (1 + math.exp(10))])  # the last is the authors' σ(−10)
def test_the_pair_form_is_the_published_formula(epsilon, random):
    h = 5 * random(10)
    q = torch.sigmoid(0.7 * h)
    published = q * (q.log() - math.log(1 - epsilon)) + (1 - q) * ((1 - q).log() - math.log(epsilon))
    assert_close(loss_of_margin(h, 0.7, label_smoothing=epsilon), published)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_at_the_anchor_the_loss_is_the_kl_of_a_coin_to_the_label(epsilon):
    loss = loss_of_margin(torch.zeros(1, dtype=torch.float64), 0.1, label_smoothing=epsilon)
    assert loss.item() == pytest.approx(-math.log(2) - math.log(epsilon * (1 - epsilon)) / 2, rel=1e-13)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.4])
def test_the_margin_stops_at_logit_1_minus_epsilon_with_loss_0(epsilon):
    best = math.log((1 - epsilon) / epsilon) / 0.1
    h = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    loss = loss_of_margin(h, 0.1, label_smoothing=epsilon)
    (slope,) = torch.autograd.grad(loss.sum(), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), h)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert slope.item() == pytest.approx(0, abs=1e-15)
    assert curvature.item() == pytest.approx(0.1**2 * epsilon * (1 - epsilon), rel=1e-9)


def test_a_group_of_three_worked_by_hand():
    # βΔ = 0, log 2, log 5: policy 1/8, 2/8, 5/8;  r/β_r = 0, 0, log 2: target 1/4, 1/4, 1/2
    ratios = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log() / 0.5
    rewards = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64).log() * 0.1
    loss = exo_loss(ratios - 30, torch.full_like(ratios, -30), beta=0.5, rewards=rewards, reward_temperature=0.1)
    expected = math.log(1 / 2) / 8 + math.log(1) / 4 + math.log(5 / 4) * 5 / 8
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
def test_the_pair_form_is_the_listwise_form_of_the_labels_log_odds(epsilon, random):
    logps, anchor = random(5, 2), random(5, 2)
    rewards = torch.tensor([[math.log((1 - epsilon) / epsilon), 0.0]] * 5, dtype=torch.float64)
    pair = exo_loss(logps, anchor, beta=0.7, label_smoothing=epsilon)
    assert_close(pair, exo_loss(logps, anchor, beta=0.7, rewards=rewards))


def test_a_soft_label_moves_the_target_and_does_not_average_losses(random):
    logps, anchor = random(5, 2), random(5, 2)
    rewards = torch.tensor([[math.log(0.7 / 0.3), 0.0]] * 5, dtype=torch.float64)
    soft = exo_loss(logps, anchor, beta=0.7, rewards=rewards)
    q = torch.sigmoid(0.7 * ((logps - anchor)[:, 0] - (logps - anchor)[:, 1]))
    assert_close(soft, q * (q / 0.7).log() + (1 - q) * ((1 - q) / 0.3).log())
    there = exo_loss(logps, anchor, beta=0.7)
    back = exo_loss(logps.flip(1), anchor.flip(1), beta=0.7)
    assert ((0.7 * there + 0.3 * back) - soft > 1e-3).all()


@pytest.mark.parametrize("reward_temperature", [1.0, 0.5])
def test_the_optimum_has_the_product_of_both_betas_as_kl_weight(reward_temperature, bandit, solve):
    groups = torch.combinations(torch.arange(5), 3)

    def loss(logps):
        rewards, reference = bandit.rewards[groups], bandit.reference[groups]
        return exo_loss(
            logps[groups], reference, beta=0.8, rewards=rewards, reward_temperature=reward_temperature
        ).mean()

    optimum = (bandit.reference + bandit.rewards / (0.8 * reward_temperature)).log_softmax(0)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-5, rtol=0)


def test_a_constant_added_to_rewards_or_to_log_ratios_changes_nothing(random):
    logps, anchor, rewards, constant = random(3, 4), random(3, 4), random(3, 4), random(3, 1)
    loss = exo_loss(logps, anchor, beta=0.7, rewards=rewards)
    assert_close(exo_loss(logps, anchor, beta=0.7, rewards=rewards + constant), loss)
    assert_close(exo_loss(logps + constant, anchor, beta=0.7, rewards=rewards), loss)


def test_hundreds_of_nats_are_finite_in_float32():
    logps = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]], requires_grad=True)
    loss = exo_loss(logps, torch.zeros(2, 2), beta=1.0)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([-math.log(0.999), -math.log(0.001)]))
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 0.5, float("nan")])
def test_a_certain_or_empty_label_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"label_smoothing={epsilon}"):
        exo_loss(torch.zeros(3, 2), torch.zeros(3, 2), beta=0.1, label_smoothing=epsilon)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3, 4), "anchor_logps": (3, 4)}, r"`logps` has shape \[3, 4\], but needs \[B, 2\]"),
        ({"anchor_logps": (2,)}, r"`anchor_logps` has shape \[2\], but needs \[3, 2\]"),
        ({"rewards": (3,)}, r"`rewards` has shape \[3\], but needs \[3, 2\]"),
        (
            {"logps": (3, 1), "anchor_logps": (3, 1), "rewards": (3, 1)},
            r"`logps` has shape \[3, 1\], but needs \[B, K>=2\]",
        ),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3, 2), "anchor_logps": (3, 2)} | change
    with pytest.raises(ValueError, match=message):
        exo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)
