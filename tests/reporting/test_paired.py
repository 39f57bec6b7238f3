"""Paired comparisons against scipy's permutation test and by hand."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from lit_align.evaluation.rows import HeldOutRow, ScoredRow
from lit_align.reporting.paired import _sign_flip_p, paired_comparison


def rows(seed: int, shift: float = 0.0) -> list[HeldOutRow]:
    generator = torch.Generator().manual_seed(seed)
    return [
        HeldOutRow(
            source=f"p:{place}",
            prompt=f"Prompt {place}",
            prompt_ids=[],
            responses=[],
            responses_start=[],
            response_ids=[],
            response_ids_start=[],
            finished=[],
            finished_start=[],
            logps=[],
            logps_start=[],
            scorers=[ScoredRow("training", "a", (torch.randn(2, generator=generator) + shift).tolist(), [], 0.5)],
        )
        for place in range(40)
    ]


def test_the_paired_test_is_scipys():
    a, b = rows(1), rows(2, shift=0.2)
    ours = paired_comparison(a, b)
    assert ours is not None
    rewards = [[row.scorers[0].rewards for row in each] for each in (a, b)]
    theirs = stats.permutation_test(
        [[sum(pair) / 2 for pair in each] for each in rewards],
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
    )
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.02)
    assert ours.difference.value == pytest.approx(theirs.statistic)
    wins = [sum((x > y) + 0.5 * (x == y) for x in m for y in n) / 4 for m, n in zip(*rewards, strict=True)]
    assert ours.win_rate.value == pytest.approx(sum(wins) / len(wins))


def test_a_run_ties_with_itself():
    same = paired_comparison(rows(1), rows(1))
    assert same is not None
    assert (same.difference.value, same.p, same.win_rate.value) == (0, 1, 0.5)
    assert paired_comparison(rows(1), []) is None


def test_the_parts_in_which_signs_are_drawn_do_not_matter():
    differences = torch.randn(30, generator=torch.Generator().manual_seed(1)).double() + 0.3
    assert len({_sign_flip_p(differences, 1_000, at_once) for at_once in (1, 100, 7_000, 4_000_000)}) == 1


def test_all_rows_of_a_repeated_prompt_are_compared():
    a, b = rows(1), rows(2)
    doubled = [replace(row, scorers=[replace(row.scorers[0], rewards=[0.0, 0.0])]) for row in a]
    found = paired_comparison([*a, *doubled], b)
    expected = [sum(x.scorers[0].rewards) / 4 - sum(y.scorers[0].rewards) / 2 for x, y in zip(a, b, strict=True)]
    assert found is not None
    assert found.difference.value == pytest.approx(sum(expected) / len(expected))
