"""Pairing rules: the responses that are trained on, and the reasons for leaving others out."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_align.data.batches import Example
from lit_align.data.pairing import (
    AllPairs,
    Best,
    BestRandom,
    BestWorst,
    Listwise,
    check_pairing,
    take,
    with_labels,
    with_mismatched,
)
from lit_align.errors import UserError
from lit_align.needs import DataNeeds


def group(rewards: list[float], responses: list[list[int]] | None = None, **more: Any) -> Example:
    responses = responses or [[i + 1, 0] for i in range(len(rewards))]
    return Example([1], responses, "", rewards=rewards, sampler_logps=[-float(i) for i in range(len(rewards))], **more)


def test_the_best_is_chosen_and_the_worst_rejected_with_their_data():
    (pair,) = BestWorst()([group([0.5, 2.0, -1.0, 1.0])]).examples
    assert pair.response_ids == [[2, 0], [3, 0]]
    assert (pair.rewards, pair.sampler_logps) == ([2.0, -1.0], [-1.0, -2.0])


def test_the_best_alone_needs_one_response_and_counts_the_rest():
    groups = [
        group([0.5, 2.0, 2.0]),
        group([1.0, 3.0], [[7, 0], [7, 0]]),
        group([1.0, 3.0], [[], [0]], texts=["", " "]),
        group([0.1, 0.2]),
    ]
    pairs = Best(threshold=0.3)(groups)
    assert [example.response_ids for example in pairs.examples] == [[[2, 0]], [[7, 0]]]
    assert [example.rewards for example in pairs.examples] == [[2.0], [1.0]]
    assert pairs.counts == {"all responses equal or empty": 1, "below the threshold": 1}


def test_every_prompt_becomes_a_pair_or_a_count():
    groups = [
        group([1.0, 1.0, 1.0]),
        group([1.0, 1.05]),
        group([1.0, 3.0], [[7, 0], [7, 0]]),
        group([1.0, 3.0], [[0], [7, 0]], texts=["", "seven"]),
        group([1.0, 3.0]),
    ]
    pairs = BestWorst(min_margin=0.1)(groups)
    assert pairs.counts == {"tied": 1, "margin too small": 1, "all responses equal or empty": 2}
    assert len(pairs.examples) + pairs.counts.total() == len(groups)


def test_of_equal_responses_the_first_counts_even_if_a_scorer_is_fickle():
    (pair,) = BestWorst()([group([5.0, 9.0, 1.0], [[7, 0], [7, 0], [8, 0]])]).examples
    assert pair.rewards == [5.0, 1.0]


def test_among_equal_rewards_the_earlier_response_is_first():
    (pair,) = BestWorst()([group([1.0, 2.0, 2.0, 1.0])]).examples
    assert pair.response_ids == [[2, 0], [4, 0]]


def test_a_negative_margin_is_refused():
    with pytest.raises(UserError, match="min_margin=-1 must be at least 0"):
        BestWorst(-1)


@pytest.mark.parametrize("option", ["min_margin", "reward_temperature", "threshold", "max_length"])
def test_an_option_of_nan_is_refused(option):
    with pytest.raises(UserError, match=rf"{option}=(nan|NaN) must be "):
        BestWorst(**{option: math.nan})


def test_taking_branches_keeps_missing_fields_missing():
    assert take(Example([1], [[1], [2]], ""), [1]).rewards is None


def test_groups_come_whole_and_best_first_or_not_at_all():
    groups = [group([0.5, 2.0, -1.0]), group([1.0, 1.0, 1.0]), group([1.0, 3.0, 2.0], [[7, 0], [7, 0], [8, 0]])]
    pairs = Listwise()(groups)
    assert [example.rewards for example in pairs.examples] == [[2.0, 0.5, -1.0]]
    assert pairs.counts == {"tied": 1, "with a response taken out": 1}


def test_win_probabilities_are_against_all_responses_and_itself():
    rewards = [0.5, 2.0, -1.0]
    expected = [sum(1 / (1 + math.exp(-(r - other) / 2.0)) for other in rewards) / 3 for r in rewards]
    (pair,) = BestWorst(reward_temperature=2.0)([group(rewards)]).examples
    assert pair.win_probabilities == pytest.approx([expected[1], expected[2]])


def test_each_example_gets_another_prompts_response_as_last_branch():
    examples = [Example([p], [[p, 1], [p, 2]], "") for p in (1, 1, 2, 3, 1)]
    made = list(with_mismatched(examples))
    assert [example.response_ids[-1][0] for example in made] == [2, 2, 3, 1, 2]
    assert all(
        example.mismatched and example.response_ids[:2] == e.response_ids
        for example, e in zip(made, examples, strict=True)
    )
    with pytest.raises(UserError, match="all rows have the same"):
        list(with_mismatched(examples[:2]))


def test_a_rule_reads_one_group_after_another():
    groups = (group([1.0, 0.0], [[n], [0]]) for n in range(1, 9))
    first = next(BestWorst().select(groups, Counter(), Counter()))  # type: ignore[arg-type]
    assert first.response_ids == [[1], [0]]
    assert sum(1 for _ in groups) == 7


def test_pairs_get_labels_unless_they_have_some():
    pair, single = Example([1], [[1], [2]], ""), Example([1], [[1]], "", labels=[0.0])
    assert [with_labels(example).labels for example in (pair, single)] == [[1.0, 0.0], [0.0]]
    with pytest.raises(UserError, match="Use BestWorst"):
        with_labels(Example([1], [[1], [2], [3]], ""))


def test_one_real_token_is_not_empty_but_an_end_token_alone_is():
    (pair,) = BestWorst()([group([1.0, 2.0, 0.0], [[7], [8, 0], [0]], texts=["a", "b", ""])]).examples
    assert pair.response_ids == [[8, 0], [7]]


def test_responses_removed_from_a_group_are_counted_by_reason():
    responses = [[1, 0], [2, 0], [3, 0], [3, 0], [0], [4, 5, 6, 0]]
    texts = ["A b", "a  B", "long one", "long two", " ", "other"]
    rewards = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    exact = BestWorst()([group(rewards, responses, texts=texts)])
    assert exact.partial_drops == {"responses equal after truncation": 1, "empty responses": 1}
    assert exact.examples[0].texts == ["A b", "other"]
    normal = BestWorst(duplicates="normalised", max_length=3)([group(rewards, responses, texts=texts)])
    assert normal.partial_drops == {
        "repeated responses": 1,
        "responses equal after truncation": 1,
        "empty responses": 1,
        "too long responses": 1,
    }
    assert normal.examples[0].texts == ["A b", "long one"]


def test_all_pairs_are_made_but_those_tied_or_close_which_are_counted():
    made = AllPairs(min_margin=0.5)([group([1.0, 3.0, 1.0, 1.25])])
    assert [pair.rewards for pair in made.examples] == [[3.0, 1.25], [3.0, 1.0], [3.0, 1.0]]
    assert made.partial_drops == {"pairs tied": 1, "pairs margin too small": 2}


def test_the_random_rejected_response_is_worse_and_reproducible():
    groups = [group([1.0, 3.0, 2.9, 0.0, 2.0], texts=[f"{n} {k}" for k in range(5)]) for n in range(40)]
    groups = [take(each, range(5)) for each in groups]
    groups = [Example([1], each.response_ids, f"row {n}", rewards=each.rewards) for n, each in enumerate(groups)]
    rule = BestRandom(min_margin=0.5)
    pairs = rule(groups).examples
    rejected = [pair.rewards[1] for pair in pairs if pair.rewards]
    assert set(rejected) == {1.0, 0.0, 2.0}
    assert all(pair.rewards and pair.rewards[0] == 3.0 for pair in pairs)
    assert rule(groups).examples == pairs


def test_a_threshold_drops_prompts_without_a_good_response():
    made = BestWorst(threshold=2.0)([group([1.9, 0.0]), group([2.0, 0.0])])
    assert [pair.rewards for pair in made.examples] == [[2.0, 0.0]]
    assert made.counts == {"below the threshold": 1}


def test_ties_may_be_kept_with_the_label_one_half():
    made = AllPairs(ties="half")([group([1.0, 1.0, 0.0])])
    assert sorted(pair.labels for pair in made.examples) == [0.5, 1.0, 1.0]
    assert not made.counts
    assert not made.partial_drops


def test_soft_labels_come_from_the_rewards_or_from_who_compared():
    (pair,) = BestWorst(labels="soft", reward_temperature=2.0)([group([3.0, 1.0])]).examples
    assert pair.labels == pytest.approx(1 / (1 + math.exp(-1)))
    P = [[0.5, 0.9, 0.8], [0.1, 0.5, 0.7], [0.2, 0.3, 0.5]]
    (pair,) = BestWorst(labels="soft")([group([0.85, 0.4, 0.25], preferences=P)]).examples
    assert pair.labels == 0.8
    assert pair.win_probabilities == pytest.approx([2.2 / 3, 1.0 / 3])
    assert pair.preferences is None


TEMPERED = {"reward_temperature": 2.0}


@pytest.mark.parametrize("rule", [BestWorst(**TEMPERED), AllPairs(ties="half", **TEMPERED), Listwise(**TEMPERED)])
def test_a_reward_temperature_that_nothing_reads_is_refused(rule):
    needs = DataNeeds(takes_groups=True, takes_labels=True)
    with pytest.raises(UserError, match=r"data.pairing.reward_temperature=2.0 has no effect: .* DPO, as configured"):
        check_pairing(rule, needs, "DPO", sampled=True)
    check_pairing(rule, replace(needs, reads_win_probabilities=True), "SPPO", sampled=True)


def test_a_reward_temperature_that_something_reads_is_taken():
    check_pairing(BestWorst(labels="soft", **TEMPERED), DataNeeds(takes_labels=True), "DPO", sampled=True)


RULES = st.one_of(
    st.builds(
        lambda kind, **options: kind(**options),
        st.sampled_from([BestWorst, BestRandom, AllPairs]),
        min_margin=st.sampled_from([0.0, 0.5]),
        ties=st.sampled_from(["drop", "half"]),
        labels=st.sampled_from(["hard", "soft"]),
        duplicates=st.sampled_from(["exact", "normalised"]),
        max_length=st.sampled_from([None, 2]),
        threshold=st.sampled_from([None, 0.0]),
    ),
    st.builds(Listwise, min_margin=st.sampled_from([0.0, 0.5])),
)
RESPONSE = st.tuples(
    st.lists(st.integers(1, 3), max_size=3).map(lambda ids: [*ids, 0]),
    st.one_of(st.sampled_from(["", " ", "a", "A", "ﬁ", "fi", "😀", "שלום", "\x00", "\ud800"]), st.text(max_size=3)),
    st.sampled_from([-1.0, 0.0, 0.25, 1.0]),
)


@given(RULES, st.lists(st.lists(RESPONSE, min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_rule_takes_or_counts_each_prompt_and_pairs_no_equals(rule, drawn):
    groups = [
        group([r for _, _, r in each], [ids for ids, _, _ in each], texts=[text for _, text, _ in each])
        for each in drawn
    ]
    groups = [Example([1], g.response_ids, str(n), rewards=g.rewards, texts=g.texts) for n, g in enumerate(groups)]
    made = rule(groups)
    assert len({pair.source for pair in made.examples}) + made.counts.total() == len(groups)
    for pair in made.examples:
        assert pair.texts
        assert pair.rewards
        assert all(text.strip() for text in pair.texts)
        assert len({tuple(ids) for ids in pair.response_ids}) == len(set(pair.texts)) == len(pair.texts)
        assert pair.rewards == sorted(pair.rewards, reverse=True)
        margin = pair.rewards[0] - pair.rewards[-1]
        assert margin > rule.min_margin or (margin == 0 and getattr(rule, "ties", "") == "half")
        assert (pair.labels is not None) == rule.gives_labels
        if pair.labels is not None:
            assert 0.5 <= pair.labels <= 1
            assert (pair.labels == 0.5) == (margin == 0)
    assert rule(groups) == made
