"""Win rates against counting, intervals against simulation."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.metrics import WinRateMetric, bootstrap_interval, length_controlled_win_rate, win_rates
from lit_align.metrics.win_rate import length_gap, mean_interval, pair_wins, rate_interval, student_t


def test_win_rates_count_pairs_with_ties_as_half_or_as_wins():
    ours, theirs = [[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 5.0]]
    for tie in (0.5, 1.0):
        expected = [
            sum(1.0 if a > b else tie if a == b else 0.0 for a, b in itertools.product(x, y)) / 4
            for x, y in zip(ours, theirs, strict=True)
        ]
        assert win_rates(torch.tensor(ours), torch.tensor(theirs), tie=tie).tolist() == expected


def test_a_policy_wins_half_of_its_own_samples_or_five_eighths():
    rewards = torch.randn(50, 4)
    metric = WinRateMetric()
    lengths = torch.randint(1, 40, (50, 4))
    for part in (slice(20), slice(20, None)):
        metric.update(rewards[part], rewards[part], lengths[part], lengths[part])
    values = metric.compute()
    assert values["win_rate"] == 0.5 == values["win_rate_low"] == values["win_rate_high"]
    assert values["win_rate_ties_as_wins"] == 0.625
    assert values["win_rate_length_controlled"] == pytest.approx(0.5)
    assert values["length_start"] == values["length_end"] == lengths.double().mean().item()
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


def test_an_interval_of_many_values_draws_them_in_parts(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_interval(values, resamples=1000)
    monkeypatch.setattr("lit_align.metrics.win_rate.BOOTSTRAP_CHUNK", 7 * 50)
    assert bootstrap_interval(values, resamples=1000) == whole


def judged(generator: torch.Generator, *, quality: float, bias: float, longer: float, prompts: int, n: int = 2):
    """Outcomes of a judge with a known bias: P(win) = σ(quality + bias·tanh(Δlength / sd)), and lengths."""
    lengths = (20 + longer + 8 * torch.randn(prompts, n, generator=generator)).round().clamp(min=1)
    other = (20 + 8 * torch.randn(prompts, n, generator=generator)).round().clamp(min=1)
    difference = lengths[:, :, None] - other[:, None, :]
    p = torch.sigmoid(quality + bias * torch.tanh(difference / difference.std(correction=0)))
    return (torch.rand(p.shape, generator=generator) < p).double(), lengths, other


def test_length_control_takes_out_a_judges_bias_and_leaves_the_quality():
    generator = torch.Generator().manual_seed(0)
    wins, lengths, other = judged(generator, quality=0.0, bias=2.0, longer=12, prompts=4000)
    assert wins.mean() > 0.65, "length alone seems to win"
    rate, low, high = length_controlled_win_rate(wins, lengths, other)
    assert low < 0.5 < high
    assert rate == pytest.approx(0.5, abs=0.02)

    wins, lengths, other = judged(generator, quality=1.0, bias=-2.0, longer=12, prompts=4000)
    assert wins.mean() < 0.6, "length hides the quality"
    rate, *_ = length_controlled_win_rate(wins, lengths, other)
    assert rate == pytest.approx(1 / (1 + 2.718281828**-1), abs=0.02)


def test_length_control_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(1)
    wins, lengths, other = judged(generator, quality=0.5, bias=1.0, longer=4, prompts=100)
    difference = lengths[:, :, None] - other[:, None, :]
    feature = torch.tanh(difference / difference.std(correction=0)).flatten()[:, None].numpy()
    fitted = LogisticRegression(C=1e6).fit(feature, wins.flatten().numpy())
    expected = 1 / (1 + 2.718281828 ** -fitted.intercept_[0])
    assert length_controlled_win_rate(wins, lengths, other)[0] == pytest.approx(expected, abs=1e-3)


def test_length_controlled_intervals_cover_the_truth():
    """100 prompts with 2 × 2 pairs, which share responses; 400 repetitions."""
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(400):
        wins, lengths, other = judged(generator, quality=0.5, bias=1.0, longer=4, prompts=100)
        _, low, high = length_controlled_win_rate(wins, lengths, other)
        covered += low <= 1 / (1 + 2.718281828**-0.5) <= high
    assert covered / 400 >= 0.93


def test_with_equal_lengths_there_is_nothing_to_control():
    rewards, other, same = torch.rand(30, 2), torch.rand(30, 2), torch.full((30, 2), 7)
    wins = pair_wins(rewards, other)
    assert length_controlled_win_rate(wins, same, same)[0] == pytest.approx(wins.mean().item(), abs=1e-5)
    lengths = torch.randint(1, 9, (30, 2))
    assert 0.9999 < length_controlled_win_rate(torch.ones(30, 2, 2), lengths, same)[0] < 1


def test_the_interval_of_a_rate_covers_near_100_percent():
    """At a true rate of 0.99, all of 128 prompts are won in 28 % of runs, and the bootstrap then has no width."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.rand(300, 128, generator=generator, dtype=torch.float64) < 0.99
    covered = [low <= 0.99 <= high for low, high in map(rate_interval, runs.double())]
    assert sum(covered) / len(covered) > 0.93
    bootstrap = [low <= 0.99 <= high for low, high in map(bootstrap_interval, runs[:100].double())]
    assert sum(bootstrap) / len(bootstrap) < 0.8


