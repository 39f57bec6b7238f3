"""The change of texts' likelihood per token, and its interval."""

import pytest
import torch

from lit_align.evaluation.forgetting import change_per_token


def test_texts_of_different_lengths_that_change_alike_have_no_interval():
    tokens = torch.tensor([10.0, 20.0, 400.0], dtype=torch.float64)
    assert change_per_token(0.25 * tokens, tokens) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_covers_the_change_of_all_texts_95_times_in_100():
    """Long texts change more than short ones, per token too."""
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(300):
        tokens = torch.randint(5, 200, (60,), generator=generator).double()
        rates = 0.1 + tokens / 1000 + 0.2 * torch.randn(60, generator=generator, dtype=torch.float64)
        change = change_per_token(rates * tokens, tokens)
        sizes = torch.arange(5, 200).double()
        truth = (sizes * (0.1 + sizes / 1000)).sum() / sizes.sum()
        covered.append(change.low <= truth <= change.high)
    assert 0.9 <= sum(covered) / len(covered) <= 0.99


def test_a_single_text_has_its_own_change():
    change = change_per_token(torch.tensor([3.0]), torch.tensor([12.0]))
    assert change == pytest.approx((0.25, 0.25, 0.25))
