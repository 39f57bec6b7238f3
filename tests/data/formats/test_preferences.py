"""Preferences in each of their forms: text, chats, transcripts, ranked lists, comparisons."""

from collections import Counter
from typing import Any

import pytest
from reading import COMPARISON, chat, message_of, read

from lit_align.data.formats import Row


def test_explicit_pairs_of_text_are_read_unchanged():
    rows = read({"prompt": "Q", "chosen": " good", "rejected": " bad"})
    assert rows[0] == Row("Q", (" good", " bad"), source="rows.jsonl:1")
    assert rows.description == (
        "preference pairs with an explicit prompt, plain text (columns prompt, chosen, rejected)"
    )


def test_responses_that_all_repeat_their_prompt_are_read_without_it():
    rows = [{"prompt": f"{i}:", "chosen": f"{i}: good", "rejected": f"{i}: bad"} for i in range(3)]
    found = read(*rows)
    assert [(row.prompt, row.responses) for row in found] == [(f"{i}:", (" good", " bad")) for i in range(3)]
    assert found.skipped == {"rows whose responses repeat their prompt, which is read once": 3}
    texts = read(*({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows), kind="texts")
    assert [row.responses for row in texts] == [(" good",)] * 3
    by_chance = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"}
    assert read(by_chance, {"prompt": "Bye", "chosen": "See you", "rejected": "No"})[0].responses == ("Hi there", "Hi!")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": chat("Q"), "chosen": "good", "rejected": "bad"},
        {"prompt": chat("Q"), "chosen": chat("Q", "good")[1:], "rejected": chat("Q", "bad")[1:]},
        {"prompt": chat("Q"), "chosen": chat("Q", "good"), "rejected": chat("Q", "bad")},
        {"prompt": "Q", "chosen": chat("Q", "good")[1:], "rejected": chat("Q", "bad")[1:]},
        {"prompt": "Q", "chosen": chat("Q", "good"), "rejected": chat("Q", "bad")},
        {"chosen": chat("Q", "good"), "rejected": chat("Q", "bad")},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    ],
    ids=["text after", "messages after", "included", "text before", "ultrafeedback", "implicit", "transcript"],
)
def test_every_layout_of_a_chat_gives_the_same_row(row: dict[str, Any]):
    assert read(row)[0] == Row(chat("Q"), ("good", "bad"), source="rows.jsonl:1")


def test_a_system_message_and_earlier_turns_belong_to_the_prompt():
    chosen, rejected = (chat("a", "b", "c", last, system="S") for last in ("good", "bad"))
    expected = chat("a", "b", "c", system="S")
    assert read({"chosen": chosen, "rejected": rejected})[0].prompt == expected
    assert read({"prompt": "a", "chosen": chosen, "rejected": rejected})[0].prompt == expected


def test_ultrafeedback_scores_become_rewards():
    row = {"prompt": "Q", "prompt_id": "1", "chosen": chat("Q", "good"), "rejected": chat("Q", "bad")}
    scored = row | {"messages": chat("Q", "good"), "score_chosen": 8.5, "score_rejected": 3}
    assert read(scored)[0].rewards == (8.5, 3.0)
    assert read(row | {"score_chosen": None, "score_rejected": None})[0].rewards is None


def test_a_pair_that_its_scores_contradict_is_skipped_and_counted():
    tied = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1}
    rows = read(tied | {"score_chosen": 0}, tied | {"score_chosen": 2}, tied)
    assert [row.source for row in rows] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert rows.skipped == Counter({"rows whose chosen response has not the highest reward": 1})


def test_a_score_of_one_side_alone_is_refused():
    scored = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    message = message_of(lambda: read(scored, scored | {"score_rejected": None}))
    assert "rows.jsonl:2: `score_chosen` holds 2, but the other side" in message
    assert "`score_rejected` holds 1, but" in message_of(lambda: read(scored, scored | {"score_chosen": None}))


