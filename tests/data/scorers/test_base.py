"""Checks of what scorers return, whatever they are."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import CODE, Given, lengths, message_of

from lit_align.data.scorers.base import ScorerError, Scores, score
from lit_align.data.scorers.function import FunctionScorer
from lit_align.errors import UserError


def test_scores_keep_the_order_of_the_responses():
    scorer = Given(lengths)
    responses = ["aa", "a", "aaaaa", "", "aaaa"]
    assert score(scorer, [""] * 5, responses) == [2.0, 1.0, 5.0, 0.0, 4.0]
    assert scorer.seen == [["aaaaa", "aaaa"], ["aa", "a"], [""]]


def test_without_responses_the_scorer_is_not_called():
    scorer = Given(lengths)
    assert score(scorer, [], []) == []
    assert scorer.seen == []


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        np.array([1, 0.5], np.float32),
        [np.float32(1), np.float64(0.5)],
        torch.tensor([1, 0.5]),
    ],
)
def test_lists_arrays_and_tensors_of_numbers_are_scores(returned: object):
    scores = score(Given(returned), ["p", "p"], ["r", "r"])
    assert scores == [1.0, 0.5]
    assert all(type(value) is float for value in scores)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], ["1 score for 2 responses"]),
        ([1.0, 2.0, 3.0], ["3 scores for 2 responses"]),
        (None, ["NoneType"]),
        (0.5, ["float"]),
        ("ab", ["str"]),
        ({"a": 1, "b": 2}, ["dict"]),
        (torch.ones(2, 1), ["[1.0]", "not a number", '"first"']),
        ([1.0, "0.5"], ['"0.5"', "not a number", '"other"']),
        ([1.0, None], ["null", "not a number", '"other"']),
        ([1.0, math.nan], ["nan", "finite", '"other"', '"Q"']),
        ([-math.inf, math.nan], ["-inf", "finite", '"first"']),
        ([10**400, 1], ["1000", "finite", '"first"']),
        ([1, 10**5000], ["too large to show", "finite", '"other"']),
        (np.array([1, np.nan]), ["nan", '"other"']),
        (Scores([1, 2], {"grace": [1, 2], "wit": [3]}), ["1 value for 2 responses as parts['wit']"]),
        (Scores([1, 2], {"wit": [3, math.nan]}), ["nan as parts['wit']", "finite", '"other"']),
        (Scores([1, 2], {"wit": ["high", 3]}), ["\"high\" as parts['wit']", "not a number", '"first"']),  # type: ignore[list-item]
    ],
)
def test_a_value_that_is_not_a_score_is_refused_with_its_response(returned: object, words: list[str]):
    message = message_of(ScorerError, score, Given(returned), ["Q", "Q"], ["first", "other"])
    for word in ["scorer given@1", "Return", *words]:
        assert word in message, message


def test_scores_may_have_no_parts():
    scores = Scores([1.0])
    scores.parts = None  # type: ignore[assignment]
    assert score(Given(scores), ["Q"], ["A"]) == [1.0]


def test_every_batch_needs_the_same_parts():
    def sometimes(prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        return Scores(lengths(prompts, responses), {"wit": [1.0] * len(responses)} if "long" in responses else {})

    message = message_of(ScorerError, score, Given(sometimes), ["Q"] * 3, ["long", "s", "mid"])
    assert "parts['wit'] for other batches, but not for the batch" in message
    assert 'with response "s". Return' in message


def test_a_scorer_that_raises_is_named_with_its_error(in_tmp: Path):
    Path("rewards.py").write_text(CODE)
    chat = [{"role": "user", "content": "Why?"}]
    with pytest.raises(ScorerError) as caught:
        score(FunctionScorer("rewards.py:lexicon"), [chat, chat], ["x" * 900, "b"])
    for word in (
        "rewards.py:lexicon@",
        "KeyError: 'lexicon' in rewards.py, line 15, on a batch of 2",
        '"Why?"',
        'xxx" … "xxx',
    ):
        assert word in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 500


def test_a_scorer_that_raises_in_a_library_is_named_by_its_own_line(in_tmp: Path):
    Path("rewards.py").write_text("import json\n\ndef f(prompts, responses):\n    return json.loads('<html>')\n")
    message = message_of(ScorerError, score, FunctionScorer("rewards.py:f"), ["p"], ["r"])
    assert "raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) in rewards.py, line 4, on" in message


def test_a_scorer_out_of_memory_names_its_batch_size():
    def full(prompts: object, responses: object) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "batch_size=2" in message_of(ScorerError, score, Given(full), ["p"], ["r"])


def test_a_user_error_passes_unchanged():
    def refuses(prompts: object, responses: object) -> list[float]:
        raise UserError("the judge's key is not set")

    assert message_of(UserError, score, Given(refuses), ["p"], ["r"]) == "the judge's key is not set"


def test_each_response_needs_a_prompt():
    with pytest.raises(ValueError, match="1 prompts for 2 responses"):
        score(Given(lengths), ["p"], ["a", "b"])


@pytest.mark.parametrize("error", [SystemExit(0), BaseException("gone"), MemoryError()])
def test_a_scorer_that_ends_the_process_is_named(error: BaseException):
    def ends(prompts: object, responses: object) -> list[float]:
        raise error

    message = message_of(ScorerError, score, Given(ends), ["p"], ["r"])
    assert f"raised {type(error).__name__}" in message
    assert "Fix the scorer" in message


class Terminated(SystemExit):
    """As a signal handler raises it."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated(143)])
def test_a_signal_during_scoring_ends_the_run(error: BaseException):
    def ends(prompts: object, responses: object) -> list[float]:
        raise error

    with pytest.raises(type(error)):
        score(Given(ends), ["p"], ["r"])
