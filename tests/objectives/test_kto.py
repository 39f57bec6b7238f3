import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.anchor import effective_anchor
from lit_align.objectives.kto import kto_loss, kto_z0

GOOD, BAD = torch.tensor([True]), torch.tensor([False])


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.33, 0.5)])
def test_value_and_slopes_where_the_policy_is_its_anchor(beta, desirable, undesirable):
    weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
    anchor = torch.tensor([-40.0], dtype=torch.float64)
    for label, weight, sign in ((GOOD, desirable, -1), (BAD, undesirable, +1)):
        logps = anchor.clone().requires_grad_()
        loss = kto_loss(logps, anchor, label, beta=beta, z0=0.0, **weights)
        loss.sum().backward()
        assert loss.item() == pytest.approx(weight / 2, rel=1e-14)
        assert logps.grad.item() == pytest.approx(sign * weight * beta / 4, rel=1e-14)


def test_both_kinds_worked_by_hand():
    # desirable: a = 3, 1 − σ(0.5(3 − 1)) = σ(−1);  undesirable: b = 2, 1 − σ(0.5(1 − 2)) = σ(0.5)
    logps, anchor = torch.tensor([-10.0, -8.0]).double(), torch.tensor([-13.0, -10.0]).double()
    loss = kto_loss(
        logps,
        anchor,
        torch.tensor([True, False]),
        beta=0.5,
        z0=torch.tensor(1.0).double(),
        desirable_weight=2,
        undesirable_weight=3,
    )
    expected = [2 * 0.2689414213699951, 3 * 0.6224593312018546]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_labels_may_be_bools_numbers_or_probabilities(random):
    logps, anchor, labels = random(6), random(6), torch.arange(6) % 2 == 0
    loss = kto_loss(logps, anchor, labels, beta=0.7, z0=0.1)
    assert torch.equal(kto_loss(logps, anchor, labels.long(), beta=0.7, z0=0.1), loss)
    p = torch.rand(6, dtype=torch.float64)
    mixed = p * kto_loss(logps, anchor, torch.ones(6), beta=0.7, z0=0.1)
    mixed = mixed + (1 - p) * kto_loss(logps, anchor, torch.zeros(6), beta=0.7, z0=0.1)
    assert_close(kto_loss(logps, anchor, p, beta=0.7, z0=0.1), mixed)


def test_each_loss_lies_between_zero_and_its_weight_and_saturates_on_both_sides():
    logps = torch.tensor([-900.0, -40.0, 900.0], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(logps, torch.zeros(3).double(), torch.ones(3), beta=1.0, z0=0.0, desirable_weight=1.5)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([1.5, 1.5, 0.0]).double())
    assert logps.grad.abs().max() < 1e-15


def test_z0_is_the_mean_log_ratio_and_never_negative(random):
    logps, anchor = random(8), random(8)
    mean = (logps - anchor).mean()
    above, below = (logps, anchor) if mean > 0 else (anchor, logps)
    assert_close(kto_z0(above, below), mean.abs())
    assert kto_z0(below, above).item() == 0.0


def test_z0_is_averaged_before_it_is_clamped():
    # log-ratios −1 and 3: their mean is 1; clamped first it would be 1.5
    assert kto_z0(torch.tensor([-1.0, 3.0]), torch.zeros(2)).item() == 1.0


def test_no_gradient_flows_through_z0(random):
    logps, anchor = random(4).requires_grad_(), random(4)
    mismatched = (anchor + 1).requires_grad_()
    z0 = kto_z0(mismatched, anchor)
    assert z0.item() == pytest.approx(1)
    assert not z0.requires_grad
    kto_loss(logps, anchor, torch.ones(4), beta=0.1, z0=z0).sum().backward()
    assert logps.grad is not None
    assert mismatched.grad is None


def test_the_mean_over_ranks_of_the_log_ratios_may_be_passed_as_one_number(random):
    logps, anchor = random(4, 3), random(4, 3) - 5  # four ranks, three responses on each
    of_all = kto_z0(logps.flatten(), anchor.flatten())
    assert_close(kto_z0(logps.mean()[None], anchor.mean()[None]), of_all)


def test_the_proximal_form_takes_the_effective_anchor_in_z0_too(random):
    policy, reference, sampler = random(4) + 1, random(4), random(4)
    anchor, beta = effective_anchor(reference, sampler, 0.1, 0.3)
    loss = kto_loss(policy, anchor, torch.ones(4), beta=beta, z0=kto_z0(policy, anchor))
    log_ratios = 0.25 * (policy - reference) + 0.75 * (policy - sampler)
    z0 = max(0.0, log_ratios.mean().item())
    assert z0 > 0
    assert_close(loss, 1 - torch.sigmoid(0.4 * (log_ratios - z0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": (3, 2)}, r"`logps` has shape \[3, 2\], but needs \[N\]"),
        ({"anchor_logps": (1,)}, r"`anchor_logps` has shape \[1\], but needs \[3\]"),
        ({"labels": (3, 1)}, r"`labels` has shape \[3, 1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    shapes = {"logps": (3,), "anchor_logps": (3,), "labels": (3,)} | change
    with pytest.raises(ValueError, match=message):
        kto_loss(**{name: torch.zeros(shape) for name, shape in shapes.items()}, beta=0.1, z0=0.0)


def test_a_z0_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`mismatched_logps` has shape \[0\], but needs \[M>=1\]"):
        kto_z0(torch.zeros(0), torch.zeros(0))
