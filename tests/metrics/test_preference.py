"""Logged means, against sums by hand."""

import pytest
import torch

from lit_align.metrics import PreferenceMetrics


def test_means_are_over_examples_and_ties_count_as_failures():
    metric = PreferenceMetrics()
    logps, anchor = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]), torch.zeros(2, 2)
    metric.update(torch.tensor([1.0, 2.0]), logps, anchor, torch.tensor([[3, 5], [4, 4]]), 0.5 * (logps - anchor))
    logps, anchor = torch.tensor([[-4.0, -1.0]]), torch.tensor([[-3.0, -1.0]])
    metric.update(torch.tensor([6.0]), logps, anchor, torch.tensor([[9, 1]]), 0.5 * (logps - anchor))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {
        "loss": 3.0,
        "reward_accuracy": 1 / 3,  # the tie of the second example counts 0
        "reward_margin": 0.5 * (2 + 0 - 1) / 3,
        "logp_chosen": -7 / 3,
        "logp_rejected": -2.0,
        "log_ratio_chosen": -4 / 3,
        "log_ratio_rejected": -5 / 3,
        "length_chosen": 16 / 3,
        "length_rejected": 10 / 3,
    }


def test_without_an_anchor_there_are_no_log_ratios():
    metric = PreferenceMetrics(anchored=False)
    logps = torch.tensor([[-1.0, -3.0]])
    metric.update(torch.tensor([1.0]), logps, None, torch.tensor([[3, 5]]), logps)
    values = metric.compute()
    assert values["reward_margin"] == 2
    assert not any("log_ratio" in name for name in values)


def test_single_responses_count_for_the_side_of_their_label():
    metric = PreferenceMetrics()
    logps, anchor = torch.tensor([[-1.0], [-2.0], [-5.0]]), torch.tensor([[-2.0], [-2.5], [-4.0]])
    labels = torch.tensor([[1.0], [0.0], [0.0]])
    metric.update(torch.zeros(3), logps, anchor, torch.tensor([[3], [5], [7]]), 0.5 * (logps - anchor), labels)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values["reward_accuracy"] == 2 / 3  # the second is undesirable and above its anchor
    assert values["reward_margin"] == 0.5 * (1 - 0.5 + 1) / 3
    assert (values["logp_chosen"], values["logp_rejected"]) == (-1, -3.5)
    assert (values["log_ratio_chosen"], values["log_ratio_rejected"]) == (1, -0.25)
    assert (values["length_chosen"], values["length_rejected"]) == (3, 6)


@pytest.mark.parametrize("K", [1, 2])
def test_a_weight_counts_like_repeated_examples(K):
    random = torch.Generator().manual_seed(0)
    losses, values = torch.rand(3, generator=random), torch.rand(4, 3, K, generator=random)
    labels = torch.tensor([[1.0], [0.0], [1.0]]) if K == 1 else None
    weighted, repeated = PreferenceMetrics(), PreferenceMetrics()
    weighted.update(losses, *values, labels, torch.tensor([2.0, 0.5, 1.5]))
    some = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2])
    repeated.update(losses[some], *values[:, some], None if labels is None else labels[some])
    for ours, theirs in zip(weighted.compute().values(), repeated.compute().values(), strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_texts_have_no_better_or_worse_side():
    metric = PreferenceMetrics(anchored=False, preferences=False)
    logps = torch.tensor([[-4.0], [-6.0]])
    metric.update(torch.tensor([1.0, 2.0]), logps, None, torch.tensor([[3], [5]]), logps)
    assert {name: value.item() for name, value in metric.compute().items()} == {"loss": 1.5, "logp": -5, "length": 4}
