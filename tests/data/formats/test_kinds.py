"""The kinds of rows (prompts, texts, labelled responses), and the rows that are skipped and counted."""

from collections import Counter
from typing import Any

import pytest
from reading import BIRD, chat, first, message_of, read

from lit_align.data.formats import Row


def test_labels_go_with_chats_and_instructions():
    chat = {"conversations": [{"from": "human", "value": "Bird?"}, {"from": "gpt", "value": "Crow"}], "kto_tag": False}
    assert first(chat, kind="labelled") == Row(BIRD, ("Crow",), labels=(False,), source="rows.jsonl:1")
    flat = {"instruction": "Bird?", "input": "", "output": "Crow", "label": "True"}
    assert first(flat, kind="labelled") == Row("Bird?", ("Crow",), labels=(True,), source="rows.jsonl:1")


@pytest.mark.parametrize(
    ("label", "expected"), [("yes", True), ("bad", False), ("desirable", True), ("Undesirable", False), ("0.0", False)]
)
def test_labels_may_be_words(label, expected):
    found = first({"prompt": "Bird?", "completion": "Crow", "label": label}, kind="labelled")
    assert found.labels == (expected,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": chat("Q", "a"), "rejected": chat("Q", "a")}, "equal or empty responses"),
        ({"chosen": "same words", "rejected": "same words"}, "equal or empty responses"),
        ({"chosen": chat("Q", " "), "rejected": chat("Q", "a")}, "equal or empty responses"),
        ({"chosen": chat("Q", "a"), "rejected": chat("Q", "")}, "equal or empty responses"),
        ({"chosen": chat("Q", ""), "rejected": [chat("Q", "b"), chat("Q", "c")]}, "equal or empty responses"),
        ({"chosen": chat("Q", "x", "Q", "a"), "rejected": chat("Q", "y", "Q", "b")}, "differ before"),
        ({"chosen": chat("Q", "a"), "rejected": chat("Q", "b", "c")}, "not the assistant's"),
        ({"chosen": chat("Q", "a")[1:], "rejected": chat("Q", "b")[1:]}, "without a prompt"),
        ({"chosen": "nothing", "rejected": "in common"}, "without a shared prompt"),
    ],
)
def test_rows_that_make_no_pair_are_skipped_and_counted(row: dict[str, Any], reason: str):
    good = {"chosen": chat("Q", "a"), "rejected": chat("Q", "b")}
    rows = read(good, row)
    assert [row.source for row in rows] == ["rows.jsonl:1"]
    ((counted, times),) = rows.skipped.items()
    assert reason in counted
    assert times == 1


def test_a_data_set_of_which_nothing_is_left_is_an_error_with_the_counts():
    same = {"prompt": "Q", "chosen": "a", "rejected": "a"}
    message = message_of(lambda: read(same, same))
    assert "2 rows with equal or empty responses" in message
    assert "rows.jsonl" in message


def test_prompts_are_taken_from_every_format():
    rows: list[dict[str, Any]] = [
        {"prompt": chat("Q")},
        {"messages": chat("Q")},
        {"messages": chat("Q", "answer")},
        {"prompt": "Q", "messages": chat("Q", "answer")},
        {"prompt": "Q", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")},
        {"prompt": chat("Q"), "completion": "a", "label": True},
        {"prompt": chat("Q"), "responses": ["a", "b"], "rewards": [1, 1]},
    ]
    assert [read(row, kind="prompts")[0] for row in rows] == [Row(chat("Q"), source="rows.jsonl:1")] * len(rows)


def test_repeated_prompts_of_pairs_are_taken_once_but_lists_kept():
    pairs = [{"prompt": "Q", "chosen": "a", "rejected": rejected} for rejected in ("a", "b", "c")]
    rows = read(*pairs, kind="prompts")
    assert len(rows) == 1
    assert rows.skipped == Counter({"repeated prompts": 2})
    assert len(read({"prompt": "Q"}, {"prompt": "Q"}, kind="prompts")) == 2


def test_labels_come_from_a_column_or_from_the_place_in_a_pair():
    kto = read(
        {"prompt": "Q", "completion": "a", "label": True}, {"prompt": "Q", "response": "b", "label": 0}, kind="labelled"
    )
    assert [(row.responses, row.labels) for row in kto] == [(("a",), (True,)), (("b",), (False,))]
    pairs = read({"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]}, kind="labelled")
    assert pairs[0].labels == (True, False, False)


def test_texts_come_from_completions_chats_and_chosen_responses():
    def first(row: dict[str, Any]) -> Row:
        return read(row, kind="texts")[0]

    assert first({"text": "all of it"}) == Row("", ("all of it",), source="rows.jsonl:1")
    assert first({"prompt": "Q", "completion": " a"}) == Row("Q", (" a",), source="rows.jsonl:1")
    assert first({"messages": chat("Q", "a")}) == Row(chat("Q"), ("a",), source="rows.jsonl:1")
    assert first({"prompt": "Q", "chosen": " a", "rejected": " b"}) == Row("Q", (" a",), source="rows.jsonl:1")
