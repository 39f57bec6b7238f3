"""Properties that every loss function has."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from lit_align import objectives
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.cpo import cpo_loss
from lit_align.objectives.dpo import dpo_loss
from lit_align.objectives.exo import exo_loss
from lit_align.objectives.ipo import ipo_loss
from lit_align.objectives.kto import kto_loss, kto_z0
from lit_align.objectives.mpo import mpo_loss
from lit_align.objectives.orpo import orpo_loss
from lit_align.objectives.reward_model import bradley_terry_loss
from lit_align.objectives.simpo import simpo_loss
from lit_align.objectives.sppo import sppo_baseline, sppo_loss, win_probabilities_from_rewards


def sppo(logps, anchor, rewards):
    P = win_probabilities_from_rewards(rewards.double())
    c = sppo_baseline(anchor, logps.detach(), win_probabilities=P, beta=0.5)
    return sppo_loss(logps, anchor, win_probabilities=P, beta=0.5, baseline=c)


# each as a function of log π [6, 2], anchor log-probabilities [6, 2], positive numbers [6, 2] and labels [6]
LOSSES = {
    "dpo": lambda x, a, n, p: dpo_loss(x, a, beta=0.1),
    "cdpo": lambda x, a, n, p: dpo_loss(x, a, beta=0.1, labels=p, label_smoothing=0.1),
    "robust_dpo": lambda x, a, n, p: dpo_loss(x, a, beta=0.1, labels=p, label_smoothing=0.1, robust=True),
    "dpo_rewards": lambda x, a, n, p: dpo_loss(x, a, beta=0.1, rewards=n),
    "ipo": lambda x, a, n, p: ipo_loss(x, a, beta=0.1, labels=p),
    "kto": lambda x, a, n, p: kto_loss(x[:, 0], a[:, 0], p > 0.5, beta=0.1, z0=kto_z0(x[:1, 1] - a[:1, 1]) * 0),
    "sppo": lambda x, a, n, p: sppo(x, a, n),
    "exo": lambda x, a, n, p: exo_loss(x, a, beta=0.1),
    "exo_rewards": lambda x, a, n, p: exo_loss(x, a, beta=0.1, rewards=n),
    "mpo": lambda x, a, n, p: mpo_loss(x, labels=p),
    "mpo_log": lambda x, a, n, p: mpo_loss(x, labels=p, log_form=True),
    "simpo": lambda x, a, n, p: simpo_loss(x, n, beta=2.0, gamma=0.5),
    "orpo": lambda x, a, n, p: orpo_loss(x, n, beta=0.1, labels=p),
    "cpo": lambda x, a, n, p: cpo_loss(x, beta=0.1, labels=p, lengths=n),
    "sft": lambda x, a, n, p: sft_loss(x[:, 0], n[:, 0]),
    "bradley_terry": lambda x, a, n, p: bradley_terry_loss(x, margin=p),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch(random):
    return -random(6, 2).exp() - 1, -random(6, 2).exp() - 1, random(6, 2).exp(), torch.sigmoid(random(6))


@every_loss
def test_no_value_is_read_back_from_the_device(loss, batch):
    # a meta tensor has no values: .item(), bool() and data-dependent shapes raise
    value = loss(*(tensor.to("meta") for tensor in batch))
    assert value.shape == (6,)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_keeps_the_dtype_and_has_one_value_per_example(loss, dtype, batch):
    value = loss(*(tensor.to(dtype) for tensor in batch))
    assert value.shape == (6,)
    assert value.dtype == dtype
    assert_close(value.double(), loss(*batch), rtol=2e-5, atol=2e-6)


@every_loss
def test_examples_do_not_see_each_other(loss, batch):
    each = torch.cat([loss(*(tensor[i : i + 1] for tensor in batch)) for i in range(6)])
    assert_close(loss(*batch), each, rtol=1e-14, atol=1e-14)


@every_loss
def test_the_gradient_is_that_of_the_loss_by_differences(loss, batch):
    logps, *rest = batch
    if loss is LOSSES["sppo"]:  # its constant is estimated from the sampler, and moves no gradient
        P = win_probabilities_from_rewards(rest[1])
        torch.autograd.gradcheck(lambda x: sppo_loss(x, rest[0], win_probabilities=P, beta=0.5), logps.requires_grad_())
    else:
        torch.autograd.gradcheck(lambda x: loss(x, *rest), logps.requires_grad_())


def changed(batch, i, change):
    return [change(tensor) if j == i else tensor for j, tensor in enumerate(batch)]


@every_loss
def test_one_row_in_place_of_six_is_not_broadcast(loss, batch):
    used = [i for i in range(4) if not torch.equal(loss(*batch), loss(*changed(batch, i, lambda x: x.flip(0))))]
    assert used
    for i in used:
        with pytest.raises(ValueError, match="has shape"):
            loss(*changed(batch, i, lambda x: x[:1]))


@every_loss
@pytest.mark.parametrize("i", [1, 2, 3], ids=["anchor_logps", "numbers", "labels"])
def test_float32_inputs_cost_float64_logps_no_digits(loss, i, batch):
    narrow = changed(batch, i, torch.Tensor.float)
    wide = [tensor.double() for tensor in narrow]
    assert_close(loss(*narrow), loss(*wide), rtol=1e-14, atol=1e-14)


def test_the_signatures_match_the_documentation():
    """Exported from `lit_align.objectives`; `beta` is the one name of the weight, and keywords are keywords."""
    signatures = {
        "dpo_loss": "logps, anchor_logps, *, beta, label_smoothing=0.0, labels=None",
        "ipo_loss": "logps, anchor_logps, *, beta",
        "sppo_loss": "logps, anchor_logps, *, win_probabilities, beta",
        "exo_loss": "logps, anchor_logps, *, beta, rewards=None, reward_temperature=1.0, label_smoothing=0.001",
        "kto_loss": "logps, anchor_logps, labels, *, beta, z0",
        "mpo_loss": "logps, *, labels=None, log_form=False",
        "simpo_loss": "logps, lengths, *, beta, gamma",
        "orpo_loss": "logps, lengths, *, beta",
        "cpo_loss": "logps, *, beta",
        "effective_anchor": "reference_logps, sampler_logps, beta, proximal",
    }
    for name, expected in signatures.items():
        signature = inspect.signature(getattr(objectives, name))
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(plain)).startswith(f"({expected}"), name
        assert name in objectives.__all__
