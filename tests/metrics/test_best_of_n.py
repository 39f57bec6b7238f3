"""The best of n, against all subsets, by hand, and by sampling."""

import itertools
import math

import pytest
import torch

from lit_align.metrics.best_of_n import best_of_n, best_of_n_kl


@pytest.mark.parametrize("n", range(1, 7))
def test_it_is_the_mean_over_all_subsets(n):
    rewards, values = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    subsets = [list(places) for places in itertools.combinations(range(6), n)]
    picked = [values.gather(1, places[rewards[:, places].argmax(1)][:, None]) for places in map(torch.tensor, subsets)]
    torch.testing.assert_close(best_of_n(rewards, values, n), torch.cat(picked, 1).mean(1))


def test_three_responses_worked_by_hand():
    # best of 2 among rewards 1, 3, 2: the pairs give 3, 2 and 3
    rewards = torch.tensor([[1.0, 3.0, 2.0]])
    assert best_of_n(rewards, rewards, 2).item() == pytest.approx(8 / 3)
    # by another scorer, those responses are worth 10, 20 and 40: 20, 40, 20
    assert best_of_n(rewards, torch.tensor([[10.0, 20.0, 40.0]]), 2).item() == pytest.approx(80 / 3)


def test_equal_rewards_share():
    rewards, values = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.0, 3.0, 6.0]])
    for n in (1, 2, 3):
        assert best_of_n(rewards, values, n).item() == pytest.approx(3.0)
    # one below, two equal above: the best of 2 is one of the two, at random
    assert best_of_n(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[9.0, 2.0, 4.0]]), 2).item() == pytest.approx(3.0)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match="must be from 1 to the number of responses, 3"):
        best_of_n(torch.zeros(2, 3), torch.zeros(2, 3), n)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_is_that_of_sampling(n):
    """With many distinct responses, P(best of n = the k-th lowest of M) = (k/M)^n − ((k−1)/M)^n."""
    M = 2_000
    p = torch.tensor([(k / M) ** n - ((k - 1) / M) ** n for k in range(1, M + 1)], dtype=torch.float64)
    exact = (p * (p * M).log()).sum().item()
    assert exact == pytest.approx(best_of_n_kl(n), abs=0.01)
    assert exact <= best_of_n_kl(n) + 1e-12  # an upper bound
    draws = torch.randint(M, (100_000, n), generator=torch.Generator().manual_seed(0)).amax(1)
    sampled = (p[draws] * M).log().mean().item()
    assert sampled == pytest.approx(best_of_n_kl(n), abs=0.03)


def test_the_kl_of_one_is_zero_and_that_of_four_is_known():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
