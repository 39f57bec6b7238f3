import pytest
import torch
from torch.testing import assert_close

from lit_align.objectives.sft import sft_loss


def test_each_response_counts_its_own_tokens():
    loss = sft_loss(torch.tensor([-6.0, -6.0]).double(), torch.tensor([3, 2]))
    assert_close(loss, torch.tensor([2.0, 3.0]).double())


def test_the_population_optimum_is_the_distribution_of_the_text(bandit, solve):
    def loss(logps):
        return (bandit.sampler.exp() * sft_loss(logps, torch.ones(5))).sum()

    assert_close(solve(loss, bandit.reference), bandit.sampler, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 2), (3, 2)), r"`logps` has shape \[3, 2\], but needs \[N\]"),
        (((3,), (1,)), r"`lengths` has shape \[1\], but needs \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        sft_loss(*map(torch.zeros, shapes))
