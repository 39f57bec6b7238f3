"""summary.json: what is written is read again, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_align.errors import UserError
from lit_align.evaluation.summary import (
    BestOfN,
    DataComparison,
    Diversity,
    Forgetting,
    PartSummary,
    ScorerSummary,
    Summary,
)
from lit_align.metrics.win_rate import Estimate

RATE = Estimate(0.6, 0.5, 0.7)


def summary() -> Summary:
    scored = ScorerSummary(
        identity="rewards.py:reward@1",
        reward_start=Estimate(0.0, -1.0, 1.0),
        reward_end=Estimate(2, 1, 3),
        win_rate=RATE,
        win_rate_ties_as_wins=0.7,
        win_rate_length_controlled=Estimate(0.55, 0.4, 0.7),
        parts={"end": PartSummary(RATE, RATE, data=RATE)},
        data=DataComparison(Estimate(3, 2, 4), RATE, 0.5, RATE),
        best_of_n={"2": BestOfN(0.19, RATE), "4": BestOfN(0.64, RATE)},
    )
    return Summary(
        prompts=8,
        responses_per_prompt=2,
        kl_from_start=Estimate(1.5, 1.0, 2.0),
        length_start=4.0,
        length_end=5.5,
        finished_start=0.9,
        finished_end=0.8,
        diversity_start=Diversity(0.1, 0.2, 0.3),
        diversity_end=Diversity(0.4, 0.5, 0.6),
        scorers={"training": scored, "low": scored},
        length_data=3.0,
        forgetting={"texts": Forgetting(1.0, 2.0, Estimate(1.0, 0.5, 1.5))},
    )


def written(folder: Path, held: Summary | None = None) -> Any:
    """The content of summary.json."""
    (held or summary()).write(folder)
    return json.loads((folder / "summary.json").read_text())


def read(folder: Path, values: object) -> Summary:
    (folder / "summary.json").write_text(json.dumps(values))
    held = Summary.read(folder)
    assert held is not None
    return held


def test_a_summary_is_read_as_it_was_written(tmp_path):
    summary().write(tmp_path)
    assert Summary.read(tmp_path) == summary()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert Summary.read(tmp_path / "nowhere") is None


def test_an_estimate_is_three_keys(tmp_path):
    values = written(tmp_path)
    scored = values["scorers"]["low"]
    assert [scored[key] for key in ("win_rate", "win_rate_low", "win_rate_high")] == [0.6, 0.5, 0.7]
    assert values["version"] == 1


def test_parts_that_do_not_apply_are_left_out(tmp_path):
    values = written(tmp_path)
    del values["forgetting"], values["length_data"], values["scorers"]["low"]["data"]
    held = read(tmp_path, values)
    assert held.forgetting == {}
    assert held.length_data is None
    assert held.scorers["low"].data is None
    assert "forgetting" not in written(tmp_path, held)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop("version"), "version None instead of 1"),
        (lambda values: values.update(version=2), "version 2 instead of 1"),
        (lambda values: values.pop("prompts"), "prompts is missing"),
        (lambda values: values["scorers"]["low"].pop("win_rate_low"), r"scorers\.low\.win_rate is not a number"),
        (lambda values: values["scorers"].update(low=3), r"scorers\.low is not an object"),
        (lambda values: values.update(scorers=3), "scorers is not an object"),
        (lambda values: values.update(length_end="long"), "length_end is not a number"),
    ],
)
def test_other_files_are_refused_by_key(tmp_path, change, said):
    values = written(tmp_path)
    change(values)
    with pytest.raises(UserError, match=rf"summary\.json: .*{said}.*python train\.py test --config"):
        read(tmp_path, values)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_summary_is_one_message(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match="cannot read it"):
        Summary.read(tmp_path)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (Estimate(0.75, 0.6, 0.9), "is better than the start"),
        (Estimate(0.25, 0.1, 0.4), "is worse than the start"),
        (Estimate(0.55, 0.4, 0.7), "no difference is shown"),
    ],
)
def test_the_verdict_in_words_is_as_sure_as_its_interval(rate, said):
    scored = replace(summary().training, win_rate=rate)
    sentence = replace(summary(), scorers={"training": scored}).sentence()
    assert said in sentence
    assert f"{rate.value:.1%}" in sentence
    assert "by rewards.py:reward@1" in sentence


@pytest.mark.parametrize(("start", "end", "warns"), [(0.5, 0.5, False), (0.9, 0.49, True), (0.49, 0.9, True)])
def test_truncation_is_flagged_below_half_finished(start, end, warns):
    changed = replace(summary(), finished_start=start, finished_end=end)
    assert ("cut at sampling.max_new_tokens" in changed.caution()) == changed.is_truncated == warns


@pytest.mark.parametrize(("gap", "said"), [(1.5, ""), (1.8, "longer than the start's by 1.8"), (-2.4, "shorter")])
def test_a_win_rate_at_equal_length_needs_pairs_of_equal_length(gap, said):
    changed = replace(summary(), length_gap=gap)
    assert said in changed.caution()
    assert changed.has_equal_lengths == (not said)


def test_flat_names_of_judges_do_not_hide_others():
    flat = summary().flat()
    assert flat["win_rate_low"] == 0.5
    assert flat["low/win_rate"] == 0.6
    assert all(isinstance(value, int | float) for value in flat.values())
