import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives import DPO, IPO
from lit_align.objectives.anchor import effective_anchor
from lit_align.policy import PolicyConfig

PER_TOKEN = {kind: kind(PolicyConfig("none"), length_normalize=True) for kind in (DPO, IPO)}
SUMS = {kind: kind(PolicyConfig("none")) for kind in (DPO, IPO)}


def batch_of(lengths):
    return SimpleNamespace(lengths=torch.tensor(lengths), labels=None)


def test_a_pair_worked_by_hand():
    # log-ratios 4 over 8 tokens and −1 over 4: h = 0.5 + 0.25 = 0.75
    logps, anchor = torch.tensor([[-6.0, -9.0]]).double(), torch.tensor([[-10.0, -8.0]]).double()
    batch = batch_of([[8, 4]])
    dpo = PER_TOKEN[DPO].loss(logps, anchor, 5.0, batch)
    assert dpo.item() == pytest.approx(math.log1p(math.exp(-3.75)), rel=1e-12)
    ipo = PER_TOKEN[IPO].loss(logps, anchor, 0.5, batch)
    assert ipo.item() == pytest.approx(0.0625, rel=1e-12)  # (0.75 − 1)²


@pytest.mark.parametrize(("kind", "factor"), [(DPO, 1), (IPO, 12**2)])
def test_at_equal_lengths_beta_times_length_gives_the_loss_of_sums(kind, factor, random):
    logps, anchor, batch = random(6, 2), random(6, 2), batch_of([[12, 12]] * 6)
    per_token = PER_TOKEN[kind].loss(logps, anchor, 0.3 * 12, batch)
    assert_close(factor * per_token, SUMS[kind].loss(logps, anchor, 0.3, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [DPO, IPO])
def test_the_gradient_of_each_response_is_divided_by_its_length(kind, random):
    logps, anchor, batch = random(4, 2).requires_grad_(), random(4, 2), batch_of([[3, 9]] * 4)
    (gradient,) = torch.autograd.grad(PER_TOKEN[kind].loss(logps, anchor, 0.7, batch).sum(), logps)
    assert_close(3 * gradient[:, 0], -9 * gradient[:, 1])


@pytest.mark.parametrize("kind", [DPO, IPO])
def test_a_proximal_form_averages_both_anchors_per_token(kind, random):
    logps, reference, sampler = random(5, 2), random(5, 2), random(5, 2)
    batch = batch_of([[2, 7]] * 5)
    anchor, beta = effective_anchor(reference, sampler, 0.4, 0.1)
    loss = PER_TOKEN[kind].loss(logps, anchor, beta, batch)
    means, beta = effective_anchor(reference / batch.lengths, sampler / batch.lengths, 0.4, 0.1)
    assert_close(loss, SUMS[kind].loss(logps / batch.lengths, means, beta, batch), rtol=1e-12, atol=0)


def test_an_empty_response_does_not_divide_by_zero():
    zeros = torch.zeros(1, 2).double()
    loss = PER_TOKEN[DPO].loss(zeros, zeros, 1.0, batch_of([[0, 3]]))
    assert loss.item() == pytest.approx(0.6931471805599453)
