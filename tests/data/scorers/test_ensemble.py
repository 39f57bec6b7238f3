"""Ensembles of scorers."""

import math

import pytest
from scoring import Given, lengths, message_of

from lit_align.data.scorers.base import Scores, score
from lit_align.data.scorers.ensemble import EnsembleScorer
from lit_align.errors import UserError


def test_an_ensemble_is_the_weighted_mean_with_its_spread():
    one, two = Given(lambda prompts, responses: [0.0, 6.0]), Given(lengths)
    scores = score(EnsembleScorer({"one": one, "two": two}, {"two": 2.0}), ["", ""], ["aaa", "b"])
    assert scores == pytest.approx([2.0, 8 / 3])
    assert scores.parts["one"] == [0.0, 6.0]
    assert scores.parts["two"] == [3.0, 1.0]
    # √(Σ w (r − mean)²): (1·4 + 2·1)/3 = 2, and (1·(10/3)² + 2·(5/3)²)/3 = 50/9
    assert scores.parts["disagreement"] == pytest.approx([math.sqrt(2), math.sqrt(50 / 9)])


def test_a_tie_of_whole_grades_stays_a_tie():
    members = {name: Given(lambda prompts, responses, grades=grades: grades) for name, grades in TIED.items()}
    assert score(EnsembleScorer(members), [""] * 2, ["a", "b"]) == [2.0, 2.0]


TIED = {"one": [1.0, 3.0], "two": [2.0, 2.0], "three": [3.0, 1.0]}


def test_the_parts_of_a_members_rewards_are_kept():
    judge = Given(lambda prompts, responses: Scores([2.0] * len(responses), {"tone": [3.0] * len(responses)}))
    scores = score(EnsembleScorer({"judge": judge, "other": Given(lengths)}), ["", ""], ["aaa", "b"])
    assert scores.parts["judge_tone"] == [3.0, 3.0]
    assert scores.parts.keys() == {"judge_tone", "judge", "other", "disagreement"}


def test_an_ensembles_identity_names_members_and_weights():
    members = {"a": Given([0.0]), "b": Given([0.0])}
    assert EnsembleScorer(members, {"b": 0.5}).identity == "ensemble of 1 given@1, 0.5 given@1"


@pytest.mark.parametrize(
    ("scorers", "weights", "words"),
    [
        (["a"], {}, "scorer.scorers must have at least 2 members, but has 1"),
        (["a", "b"], {"c": 1.0}, "scorer.weights.c=1.0 has no effect: the members are a, b"),
        (["a", "b"], {"a": 0.0}, "scorer.weights.a=0.0 must be above 0"),
        (["a", "b"], {"a": math.inf}, "scorer.weights.a=inf must be above 0 and finite"),
        (["a", "disagreement"], {}, "this name is reserved"),
    ],
)
def test_an_impossible_ensemble_is_refused(scorers, weights, words):
    assert words in message_of(UserError, EnsembleScorer, {name: Given([0.0]) for name in scorers}, weights)
