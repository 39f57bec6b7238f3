"""Identities D (27–37) of the effective anchor, with every objective that has one."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from lit_align.errors import UserError
from lit_align.objectives.anchor import adapted_proximal, effective_anchor
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.exo import exo_loss
from lit_align.objectives.ipo import ipo_loss
from lit_align.objectives.kto import kto_loss, kto_z0
from lit_align.objectives.sppo import sppo_baseline, sppo_loss

exact = partial(assert_close, rtol=1e-12, atol=1e-12)
WEIGHTS = [(0.1, 0.3), (1.0, 0.05), (0.7, 0.7)]  # (β, λ)
P = torch.tensor([[0.9, 0.3]] * 4, dtype=torch.float64)
R = torch.tensor([[1.0, -0.5], [0.2, 0.3], [0.0, 2.0], [-1.0, -1.5]], dtype=torch.float64)
D = torch.tensor([True, False, False, True])


def kto(logps, anchor, beta):
    z0 = kto_z0(logps[:, 1] - anchor[:, 1])
    return kto_loss(logps[:, 0], anchor[:, 0], D, beta=beta, z0=z0)


# every loss that has an anchor, on [4, 2] log-probabilities
ANCHORED = {
    "dpo": lambda logps, anchor, beta: dpo_loss(logps, anchor, beta=beta),
    "cdpo": lambda logps, anchor, beta: dpo_loss(logps, anchor, beta=beta, label_smoothing=0.1),
    "dpo_rewards": lambda logps, anchor, beta: dpo_loss(logps, anchor, beta=beta, rewards=R),
    "ipo": lambda logps, anchor, beta: ipo_loss(logps, anchor, beta=beta),
    "kto": kto,
    "sppo": lambda logps, anchor, beta: sppo_loss(logps, anchor, win_probabilities=P, beta=beta),
    "exo": lambda logps, anchor, beta: exo_loss(logps, anchor, beta=beta),
    "exo_rewards": lambda logps, anchor, beta: exo_loss(logps, anchor, beta=beta, rewards=R),
}
anchored = pytest.mark.parametrize("loss", ANCHORED.values(), ids=ANCHORED)
weighted = pytest.mark.parametrize(("beta", "proximal"), WEIGHTS)


@pytest.fixture
def logps(random):
    """log π, log π_ref, log π_s of four pairs, as sums over some fifty tokens."""
    return 10 * random(4, 2) - 80, 10 * random(4, 2) - 80, 10 * random(4, 2) - 80


# --- 27 to 29: the ends ------------------------------------------------------------------------------------


def test_a_float64_reference_with_recorded_sampler_stays_float64(logps):
    _, reference, sampler = logps
    recorded = sampler.float()
    anchor, beta = effective_anchor(reference, recorded, 0.1, 0.3)
    exact(anchor, (0.1 * reference + 0.3 * recorded.double()) / 0.4)
    assert (anchor.dtype, beta) == (torch.float64, 0.4)


@anchored
@pytest.mark.parametrize("beta", [0.1, 1 / 3, 7.0])
def test_a_proximal_weight_of_zero_is_the_base_objective_bit_for_bit(loss, beta, logps):
    policy, reference, sampler = logps
    base = loss(policy, reference, beta)
    assert torch.equal(loss(policy, *effective_anchor(reference, None, beta, 0.0)), base)
    assert torch.equal(loss(policy, *effective_anchor(reference, sampler, beta, 0.0)), base)


@anchored
@pytest.mark.parametrize("proximal", [0.1, 1 / 3, 7.0])
def test_beta_0_is_the_base_objective_with_the_sampler_as_reference(loss, proximal, logps):
    policy, reference, sampler = logps
    base = loss(policy, sampler, proximal)
    assert torch.equal(loss(policy, *effective_anchor(None, sampler, 0.0, proximal)), base)
    assert torch.equal(loss(policy, *effective_anchor(reference, sampler, 0.0, proximal)), base)


@pytest.mark.parametrize(("beta", "proximal", "kept"), [(0.1, 0.0, "reference"), (0.0, 0.1, "sampler")])
def test_an_impossible_response_without_weight_does_no_harm(beta, proximal, kept, logps):
    _, reference, sampler = logps
    impossible = torch.full_like(reference, -torch.inf)
    anchored_to = (reference, impossible) if kept == "reference" else (impossible, sampler)
    anchor, _ = effective_anchor(*anchored_to, beta, proximal)
    assert torch.equal(anchor, reference if kept == "reference" else sampler)


@anchored
@weighted
def test_a_sampler_equal_to_the_reference_only_adds_its_weight(loss, beta, proximal, logps):
    policy, reference, _ = logps
    anchor, beta_eff = effective_anchor(reference, reference.clone(), beta, proximal)
    assert torch.equal(anchor, reference)
    assert beta_eff == beta + proximal
    assert torch.equal(loss(policy, anchor, beta_eff), loss(policy, reference, beta + proximal))


# --- 30, 33, 37: the mixture -------------------------------------------------------------------------------


@weighted
def test_the_two_margins_added_are_the_margin_to_the_effective_anchor(beta, proximal, logps):
    policy, reference, sampler = logps
    anchor, beta_eff = effective_anchor(reference, sampler, beta, proximal)
    exact(beta_eff * (policy - anchor), beta * (policy - reference) + proximal * (policy - sampler))


@anchored
@weighted
def test_swapping_reference_and_sampler_and_weights_keeps_the_loss(loss, beta, proximal, logps):
    policy, reference, sampler = logps
    there = loss(policy, *effective_anchor(reference, sampler, beta, proximal))
    back = loss(policy, *effective_anchor(sampler, reference, proximal, beta))
    assert_close(there, back, rtol=1e-11, atol=1e-11)


@weighted
def test_float32_logps_keep_seven_digits_of_their_float64_anchor(beta, proximal, logps):
    _, reference, sampler = logps
    anchor, _ = effective_anchor(reference.float(), sampler.float(), beta, proximal)
    wide, _ = effective_anchor(reference, sampler, beta, proximal)
    assert anchor.dtype == torch.float32
    assert_close(anchor.double(), wide, rtol=3e-7, atol=0)


def test_the_proximal_forms_are_the_published_formulas(logps):
    policy, reference, sampler = logps
    beta, proximal = 0.2, 0.6
    anchor, beta_eff = effective_anchor(reference, sampler, beta, proximal)
    for i in range(4):
        a, b = (
            beta * (policy[i, k] - reference[i, k]).item() + proximal * (policy[i, k] - sampler[i, k]).item()
            for k in (0, 1)
        )
        m = a - b
        pr_dpo = math.log1p(math.exp(-m)) if m > 0 else -m + math.log1p(math.exp(m))
        pr_ipo = (m / 0.8 - 1 / 1.6) ** 2
        pr_sppo = (a / 0.8 - (0.9 - 0.5) / 0.8) ** 2 + (b / 0.8 - (0.3 - 0.5) / 0.8) ** 2
        z = torch.tensor([a, b], dtype=torch.float64).log_softmax(0)
        pr_exo = sum(z.exp() * (z - R[i].log_softmax(0)))
        expected = {"dpo": pr_dpo, "ipo": pr_ipo, "sppo": pr_sppo, "exo_rewards": pr_exo}
        for name, value in expected.items():
            assert ANCHORED[name](policy, anchor, beta_eff)[i].item() == pytest.approx(float(value), rel=1e-9)


def test_a_pr_ipo_without_sampler_has_the_scale_of_ipo(logps):
    policy, reference, _ = logps
    anchor, beta_eff = effective_anchor(reference, None, 0.2, 0.0)
    h = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    exact(ipo_loss(policy, anchor, beta=beta_eff), (h - 2.5) ** 2)


# --- 31, 32, 34, 35, 43: optima ----------------------------------------------------------------------------


def proximal_optimum(bandit, rewards, beta, proximal):
    """log π* of π* ∝ π_ref^{β/(β+λ)} π_s^{λ/(β+λ)} exp(r/(β+λ)), written out."""
    total = beta + proximal
    return ((beta * bandit.reference + proximal * bandit.sampler + rewards) / total).log_softmax(0)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


@weighted
def test_the_regularised_reward_is_greatest_at_the_proximal_optimum(beta, proximal, bandit, solve):
    def value(logps):
        reward = (logps.exp() * bandit.rewards).sum()
        return reward - beta * kl(logps, bandit.reference) - proximal * kl(logps, bandit.sampler)

    optimum = proximal_optimum(bandit, bandit.rewards, beta, proximal)
    assert_close(solve(lambda logps: -value(logps), bandit.sampler), optimum, atol=1e-6, rtol=0)
    anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, beta, proximal)
    log_z = (anchor + bandit.rewards / beta_eff).logsumexp(0)
    exact(value(optimum), beta_eff * log_z)


@weighted
def test_pr_dpo_finds_the_proximal_optimum_for_any_pair_weights(beta, proximal, bandit, solve):
    anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, beta, proximal)

    def loss(logps):
        losses = dpo_loss(logps[bandit.pairs], anchor[bandit.pairs], beta=beta_eff, labels=bandit.wins)
        return (bandit.weights * losses).mean()

    optimum = proximal_optimum(bandit, bandit.rewards, beta, proximal)
    assert_close(solve(loss, bandit.sampler), optimum, atol=1e-6, rtol=0)


@weighted
def test_pr_ipo_finds_the_proximal_optimum_of_the_preference_probability(beta, proximal, bandit, solve):
    anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, beta, proximal)
    drawn = bandit.sampler.exp()
    weights = drawn[bandit.pairs].prod(-1)

    def loss(logps):
        labels = bandit.preferences.flatten()
        return (weights * ipo_loss(logps[bandit.pairs], anchor[bandit.pairs], beta=beta_eff, labels=labels)).sum()

    optimum = proximal_optimum(bandit, bandit.preferences @ drawn, beta, proximal)
    assert_close(solve(loss, bandit.sampler), optimum, atol=1e-6, rtol=0)


@weighted
@pytest.mark.parametrize("reward_temperature", [1.0, 0.25])
def test_pr_exo_finds_the_proximal_optimum_if_its_betas_multiply_to_it(
    beta, proximal, reward_temperature, bandit, solve
):
    anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, beta, proximal)
    groups = torch.combinations(torch.arange(5), 3)  # K = 3 of 5 responses, each choice once

    def loss(logps):
        return exo_loss(
            logps[groups],
            anchor[groups],
            beta=beta_eff / reward_temperature,
            rewards=bandit.rewards[groups],
            reward_temperature=reward_temperature,
        ).mean()

    optimum = proximal_optimum(bandit, bandit.rewards, beta, proximal)
    assert_close(solve(loss, anchor), optimum, atol=1e-5, rtol=0)
    at_optimum = optimum.clone().requires_grad_()
    assert loss(at_optimum).item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(loss(at_optimum), at_optimum)[0].abs().max() < 1e-13


@weighted
def test_pr_sppo_with_the_exact_constant_is_0_at_the_proximal_optimum(beta, proximal, bandit, solve):
    anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, beta, proximal)
    P = bandit.preferences @ bandit.sampler.exp()
    mixed = (bandit.reference - bandit.sampler) * beta / (beta + proximal) + P / (beta + proximal)
    c = (beta + proximal) * (bandit.sampler.exp() * mixed.exp()).sum().log()

    def loss(logps):
        return sppo_loss(logps[None], anchor[None], win_probabilities=P[None], beta=beta_eff, baseline=c[None]).sum()

    optimum = proximal_optimum(bandit, P, beta, proximal)
    assert loss(optimum).item() == pytest.approx(0, abs=1e-20)
    assert_close(solve(loss, bandit.sampler), optimum, atol=1e-6, rtol=0)


@weighted
def test_the_estimated_constant_is_exact_on_the_whole_population(beta, proximal, bandit):
    counts = torch.tensor([4, 1, 6, 2, 3])  # a sampler with rational probabilities, and one sample of each unit
    samples = torch.repeat_interleave(torch.arange(5), counts)
    sampler = (counts.double() / counts.sum()).log()
    anchor, beta_eff = effective_anchor(bandit.reference, sampler, beta, proximal)
    P = bandit.preferences @ sampler.exp()
    c = sppo_baseline(anchor[samples][None], sampler[samples][None], win_probabilities=P[samples][None], beta=beta_eff)
    exact(c, beta_eff * (anchor + P / beta_eff).logsumexp(0)[None])
    self_normalised = beta_eff * (anchor + P / beta_eff - anchor.logsumexp(0)).logsumexp(0)
    assert (self_normalised - c).abs() > 1e-3  # log Z̃, which self-normalising would drop


def test_pr_sppo_without_a_reference_is_sppo_with_eta_1_over_lambda(logps):
    policy, _, sampler = logps
    loss = ANCHORED["sppo"](policy, *effective_anchor(None, sampler, 0.0, 0.25))
    exact(loss, (policy - sampler - 4 * (P - 0.5)).square().sum(-1))


@weighted
def test_exact_proximal_steps_follow_c_t_to_the_reference_optimum(beta, proximal, bandit):
    policy = bandit.reference
    for t in range(1, 200):
        anchor, beta_eff = effective_anchor(bandit.reference, policy, beta, proximal)
        policy = (anchor + bandit.rewards / beta_eff).log_softmax(0)
        c_t = (1 - (proximal / (beta + proximal)) ** t) / beta
        assert_close(policy, (bandit.reference + c_t * bandit.rewards).log_softmax(0), atol=1e-9, rtol=0)
    limit = (bandit.reference + bandit.rewards / beta).log_softmax(0)
    assert_close(policy, limit, atol=1e-3 if proximal > 3 * beta else 1e-9, rtol=0)
    anchor, beta_eff = effective_anchor(bandit.reference, limit, beta, proximal)
    assert_close((anchor + bandit.rewards / beta_eff).log_softmax(0), limit, atol=1e-12, rtol=0)


def test_pr_dpo_trained_to_each_optimum_follows_the_same_law(bandit, solve):
    beta, proximal, policy = 0.5, 1.0, bandit.reference
    for t in range(1, 5):
        anchor, beta_eff = effective_anchor(bandit.reference, policy, beta, proximal)

        def loss(logps, anchor=anchor, beta_eff=beta_eff):
            pairs = bandit.pairs
            return dpo_loss(logps[pairs], anchor[pairs], beta=beta_eff, labels=bandit.wins).mean()

        policy = solve(loss, bandit.sampler)
        c_t = 2 * (1 - (2 / 3) ** t)
        assert_close(policy, (bandit.reference + c_t * bandit.rewards).log_softmax(0), atol=1e-6, rtol=0)


# --- λ that follows a target ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"), [(2.0, 1.0), (2.4, 1.1), (1.0, 0.75), (0.0, 0.5), (4.0, 1.5), (400.0, 1.5), (math.inf, 1.5)]
)
def test_lambda_changes_by_half_the_relative_error_at_most_by_half(kl, factor):
    assert adapted_proximal(0.3, kl, target=2.0) == pytest.approx(0.3 * factor, rel=1e-12)


@pytest.mark.parametrize("target", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("start", [0.2, 2.0])
def test_lambda_settles_where_an_exact_step_goes_as_far_as_its_target(target, start, bandit):
    proximal = start
    for _ in range(25):
        anchor, beta_eff = effective_anchor(bandit.reference, bandit.sampler, 0.0, proximal)
        step = (anchor + bandit.rewards / beta_eff).log_softmax(0)
        distance = kl(step, bandit.sampler).item()
        proximal = adapted_proximal(proximal, distance, target)
    assert distance == pytest.approx(target, rel=1e-3)


def test_a_distance_that_is_nan_is_refused():
    with pytest.raises(UserError, match=r"proximal_target=2 cannot be held: KL.* is NaN.* Lower the learning rate"):
        adapted_proximal(0.3, math.nan, target=2.0)


# --- errors ------------------------------------------------------------------------------------------------


def test_a_proximal_weight_without_a_sampler_names_the_fix(logps):
    with pytest.raises(ValueError, match=r"proximal=0\.3 .*OnPolicyPairs.*proximal=0"):
        effective_anchor(logps[1], None, 0.1, 0.3)


def test_a_beta_without_a_reference_names_the_fix(logps):
    with pytest.raises(ValueError, match=r"beta=0\.1 .*reference.*beta=0"):
        effective_anchor(None, logps[2], 0.1, 0.3)


@pytest.mark.parametrize(
    ("beta", "proximal"), [(0.0, 0.0), (-0.1, 0.3), (0.1, -0.05), (float("nan"), 0.1), (0.1, float("nan"))]
)
def test_weights_that_hold_nothing_are_refused(beta, proximal, logps):
    with pytest.raises(ValueError, match=f"beta={beta} and proximal={proximal}"):
        effective_anchor(logps[1], logps[2], beta, proximal)


def test_a_sampler_of_another_shape_is_not_broadcast(logps):
    with pytest.raises(ValueError, match=r"`sampler_logps` has shape \[4, 1\], but needs \[4, 2\]"):
        effective_anchor(logps[1], logps[2][:, :1], 0.1, 0.3)
