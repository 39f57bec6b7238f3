"""A refusal says what to do, and what it says works."""

from typing import Any

import pytest
from reading import BIRD, CROW, STONE, assistant, first, read, refusal, user

THOUGHT = {"question": "1+1?", "solution": "2", "thinking_trajectories": ["One and one."]}
PAIR = {"prompt": "Bird?", "chosen": "Crow", "rejected": "Stone"}
MULTI = {"conversation_a": BIRD + CROW + BIRD + CROW, "conversation_b": BIRD + STONE + BIRD + CROW, "winner": "model_a"}


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (
            THOUGHT,
            "texts",
            r"completion: '<think>\n{thinking_trajectories.0}\n</think>\n\n{solution}'}, or leave it out",
        ),
        (
            {"segments": [{"label": True, "text": "a"}]},
            "preferences",
            "`segments` are the parts of a text to imitate, and no preferences can be made of them. Imitate them (SFT)",
        ),
        ({"message_tree_id": "t", "text": "a"}, "texts", "`message_tree_id` shows that the rows are messages"),
        (
            {"Prompt": "Q", "chosen ": "a", "rejected": "b"},
            "preferences",
            "columns={prompt: 'Prompt', chosen: 'chosen '}",
        ),
        (PAIR | {"images": ["a.png"], "audio": "a.wav"}, "preferences", "`images`, `audio` hold"),
        (PAIR | {"images": ["a.png"], "audio": "a.wav"}, "preferences", "ignore_columns=[images, audio]"),
        (
            PAIR | {"earlier": [user("Why?")]},
            "preferences",
            "If it holds earlier turns, read them with columns={history: earlier}",
        ),
        (PAIR | {"documents": ["A crow."]}, "preferences", "columns={documents: documents}"),
        (PAIR | {"passages": ["A crow."]}, "preferences", r"columns={prompt: '{passages.0}\n{prompt}'}"),
        (PAIR | {"facts": {"one": "Crows fly."}}, "preferences", r"columns={prompt: '{facts.one}\n{prompt}'}"),
        (MULTI, "preferences", "columns={response_1: conversation_a.1.content, …}"),
    ],
)
def test_a_refusal_says_what_to_do(row: dict[str, Any], kind: Any, words: str):
    assert words in refusal(row, kind=kind)


def test_the_first_answers_of_chats_are_compared_as_the_message_says():
    first_turns = {"prompt": "conversation_a.0.content", "winner": "winner"}
    answers = {"response_1": "conversation_a.1.content", "response_2": "conversation_b.1.content"}
    rows = read(MULTI, columns=first_turns | answers)
    assert (rows[0].prompt, rows[0].responses) == ("Bird?", ("Crow", "Stone"))
    assert rows.unread == ("conversation_a[…]", "conversation_b[…]")


def test_parts_of_a_turn_cannot_be_left_out():
    part = {"begin_offset": 0, "end_offset": 3, "train": False}
    assert "trained on as a whole" in refusal(
        {"messages": [*BIRD, assistant("Crow", train_detail=[part])]}, kind="texts"
    )
    whole = assistant("Crow", train_detail=[part | {"train": True}])
    assert first({"messages": [*BIRD, whole]}, kind="texts").responses == ("Crow",)


def test_thoughts_are_put_before_the_answer_as_the_message_says():
    columns = {"prompt": "question", "completion": r"<think>\n{thinking_trajectories.0}\n</think>\n\n{solution}"}
    assert first(THOUGHT, kind="texts", columns=columns).responses == ("<think>\nOne and one.\n</think>\n\n2",)
    assert first(THOUGHT, kind="texts", ignore_columns=["thinking_trajectories"]).responses == ("2",)


def test_a_first_row_without_the_prompt_of_the_others_is_refused():
    assert "rows.jsonl:1: `prompt` is null, but rows.jsonl:2 has one" in refusal(PAIR | {"prompt": None}, PAIR)
