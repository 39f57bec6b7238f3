"""From files to rows: what is detected, what is refused, and in which words."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lit_align.data.formats import DataError, Kind, read_rows

HH = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Name a fruit.\n\nAssistant: "
CHAT = [{"role": "user", "content": "Name a fruit."}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def jsonl(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "A fruit:", "chosen": " Apple", "rejected": " Car"}, "A fruit:", (" Apple", " Car")),
        ({"prompt": "A fruit:", "chosen": "a", "rejected": ["b", "c"]}, "A fruit:", ("a", "b", "c")),
        ({"prompt": CHAT, "chosen": reply("Apple"), "rejected": reply("Car")}, CHAT, ("Apple", "Car")),
        (
            {"prompt": "ignored", "chosen": CHAT + reply("Apple"), "rejected": CHAT + reply("Car")},
            CHAT,
            ("Apple", "Car"),
        ),
        ({"chosen": CHAT + reply("Apple"), "rejected": CHAT + reply("Car")}, CHAT, ("Apple", "Car")),
        (
            {"chosen": HH + "Apple", "rejected": HH + "Car"},
            [
                {"role": "user", "content": "Hi there"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Name a fruit."},
            ],
            ("Apple", "Car"),
        ),
        ({"prompt": "p", "responses": ["a", "b", "c"], "rewards": [0.5, 2, -1]}, "p", ("b", "a", "c")),
    ],
    ids=["explicit", "several rejected", "explicit chat", "UltraFeedback", "implicit chat", "HH transcript", "rewards"],
)
def test_formats_of_preferences_are_told_by_their_columns(tmp_path, row, prompt, responses):
    (read,) = read_rows(jsonl(tmp_path, row), kind="preferences")
    assert (read.prompt, read.responses) == (prompt, responses)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "other": 1}, "p"),
        ({"prompt": CHAT}, CHAT),
        ({"messages": CHAT + reply("Apple")}, CHAT),
        ({"chosen": CHAT + reply("Apple"), "rejected": CHAT + reply("Car")}, CHAT),
    ],
)
def test_formats_of_prompts_are_told_by_their_columns(tmp_path, row, prompt):
    assert read_rows(jsonl(tmp_path, row), kind="prompts")[0].prompt == prompt


def test_json_parquet_and_saved_data_sets_give_the_same_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "saved"))
    expected = [row.prompt for row in read_rows(jsonl(tmp_path, *rows), kind="preferences")]
    for name in ("rows.json", "rows.parquet", "saved"):
        assert [row.prompt for row in read_rows(str(tmp_path / name), kind="preferences")] == expected
    assert len(read_rows(str(tmp_path / "saved"), split="test", kind="preferences")) == 1


def test_rows_know_their_file_and_number(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a"}, "", {"prompt": "b"})
    assert [row.source for row in read_rows(path, kind="prompts")] == [f"{path}:1", f"{path}:3"]


def test_equal_responses_are_skipped_and_counted(tmp_path):
    same, good = {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = read_rows(jsonl(tmp_path, same, good, same), kind="preferences")
    assert (len(rows), dict(rows.skipped)) == (1, {"whose responses are equal": 2})


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([GOOD, {"prompt": "p", "chosen": "a"}], "preferences", r"rows.jsonl:2: has no column 'rejected'; its columns are: prompt, chosen"),
        ([{"question": "p"}], "preferences", r"rows.jsonl:1: no known format of preferences has the columns question.*prompt, chosen, rejected"),
        ([GOOD, "{no json"], "preferences", r"rows.jsonl:2: no JSON"),
        ([GOOD, "[1, 2]"], "preferences", r"rows.jsonl:2: a row must be an object"),
        ([], "prompts", r"rows.jsonl: there is no row in it"),
        ([{"prompt": 3}], "prompts", r"rows.jsonl:1: column 'prompt' must be text or a list of messages, not 3"),
        ([{"prompt": [{"role": "user"}]}], "prompts", r"messages with `role` and `content`, not {'role': 'user'}"),
        ([{**GOOD, "chosen": 5}], "preferences", r"column 'chosen' must be text or a list of messages, not 5"),
        ([{"chosen": "plain", "rejected": "texts"}], "preferences", r"without a 'prompt' column"),
        ([{"prompt": "p", "responses": ["a", "b"], "rewards": [1, float("nan")]}], "preferences", r"'rewards' must hold numbers"),
        ([{"prompt": "p", "responses": ["a", "b"], "rewards": [1]}], "preferences", r"lists of one length"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_what_it_has_and_what_it_needs(tmp_path, rows, kind: Kind, message):
    with pytest.raises(DataError, match=message):
        read_rows(jsonl(tmp_path, *rows), kind=kind)


def test_a_missing_file_a_missing_split_and_a_wrong_json_are_named(tmp_path):
    with pytest.raises(DataError, match="no_such.jsonl: there is no such file"):
        read_rows(str(tmp_path / "no_such.jsonl"), kind="prompts")
    with pytest.raises(DataError, match="leave split='test' out"):
        read_rows(jsonl(tmp_path, GOOD), split="test", kind="prompts")
    (tmp_path / "lines.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"lines.json:2: no JSON .* must end in .jsonl"):
        read_rows(str(tmp_path / "lines.json"), kind="prompts")
    (tmp_path / "no.parquet").write_text("nothing")
    with pytest.raises(DataError, match="no Parquet file"):
        read_rows(str(tmp_path / "no.parquet"), kind="prompts")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="has no split 'tset', but train"):
        read_rows(str(tmp_path / "saved"), split="tset", kind="prompts")


hostile = st.text() | st.sampled_from(["", "\x00", "<|im_end|>", "שלום", "👩‍👩‍👧", "\n\nHuman:", "a" * 10_000])


@given(prompt=hostile, chosen=hostile, rejected=hostile)
def test_any_text_comes_through_unchanged_or_is_counted(tmp_path_factory, prompt, chosen, rejected):
    path = jsonl(tmp_path_factory.mktemp("rows"), {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rows = read_rows(path, kind="preferences")
    if chosen == rejected:
        assert (len(rows), rows.skipped.total()) == (0, 1)
    else:
        assert (rows[0].prompt, rows[0].responses) == (prompt, (chosen, rejected))