@pytest.fixture(scope="module")
def intervals() -> Any:
    """`benchmarks/intervals.py`."""
    path = Path(__file__).parents[2] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("benchmarks_intervals", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rate", "prompts", "within", "widest"),
    [
        (0.9, 16, 0.3, 0.2),
        (0.95, 16, 0.0, 0.09),
        (0.95, 16, 0.3, 0.17),
        (0.97, 64, 0.3, 0.055),
        (0.99, 128, 0.3, 0.024),
    ],
)
def test_the_interval_of_a_rate_covers_where_few_prompts_differ(intervals, rate, prompts, within, widest):
    """16 comparisons a prompt; Wilson's interval with the prompts' variance as it is covers in 86 to 94 of 100 runs."""
    torch.manual_seed(0)
    covered, width, *_ = intervals.measure(rate, intervals.experiments(rate, prompts, 16, within, 600), 1)
    assert covered > 0.93
    assert width < widest


def test_the_interval_of_a_rate_of_one_half_is_as_wide_as_its_error(intervals):
    torch.manual_seed(0)
    values = intervals.experiments(0.5, 128, 16, 0.3, 300)
    covered, width, *_ = intervals.measure(0.5, values, 1)
    assert 0.92 < covered < 0.98
    assert width == pytest.approx(2 * 1.979 * values.mean(1).std().item(), rel=0.05)


def test_the_interval_of_a_mean_of_16_values_covers():
    runs = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)).double()
    covered = [low <= 0 <= high for low, high in map(mean_interval, runs)]
    assert 0.93 <= sum(covered) / len(covered) <= 0.98


@pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.1824), (7, 2.3646), (15, 2.1314), (127, 1.9788)])
def test_students_quantiles(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, rel=0.01)


def test_a_length_gap_is_in_standard_deviations_of_the_difference():
    lengths = torch.tensor([[10.0, 14.0]])
    assert length_gap(lengths, torch.tensor([[6.0]])) == pytest.approx(6 / 2)
    assert length_gap(torch.tensor([[6.0]]), lengths) == pytest.approx(-6 / 2)
    assert length_gap(lengths, lengths) == 0
    assert length_gap(torch.tensor([[8]]), torch.tensor([[7]])) == 2, "no spread: half a token"


def test_a_rate_of_one_or_zero_counts_each_prompt_as_a_trial():
    low, high = rate_interval(torch.ones(20))
    assert (low, high) == (pytest.approx(20 / (20 + 2.0930**2), rel=1e-3), 1.0)
    assert rate_interval(torch.zeros(20)) == (0.0, pytest.approx(1 - low))
    nearly = torch.ones(20)
    nearly[0] = 0.999
    assert rate_interval(nearly) == (pytest.approx(low, abs=0.01), pytest.approx(1, abs=0.01)), "no jump to 1"
    assert rate_interval(torch.full((20,), 0.5)) == (0.5, 0.5), "the same responses twice"
