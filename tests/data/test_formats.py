"""Rows of every layout are detected, read, counted, and refused with a clear message."""

import json
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import DataError, Kind, Row, Rows
from lit_align.errors import UserError

Read = Callable[..., Rows]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write rows to rows.jsonl and read them back."""

    def write_and_read(*rows: dict[str, Any], kind: Kind = "preferences") -> Rows:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(file, kind=kind)

    return write_and_read


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, "one paragraph"
    return text


# --- preferences ---


def test_explicit_pairs_of_text_are_read_unchanged(read: Read):
    rows = read({"prompt": "Q", "chosen": " good", "rejected": " bad"})
    assert rows[0] == Row("Q", (" good", " bad"), source="rows.jsonl:1")
    assert rows.description == (
        "preference pairs with an explicit prompt, plain text (columns prompt, chosen, rejected)"
    )


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
def test_every_layout_of_a_chat_gives_the_same_row(read: Read, row: dict[str, Any]):
    assert read(row)[0] == Row(chat("Q"), ("good", "bad"), source="rows.jsonl:1")


def test_a_system_message_and_earlier_turns_belong_to_the_prompt(read: Read):
    chosen, rejected = (chat("a", "b", "c", last, system="S") for last in ("good", "bad"))
    expected = chat("a", "b", "c", system="S")
    assert read({"chosen": chosen, "rejected": rejected})[0].prompt == expected
    assert read({"prompt": "a", "chosen": chosen, "rejected": rejected})[0].prompt == expected


def test_ultrafeedback_scores_become_rewards(read: Read):
    row = {"prompt": "Q", "prompt_id": "1", "chosen": chat("Q", "good"), "rejected": chat("Q", "bad")}
    scored = row | {"messages": chat("Q", "good"), "score_chosen": 8.5, "score_rejected": 3}
    assert read(scored)[0].rewards == (8.5, 3.0)
    assert read(row | {"score_chosen": None, "score_rejected": None})[0].rewards is None


def test_a_pair_that_its_scores_contradict_is_skipped_and_counted(read: Read):
    tied = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1}
    rows = read(tied | {"score_chosen": 0}, tied | {"score_chosen": 2}, tied)
    assert [row.source for row in rows] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert rows.skipped == Counter({"rows whose chosen response has not the highest reward": 1})


def test_a_score_of_one_side_alone_is_refused(read: Read):
    scored = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    message = message_of(lambda: read(scored, scored | {"score_rejected": None}))
    assert "rows.jsonl:2: `score_chosen` holds 2, but the other side" in message
    assert "`score_rejected` holds 1, but" in message_of(lambda: read(scored, scored | {"score_chosen": None}))


def test_hh_transcripts_become_messages(read: Read):
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
    read: Read, chosen: str, rejected: str, prompt: str, responses: tuple[str, str]
):
    row = read({"chosen": chosen, "rejected": rejected})[0]
    assert (row.prompt, row.responses) == (prompt, responses)


def test_several_rejected_responses_stay_with_their_prompt(read: Read):
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


def test_ranked_lists_come_out_best_first_with_their_rewards(read: Read):
    rows = read({"prompt": "Q", "responses": ["low", "high", "mid"], "rewards": [0, 2.5, 1]})
    assert rows[0] == Row("Q", ("high", "mid", "low"), rewards=(2.5, 1.0, 0.0), source="rows.jsonl:1")
    named = read({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 2]})
    assert named[0].responses == ("b", "a")
    assert "completions, scores" in named.description


def test_ranks_order_a_list_that_has_no_rewards(read: Read):
    rows = read({"prompt": "Q", "responses": ["third", "first", "second"], "ranks": [3, 1, 2], "rewards": None})
    assert rows[0].responses == ("first", "second", "third")
    assert rows[0].rewards == (-1.0, -2.0, -3.0)
    assert rows.format == "ranked responses, rank 1 the best"
    assert "2 responses, but 1 numbers in ranks" in message_of(
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
def test_a_pairs_rewards_are_found_under_each_of_their_names(read: Read, better: str, worse: str):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", better: 4.5, worse: 2}
    assert read(row)[0].rewards == (4.5, 2.0)
    several = row | {"rejected": ["b", "c"], worse: [2, 1]}
    assert read(several)[0].rewards == (4.5, 2.0, 1.0)


def test_repeated_responses_of_a_ranked_list_take_their_rewards_with_them(read: Read):
    rows = read({"prompt": "Q", "responses": ["a", "a", "b"], "rewards": [3, 2, 1]})
    assert rows[0].responses == ("a", "b")
    assert rows[0].rewards == (3.0, 1.0)


COMPARISON = {
    "info": {"id": "t3", "post": " I quit. \n", "title": "Work", "subreddit": "jobs", "site": None, "article": None},
    "summaries": [{"text": " Stayed.", "policy": "sup4"}, {"text": "Left.", "policy": "ref"}],
    "choice": 1,
    "worker": "w",
}
POST = "SUBREDDIT: r/jobs\n\nTITLE: Work\n\nPOST: I quit.\n\nTL;DR:"


def test_tldr_comparisons_put_the_chosen_summary_first(read: Read):
    rows = read(COMPARISON, COMPARISON | {"choice": 0})
    assert rows[0] == Row(POST, (" Left.", " Stayed."), source="rows.jsonl:1")
    assert rows[1].responses == (" Stayed.", " Left.")
    assert rows.format == "TL;DR comparisons"


def test_tldr_posts_are_prompts_and_with_a_summary_texts(read: Read):
    flat = {"subreddit": "jobs", "title": "Work", "post": "I quit.", "summary": "Left."}
    assert read(flat, kind="texts")[0] == Row(POST, (" Left.",), source="rows.jsonl:1")
    assert read({"info": COMPARISON["info"]}, kind="prompts")[0] == Row(POST, source="rows.jsonl:1")


# --- columns beside the prompt ---


@pytest.mark.parametrize("name", ["question", "query", "instruction", "input", "context", "problem"])
@pytest.mark.parametrize("kind", ["preferences", "prompts", "texts", "labelled"])
def test_a_question_beside_the_responses_is_the_prompt(read: Read, name: str, kind: Kind):
    row = {"chosen": "The capital is Rome", "rejected": "The capital is Paris"}
    assert read(row | {name: "Which city?"}, kind=kind)[0].prompt == "Which city?"
    last_turns = {"chosen": chat("", "Rome")[1:], "rejected": chat("", "Paris")[1:], name: "Which city?"}
    assert read(last_turns, kind=kind)[0].prompt == chat("Which city?")
    listed = {"chosen": "Rome", "rejected": "Paris", name: chat("Which city?")}
    assert read(listed, kind=kind)[0].prompt == chat("Which city?")


@pytest.mark.parametrize("name", ["question", "query", "instruction", "input", "context", "problem"])
def test_shared_words_are_not_the_prompt_of_a_row_that_has_a_question(read: Read, name: str):
    row = {"chosen": "The capital is Rome", "rejected": "The capital is Paris"}
    message = message_of(lambda: read(row, row | {name: "Which city?"}))
    assert (
        f'rows.jsonl:2: `{name}` holds "Which city?", which may belong to the prompt, but nothing reads it' in message
    )
    assert f"ignore_columns=[{name}]" in message


def test_a_column_that_repeats_the_shared_words_is_harmless(read: Read):
    text = {"question": "Which city?", "input": "", "chosen": "Which city? Rome", "rejected": "Which city? Paris"}
    assert read(text)[0].prompt == "Which city?"
    messages = {"question": "Q ", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")}
    assert read(messages)[0].prompt == chat("Q")
    transcript = {"question": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
    assert read(transcript)[0].prompt == chat("Q")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": chat("Q"), "chosen": "a", "rejected": "b"}, "preferences"),
        ({"prompt": "Q", "chosen": chat("Q", "a"), "rejected": chat("Q", "b")}, "preferences"),
        ({"chosen": chat("Q", "a"), "rejected": chat("Q", "b")}, "preferences"),
        ({"messages": chat("Q", "a")}, "texts"),
        ({"prompt": chat("Q")}, "prompts"),
    ],
)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_opens_the_chat_and_is_counted(read: Read, row: dict[str, Any], kind: Kind, name: str):
    rows = read(row | {name: "S"}, row | {name: None}, row | {name: " "}, kind=kind)
    assert rows[0].prompt == chat("Q", system="S")
    assert [each.prompt for each in rows][1:] in ([chat("Q")] * 2, [chat("Q")])
    assert rows.skipped[f"chats that now open with their `{name}`"] == 1


def test_a_system_column_that_has_no_place_is_refused(read: Read):
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    message = message_of(lambda: read(pair, pair | {"system": "S"}))
    assert 'rows.jsonl:2: `system` holds "S", but the prompt is plain text' in message
    assert read(pair | {"prompt": "S\n\nQ", "system": "S"})[0].prompt == "S\n\nQ"
    opened = {"prompt": chat("Q", system="S"), "chosen": "a", "rejected": "b"}
    assert read(opened | {"system": "S "})[0].prompt == chat("Q", system="S")
    message = message_of(lambda: read(opened | {"system": "T"}))
    assert '`system` holds "T", but the chat opens with the system message "S". Keep one of them.' in message


def test_texts_are_whole_regardless_of_other_columns(read: Read):
    assert read({"text": "all of it", "system": "S", "tools": ["t"]}, kind="texts")[0].responses == ("all of it",)


def test_tools_and_tool_calls_are_kept(read: Read):
    pair = {"prompt": chat("Q"), "chosen": "a", "rejected": "b", "tools": []}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "t"}}]}
    turns = [*chat("Q"), call, {"role": "tool", "content": "sunny"}]
    rows = read(
        pair,
        pair | {"tools": [{"name": "t"}]},
        pair | {"tools": '[{"name": "t"}]'},
        pair | {"prompt": turns},
        pair | {"prompt": [{"role": "user", "content": "Q", "tool_calls": None}]},
    )
    assert [row.tools for row in rows] == [None, [{"name": "t"}], [{"name": "t"}], None, None]
    assert [row.prompt for row in rows] == [chat("Q"), chat("Q"), chat("Q"), turns, chat("Q")]
    assert not rows.skipped


# --- what is skipped, by rule, and counted ---


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
def test_rows_that_make_no_pair_are_skipped_and_counted(read: Read, row: dict[str, Any], reason: str):
    good = {"chosen": chat("Q", "a"), "rejected": chat("Q", "b")}
    rows = read(good, row)
    assert [row.source for row in rows] == ["rows.jsonl:1"]
    ((counted, times),) = rows.skipped.items()
    assert reason in counted
    assert times == 1


def test_a_data_set_of_which_nothing_is_left_is_an_error_with_the_counts(read: Read):
    same = {"prompt": "Q", "chosen": "a", "rejected": "a"}
    message = message_of(lambda: read(same, same))
    assert "2 rows with equal or empty responses" in message
    assert "rows.jsonl" in message


# --- the other kinds ---


def test_prompts_are_taken_from_every_format(read: Read):
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


def test_repeated_prompts_of_pairs_are_taken_once_but_lists_kept(read: Read):
    pairs = [{"prompt": "Q", "chosen": "a", "rejected": rejected} for rejected in ("a", "b", "c")]
    rows = read(*pairs, kind="prompts")
    assert len(rows) == 1
    assert rows.skipped == Counter({"repeated prompts": 2})
    assert len(read({"prompt": "Q"}, {"prompt": "Q"}, kind="prompts")) == 2


def test_labels_come_from_a_column_or_from_the_place_in_a_pair(read: Read):
    kto = read(
        {"prompt": "Q", "completion": "a", "label": True}, {"prompt": "Q", "response": "b", "label": 0}, kind="labelled"
    )
    assert [(row.responses, row.labels) for row in kto] == [(("a",), (True,)), (("b",), (False,))]
    pairs = read({"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]}, kind="labelled")
    assert pairs[0].labels == (True, False, False)


def test_texts_come_from_completions_chats_and_chosen_responses(read: Read):
    def first(row: dict[str, Any]) -> Row:
        return read(row, kind="texts")[0]

    assert first({"text": "all of it"}) == Row("", ("all of it",), source="rows.jsonl:1")
    assert first({"prompt": "Q", "completion": " a"}) == Row("Q", (" a",), source="rows.jsonl:1")
    assert first({"messages": chat("Q", "a")}) == Row(chat("Q"), ("a",), source="rows.jsonl:1")
    assert first({"prompt": "Q", "chosen": " a", "rejected": " b"}) == Row("Q", (" a",), source="rows.jsonl:1")


# --- sources ---

PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}


def test_all_sources_give_the_same_rows(tmp_path: Path):
    rows = [{**PAIR, "prompt": f"Q{i}", "messages": chat(f"Q{i}"), "number": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "list.json").write_text("\n " + json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text("\r\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows[::-1]).select([2, 1, 0]).save_to_disk(tmp_path / "reordered")
    DatasetDict(only=Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    sources = {
        name: [row.source for row in read_rows(tmp_path / name, kind="preferences")]
        for name in ("rows.jsonl", "list.json", "lines.json", "rows.parquet", "saved", "reordered", "splits")
    }
    assert sources.pop("rows.jsonl") == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]  # lines, blank ones too
    assert sources.pop("splits") == ["splits[only]:1", "splits[only]:2", "splits[only]:3"]
    assert sources == {name: [f"{name}:{n}" for n in (1, 2, 3)] for name in sources}
    for name in ("rows.jsonl", "splits", *sources):
        assert [row.prompt for row in read_rows(str(tmp_path / name), kind="preferences")] == ["Q0", "Q1", "Q2"]


def test_a_split_is_chosen_by_name_and_train_is_meant_without_one(tmp_path: Path):
    folder = tmp_path / "saved"
    DatasetDict(
        test=Dataset.from_list([PAIR | {"prompt": "test"}]), train=Dataset.from_list([PAIR | {"prompt": "train"}])
    ).save_to_disk(folder)
    assert read_rows(folder, kind="prompts")[0].prompt == "train"
    assert read_rows(folder, split="test", kind="prompts")[0].source == "saved[test]:1"
    assert "test, train" in message_of(lambda: read_rows(folder, split="dev", kind="prompts"))


def test_a_hub_name_is_loaded_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> Dataset:
        calls.append((args, kwargs))
        return Dataset.from_list([PAIR])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read_rows("openai/summaries:comparisons", split="validation", kind="preferences")
    assert rows[0].source == "openai/summaries:comparisons[validation]:1"
    read_rows("openai/summaries", kind="preferences")
    assert calls == [
        (("openai/summaries", "comparisons"), {"split": "validation"}),
        (("openai/summaries", None), {"split": "train"}),
    ]


def test_a_hub_name_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args: object, **kwargs: object) -> Dataset:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = message_of(lambda: read_rows("nobody/nothing", kind="preferences"))
    assert "nobody/nothing" in message
    assert "Couldn't reach the Hub" in message


# --- errors ---


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "chosen": "a"}, ["rows.jsonl:2", "no rejected", "prompt, chosen", "Fill it in"]),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, ["rows.jsonl:2", "no rejected", "prompt, chosen"]),
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, ["rows.jsonl:2", "`chosen`", "3", "text, or messages"]),
        ({"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}, ["rows.jsonl:2", "`prompt`", '{"a": 1}']),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, ["rows.jsonl:2", "`prompt`", "[]"]),
        ({"prompt": "Q", "chosen": [{"role": "user"}], "rejected": "b"}, ["rows.jsonl:2", "`chosen`", "content"]),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, ["null", "`prompt`"]),
        ({"prompt": "Q", "chosen": chat("Q", "a"), "rejected": "b"}, ["rows.jsonl:2", "text", "messages", "same"]),
        (PAIR | {"score_chosen": "high", "score_rejected": 1}, ["rows.jsonl:2", "`score_chosen`", '"high"', "number"]),
        (PAIR | {"score_chosen": True, "score_rejected": 1}, ["rows.jsonl:2", "`score_chosen`", "true"]),
        (PAIR | {"score_chosen": float("nan"), "score_rejected": 1}, ["rows.jsonl:2", "NaN", "finite"]),
        (PAIR | {"score_chosen": [1, 2], "score_rejected": 1}, ["rows.jsonl:2", "2 responses", "3 numbers"]),
        (["Q"], ["rows.jsonl:2", '["Q"]', "object"]),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_value(read: Read, row: Any, words: list[str]):
    message = message_of(lambda: read(PAIR, row))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "Q", "responses": ["a", "b"], "rewards": [1]}, "preferences", ["2 responses", "1 numbers"]),
        ({"prompt": "Q", "completion": "a", "label": "some"}, "labelled", ["`label`", '"some"', "true or false"]),
        (COMPARISON | {"choice": 2}, "preferences", ["`choice`", "2", "0 or 1"]),
        (COMPARISON | {"summaries": [{"text": "a"}]}, "preferences", ["`summaries`", "two"]),
        (COMPARISON | {"info": "post"}, "preferences", ["`info`", "object"]),
        ({"info": {"title": "T"}}, "prompts", ["no post", "title"]),
        ({"messages": "Q"}, "prompts", ["`messages`", "list"]),
        ({"text": ["a"]}, "texts", ["`text`", '["a"]']),
    ],
)
def test_wrong_values_are_refused_in_every_format(read: Read, row: dict[str, Any], kind: Kind, words: list[str]):
    message = message_of(lambda: read(row, kind=kind))
    assert all(word in message for word in ["rows.jsonl:1", *words]), message


def test_prompts_are_all_text_or_all_chats(read: Read):
    message = message_of(lambda: read({"prompt": "P"}, {"prompt": "Q"}, {"prompt": chat("R")}, kind="prompts"))
    assert "rows.jsonl:3: the prompt is chat messages, but that of rows.jsonl:1 is plain text. Make all" in message
    message = message_of(lambda: read(PAIR | {"prompt": chat("P")}, PAIR, PAIR))
    assert "rows.jsonl:2: the prompt is plain text, but that of rows.jsonl:1 is chat messages. Make all" in message


def test_unknown_columns_are_answered_with_the_forms_that_would_do(read: Read):
    message = message_of(lambda: read({"question": "Q", "better": "a", "worse": "b"}))
    for word in ("rows.jsonl:1", "question, better, worse", "columns={prompt: …, chosen: …, rejected: …}", "winner"):
        assert word in message
    assert "label" not in message, "only forms of this kind"
    many = message_of(lambda: read({f"some_column_{i}": "x" for i in range(99)}))
    assert "some_column_9, … (89 more)" in many
    assert len(textwrap.wrap(many, 80)) <= 7


def test_a_line_that_is_not_json_is_named(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR) + '\n\n{"prompt": "Q", oops}\n')
    message = message_of(lambda: read_rows(file, kind="preferences"))
    for word in ("rows.jsonl:3", "not valid JSON", "oops", "one object per line"):
        assert word in message


def test_the_line_is_right_in_a_list_that_is_not_json(tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text('[\n{"prompt": "Q"},\n{"prompt": }\n]')
    assert "rows.json:3" in message_of(lambda: read_rows(file, kind="prompts"))


def test_a_line_in_another_encoding_is_named(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "caf\xc3\xa9"}\n{"prompt": "caf\xe9"}\n')
    message = message_of(lambda: read_rows(file, kind="prompts"))
    assert "rows.jsonl:2" in message
    assert "UTF-8" in message
    listed = tmp_path / "rows.json"
    listed.write_bytes(b'[{"prompt": "caf\xc3\xa9"},\n\n{"prompt": "caf\xe9"}]')
    assert "rows.json:3" in message_of(lambda: read_rows(listed, kind="prompts"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "list.json", "rows.parquet", "saved"])
def test_an_empty_data_set_is_an_error(tmp_path: Path, name: str):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "rows.json").write_text(" \n")
    (tmp_path / "list.json").write_text("[]")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "saved")
    message = message_of(lambda: read_rows(tmp_path / name, kind="prompts"))
    assert "empty" in message
    assert name in message


def test_an_impossible_source_is_refused_without_a_hub_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.chdir(tmp_path)
    Path("data/empty").mkdir(parents=True)
    Path("rows.xml").write_text("prompt")
    Path("bad.parquet").write_text("prompt")
    Path("rows.jsonl").write_text('{"prompt": "Q"}')
    for source, split, words in [
        ("nothing.jsonl", None, ["nothing.jsonl", "no such file"]),
        ("data/nothing.txt", None, ["data/nothing.txt", "no such file", ".parquet"]),
        ("/no/such/path", None, ["/no/such/path", "no such file"]),
        ("rows.xml", None, ["rows.xml", ".xml", ".jsonl"]),
        ("bad.parquet", None, ["bad.parquet", "not a Parquet file"]),
        ("data/empty", None, ["data/empty", "folder"]),
        ("rows.jsonl", "train", ["rows.jsonl", "split='train'", "no effect"]),
    ]:
        message = message_of(lambda source=source, split=split: read_rows(source, split=split, kind="prompts"))
        assert all(word in message for word in words), message


def test_data_errors_are_shown_to_the_user_without_a_traceback():
    assert issubclass(DataError, UserError)


# --- hostile text ---

hostile = st.one_of(
    st.text(),
    st.sampled_from(["", " ", "\0", "👩‍👩‍👧", "e\u0301", "مرحبا", "\u202eabc", "\u2028", "<|im_end|>", "</s>", "\r\n"]),
    st.text(alphabet=" \n\n\tab\0\u2028HumanAssistant:", max_size=40),
)
no_fixture_reset = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@no_fixture_reset
@given(prompt=hostile, chosen=hostile, rejected=hostile)
def test_text_arrives_unchanged_or_is_counted(read: Read, prompt: str, chosen: str, rejected: str):
    rows = read({"prompt": prompt, "chosen": chosen, "rejected": rejected}, PAIR)
    first = Row(prompt, (chosen, rejected), source="rows.jsonl:1")
    if chosen.strip() and rejected.strip() and chosen != rejected:
        assert rows[0] == first
    left_out = rows.skipped.total() - rows.skipped["prompts without any text"]
    assert len(rows) + left_out == 2
    assert rows.skipped["prompts without any text"] == (not prompt and len(rows) == 2)


@no_fixture_reset
@given(shared=hostile, chosen=hostile, rejected=hostile)
def test_prompt_and_response_of_an_implicit_pair_join_to_the_text_read(
    read: Read, shared: str, chosen: str, rejected: str
):
    chosen, rejected = f"It {shared}{chosen}", f"It {shared}{rejected}"
    rows = read({"chosen": chosen, "rejected": rejected}, {"chosen": "x a", "rejected": "x b"})
    if len(rows) == 2:
        prompt = rows[0].prompt
        assert isinstance(prompt, str)
        assert [prompt + response for response in rows[0].responses] == [chosen, rejected]
    assert len(rows) + rows.skipped.total() == 2


@no_fixture_reset
@given(question=hostile, chosen=hostile, rejected=hostile)
def test_messages_arrive_unchanged_or_are_counted(read: Read, question: str, chosen: str, rejected: str):
    rows = read(
        {"chosen": chat(question, chosen), "rejected": chat(question, rejected)},
        {"chosen": chat("Q", "a"), "rejected": chat("Q", "b")},
    )
    if len(rows) == 2:
        assert rows[0] == Row(chat(question), (chosen, rejected), source="rows.jsonl:1")
    assert len(rows) + rows.skipped.total() == 2


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a\\ud83d b", "x": ["\\uDe00"]}\n{"prompt": "\\ud83d\\ude00"}\n')
    rows = read_rows(file, kind="prompts")
    assert [row.prompt for row in rows] == ["a� b", "😀"]
    assert rows.skipped.total() == 2
    assert "surrogate" in next(iter(rows.skipped))


def test_a_hundred_thousand_letters_without_a_space_are_read_at_once(read: Read):
    words = "It " + "a" * 100_000 + " " + "a" * 100_000
    row = read({"chosen": words + "b", "rejected": words + "c"})[0]
    assert row.prompt == "It " + "a" * 100_000
