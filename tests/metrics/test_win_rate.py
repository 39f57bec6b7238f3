"""Win rates against counting, intervals against simulation."""

import itertools

import pytest
import torch

from lit_align.metrics import WinRateMetric, bootstrap_interval, win_rates


def test_win_rates_count_pairs_with_ties_as_half_or_as_wins():
    ours, theirs = [[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 5.0]]
    for tie in (0.5, 1.0):
        expected = [
            sum(1.0 if a > b else tie if a == b else 0.0 for a, b in itertools.product(x, y)) / 4
            for x, y in zip(ours, theirs, strict=True)
        ]
        assert win_rates(torch.tensor(ours), torch.tensor(theirs), tie=tie).tolist() == expected


def test_a_policy_against_its_own_four_samples_has_half_or_by_the_papers_rule_five_eighths():
    rewards = torch.randn(50, 4)
    metric = WinRateMetric()
    metric.update(rewards[:20], rewards[:20])
    metric.update(rewards[20:], rewards[20:])
    values = metric.compute()
    assert values["win_rate"] == 0.5 == values["win_rate_low"] == values["win_rate_high"]
    assert values["win_rate_ties_as_wins"] == 0.625
    assert values["reward_start"] == values["reward_end"] == pytest.approx(rewards.double().mean().item())


def test_intervals_of_95_percent_cover_the_truth_that_often():
    """Per-prompt win rates that are 0, ½ or 1; 100 prompts; 400 repetitions."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.25, 0.2, 0.55])
    truth = 0.2 * 0.5 + 0.55
    covered = 0
    for seed in range(400):
        values = torch.multinomial(probabilities, 100, replacement=True, generator=generator) / 2
        low, high = bootstrap_interval(values, resamples=1000, seed=seed)
        covered += low <= truth <= high
    assert 0.93 <= covered / 400 <= 0.98
