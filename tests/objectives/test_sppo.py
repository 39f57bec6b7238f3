import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.sppo import (
    sppo_baseline,
    sppo_loss,
    win_probabilities_from_pairwise,
    win_probabilities_from_rewards,
)


def test_a_pair_worked_by_hand():
    # P = 0.8 and 0.4, 1/β = 4: targets 4·0.3 = 1.2 and 4·(−0.1) = −0.4; log-ratios 2 and 1
    logps, anchor = torch.tensor([[-10.0, -11.0]]).double(), torch.tensor([[-12.0, -12.0]]).double()
    P = torch.tensor([[0.8, 0.4]], dtype=torch.float64)
    loss = sppo_loss(logps, anchor, win_probabilities=P, beta=0.25)
    assert loss.item() == pytest.approx(0.8**2 + 1.4**2, rel=1e-12)


@pytest.mark.parametrize("beta", [1e-3, 0.5])
def test_hard_labels_at_the_anchor_cost_one_over_twice_beta_squared(beta, random):
    logps = random(3, 2)
    hard = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    loss = sppo_loss(logps, logps.clone(), win_probabilities=hard, beta=beta)
    assert_close(loss, torch.full((3,), 1 / (2 * beta**2), dtype=torch.float64))


def test_the_loss_is_a_sum_over_any_number_of_responses(random):
    logps, anchor, P = random(3, 4), random(3, 4), torch.rand(3, 4, dtype=torch.float64)
    c = torch.rand(3, dtype=torch.float64)
    options = {"beta": 0.3, "baseline": c}
    one_by_one = [sppo_loss(logps[:, [k]], anchor[:, [k]], win_probabilities=P[:, [k]], **options) for k in range(4)]
    assert_close(sppo_loss(logps, anchor, win_probabilities=P, **options), sum(one_by_one))


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_with_the_exact_constant_the_optimum_loses_nothing(beta, bandit, solve):
    P = bandit.preferences @ bandit.reference.exp()
    assert (bandit.reference.exp() @ P).item() == pytest.approx(0.5, rel=1e-14)  # E_{π_t} P(y≻π_t) = ½
    log_z = (bandit.reference + P / beta).logsumexp(0)

    def loss(logps):
        return sppo_loss(
            logps[None],
            bandit.reference[None],
            win_probabilities=P[None],
            beta=beta,
            baseline=beta * log_z[None],
        ).sum()

    optimum = bandit.reference + P / beta - log_z
    assert loss(optimum).item() == pytest.approx(0, abs=1e-18)
    assert_close(solve(loss, bandit.reference), optimum, atol=1e-5, rtol=0)


def test_one_half_is_the_constant_of_a_large_beta_and_of_no_small_one(bandit):
    P = bandit.preferences @ bandit.reference.exp()

    def c(beta):
        return (beta * (bandit.reference + P / beta).logsumexp(0)).item()

    assert c(1e4) == pytest.approx(0.5, abs=1e-4)
    assert c(0.1) > 0.51


@pytest.mark.parametrize("beta", [1e-3, 0.5])
def test_the_estimated_constant_is_a_plain_mean_over_samples(beta, random):
    anchor, sampler, P = random(3, 4), random(3, 4), torch.rand(3, 4, dtype=torch.float64)
    c = sppo_baseline(anchor, sampler, win_probabilities=P, beta=beta)
    if beta > 0.1:
        terms = (anchor - sampler).exp() * (P / beta).exp()
        assert_close(c, beta * terms.mean(-1).log())
    assert c.isfinite().all()


def test_the_mean_of_the_estimate_converges_to_the_exact_constant(bandit):
    beta, anchor = 0.5, bandit.reference
    P = bandit.preferences @ bandit.sampler.exp()
    random = torch.Generator().manual_seed(0)
    samples = torch.multinomial(bandit.sampler.exp(), 200_000, replacement=True, generator=random)
    c = sppo_baseline(
        anchor[samples][None], bandit.sampler[samples][None], win_probabilities=P[samples][None], beta=beta
    )
    assert_close(c, beta * (anchor + P / beta).logsumexp(0)[None], atol=0.02, rtol=0)


def test_soft_win_probabilities_count_the_response_itself_as_a_draw():
    nan = float("nan")
    pairwise = torch.tensor([[[nan, 0.9, 0.8], [0.1, nan, 0.3], [0.2, 0.7, nan]]], dtype=torch.float64)
    expected = torch.tensor([[2.2 / 3, 0.9 / 3, 1.4 / 3]], dtype=torch.float64)
    assert_close(win_probabilities_from_pairwise(pairwise), expected)


def test_win_probabilities_of_one_prompt_average_to_one_half(random):
    assert_close(win_probabilities_from_rewards(random(5, 4)).mean(-1), torch.full((5,), 0.5).double())


@pytest.mark.parametrize("reward_temperature", [0.1, 1.0])
def test_win_probabilities_of_rewards_are_bradley_terry(reward_temperature):
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = 1 / (1 + torch.tensor(-1 / reward_temperature, dtype=torch.float64).exp())
    expected = torch.stack([(0.5 + p) / 2, (0.5 + 1 - p) / 2])[None]
    assert_close(win_probabilities_from_rewards(rewards, reward_temperature), expected)


def test_prompts_do_not_mix(random):
    rewards = random(5, 4)
    each = torch.cat([win_probabilities_from_rewards(row[None]) for row in rewards])
    assert_close(win_probabilities_from_rewards(rewards), each)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3,)}, r"`logps` has shape \[3\], but needs \[B, K>=1\]"),
        ({"logps": (3, 0)}, r"`logps` has shape \[3, 0\], but needs \[B, K>=1\]"),
        ({"anchor_logps": (3, 1)}, r"`anchor_logps` has shape \[3, 1\], but needs \[3, 4\]"),
        ({"win_probabilities": (3,)}, r"`win_probabilities` has shape \[3\], but needs \[3, 4\]"),
        ({"baseline": (4,)}, r"`baseline` has shape \[4\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3, 4), "anchor_logps": (3, 4), "win_probabilities": (3, 4)} | change
    with pytest.raises(ValueError, match=message):
        sppo_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1)


def test_a_pairwise_matrix_that_is_not_square_is_named():
    with pytest.raises(ValueError, match=r"`pairwise` has shape \[2, 3, 4\], but needs \[B, 4, K\]"):
        win_probabilities_from_pairwise(torch.zeros(2, 3, 4))
