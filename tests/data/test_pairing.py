"""What is trained on, and what is left out for which reason."""

import math

import pytest

from lit_align.data.collate import Example
from lit_align.data.pairing import BestWorst, Listwise, take, with_labels, with_mismatched
from lit_align.errors import UserError


def group(rewards: list[float], responses: list[list[int]] | None = None) -> Example:
    responses = responses or [[i + 1, 0] for i in range(len(rewards))]
    return Example([1], responses, "", rewards=rewards, sampler_logps=[-float(i) for i in range(len(rewards))])


def test_the_best_is_chosen_and_the_worst_rejected_with_all_that_belongs_to_them():
    (pair,) = BestWorst()([group([0.5, 2.0, -1.0, 1.0])]).examples
    assert pair.response_ids == [[2, 0], [3, 0]]
    assert (pair.rewards, pair.sampler_logps) == ([2.0, -1.0], [-1.0, -2.0])


def test_every_prompt_becomes_a_pair_or_a_count():
    groups = [
        group([1.0, 1.0, 1.0]),
        group([1.0, 1.05]),
        group([1.0, 3.0], [[7, 0], [7, 0]]),
        group([1.0, 3.0], [[0], [7, 0]]),
        group([1.0, 3.0]),
    ]
    pairs = BestWorst(min_margin=0.1)(groups)
    assert pairs.counts == {"tied": 1, "margin too small": 1, "all responses equal or empty": 2}
    assert len(pairs.examples) + pairs.counts.total() == len(groups)


def test_of_equal_responses_the_first_counts_even_if_a_scorer_is_fickle():
    (pair,) = BestWorst()([group([5.0, 9.0, 1.0], [[7, 0], [7, 0], [8, 0]])]).examples
    assert pair.rewards == [5.0, 1.0]


def test_among_equal_rewards_the_earlier_response_stands_first():
    (pair,) = BestWorst()([group([1.0, 2.0, 2.0, 1.0])]).examples
    assert pair.response_ids == [[2, 0], [4, 0]]


def test_a_negative_margin_is_refused():
    with pytest.raises(UserError, match="min_margin=-1 must be ≥ 0"):
        BestWorst(-1)


def test_taking_branches_keeps_what_is_not_there_absent():
    assert take(Example([1], [[1], [2]], ""), [1]).rewards is None


def test_groups_come_whole_and_best_first_or_not_at_all():
    groups = [group([0.5, 2.0, -1.0]), group([1.0, 1.0, 1.0]), group([1.0, 3.0, 2.0], [[7, 0], [7, 0], [8, 0]])]
    pairs = Listwise()(groups)
    assert [example.rewards for example in pairs.examples] == [[2.0, 0.5, -1.0]]
    assert pairs.counts == {"tied": 1, "with an equal or empty response": 1}


def test_win_probabilities_are_against_all_responses_of_the_prompt_itself_included():
    rewards = [0.5, 2.0, -1.0]
    expected = [sum(1 / (1 + math.exp(-(r - other) / 2.0)) for other in rewards) / 3 for r in rewards]
    (pair,) = BestWorst(reward_temperature=2.0)([group(rewards)]).examples
    assert pair.win_probabilities == pytest.approx([expected[1], expected[2]])


def test_each_example_gets_a_response_to_another_prompt_as_its_last_branch():
    examples = [Example([p], [[p, 1], [p, 2]], "") for p in (1, 1, 2, 3, 1)]
    made = with_mismatched(examples)
    assert [example.response_ids[-1][0] for example in made] == [2, 2, 3, 1, 2]
    assert all(
        example.mismatched and example.response_ids[:2] == e.response_ids
        for example, e in zip(made, examples, strict=True)
    )
    with pytest.raises(UserError, match="all rows have the same"):
        with_mismatched(examples[:2])


def test_labels_are_given_to_pairs_and_left_to_those_that_have_some():
    pair, single = Example([1], [[1], [2]], ""), Example([1], [[1]], "", labels=[0.0])
    assert [example.labels for example in with_labels([pair, single])] == [[1.0, 0.0], [0.0]]
    with pytest.raises(UserError, match="take BestWorst"):
        with_labels([Example([1], [[1], [2], [3]], "")])