def test_hh_transcripts_become_messages():
    opening = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Two\n\nlines?\n\nAssistant:"
    rows = read({"chosen": opening + " Yes.\n\nSure.", "rejected": opening + " No."})
    assert rows[0] == Row(chat("Hi there", "Hello.", "Two\n\nlines?"), ("Yes.\n\nSure.", "No."), source="rows.jsonl:1")
    assert "Human/Assistant transcripts" in rows.description
    assert "chat messages" in rows.description


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        ("The film is good", "The film is gone far", "The film is", (" good", " gone far")),  # not "The film is go"
        ("The film is good", "The film is good fun", "The film is", (" good", " good fun")),  # neither is empty
        ("Q: why?\nA: yes", "Q: why?\nA: no", "Q: why?\nA:", (" yes", " no")),
        ("One\nyes", "One\nno", "One\n", ("yes", "no")),
        ("A rose\nis", "A rose is", "A rose", ("\nis", " is")),
    ],
)
def test_an_implicit_text_prompt_ends_where_a_word_ends(
    chosen: str, rejected: str, prompt: str, responses: tuple[str, str]
):
    row = read({"chosen": chosen, "rejected": rejected})[0]
    assert (row.prompt, row.responses) == (prompt, responses)


def test_several_rejected_responses_stay_with_their_prompt():
    rows = read(
        {"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]},
        {"prompt": "Q", "chosen": "a", "rejected": ["b", "a", "b", " "]},
        {"prompt": "Q", "chosen": "a", "rejected": "d"},
    )
    assert [row.responses for row in rows] == [("a", "b", "c"), ("a", "b"), ("a", "d")]
    assert rows.skipped == Counter({"repeated or empty responses": 3})
    assert rows.format == "preferences with several rejected responses"
    messages = read({"prompt": chat("Q"), "chosen": chat("Q", "a"), "rejected": [chat("Q", "b"), chat("Q", "c")]})
    assert messages[0].responses == ("a", "b", "c")


def test_ranked_lists_come_out_best_first_with_their_rewards():
    rows = read({"prompt": "Q", "responses": ["low", "high", "mid"], "rewards": [0, 2.5, 1]})
    assert rows[0] == Row("Q", ("high", "mid", "low"), rewards=(2.5, 1.0, 0.0), source="rows.jsonl:1")
    named = read({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 2]})
    assert named[0].responses == ("b", "a")
    assert "completions, scores" in named.description


def test_ranks_order_a_list_that_has_no_rewards():
    rows = read({"prompt": "Q", "responses": ["third", "first", "second"], "ranks": [3, 1, 2], "rewards": None})
    assert rows[0].responses == ("first", "second", "third")
    assert rows[0].rewards == (-1.0, -2.0, -3.0)
    assert rows.format == "ranked responses, rank 1 the best"
    assert "2 responses, but 1 number in ranks" in message_of(
        lambda: read({"prompt": "Q", "responses": ["a", "b"], "ranks": [1]})
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("reward_chosen", "reward_rejected"),
    ],
)
def test_a_pairs_rewards_are_found_under_each_of_their_names(better: str, worse: str):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", better: 4.5, worse: 2}
    assert read(row)[0].rewards == (4.5, 2.0)
    several = row | {"rejected": ["b", "c"], worse: [2, 1]}
    assert read(several)[0].rewards == (4.5, 2.0, 1.0)


def test_repeated_responses_of_a_ranked_list_take_their_rewards_with_them():
    rows = read({"prompt": "Q", "responses": ["a", "a", "b"], "rewards": [3, 2, 1]})
    assert rows[0].responses == ("a", "b")
    assert rows[0].rewards == (3.0, 1.0)


POST = "SUBREDDIT: r/jobs\n\nTITLE: Work\n\nPOST: I quit.\n\nTL;DR:"


def test_tldr_comparisons_put_the_chosen_summary_first():
    rows = read(COMPARISON, COMPARISON | {"choice": 0})
    assert rows[0] == Row(POST, (" Left.", " Stayed."), source="rows.jsonl:1")
    assert rows[1].responses == (" Stayed.", " Left.")
    assert rows.format == "TL;DR comparisons"


def test_tldr_posts_are_prompts_and_with_a_summary_texts():
    flat = {"subreddit": "jobs", "title": "Work", "post": "I quit.", "summary": "Left."}
    assert read(flat, kind="texts")[0] == Row(POST, (" Left.",), source="rows.jsonl:1")
    assert read({"info": COMPARISON["info"]}, kind="prompts")[0] == Row(POST, source="rows.jsonl:1")
