"""A row, a line or a source that cannot be read is named with its value."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from reading import COMPARISON, PAIR, chat, message_of, read

from lit_align.data.formats import DataError, Kind, read_rows
from lit_align.errors import UserError


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "Q", "chosen": "a"},
            ["rows.jsonl:2", "no rejected, as the first row has", "prompt, chosen", "Fill it in"],
        ),
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
def test_a_row_that_does_not_fit_is_named_with_its_value(row: Any, words: list[str]):
    message = message_of(lambda: read(PAIR, row))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "Q", "responses": ["a", "b"], "rewards": [1]}, "preferences", ["2 responses", "1 number "]),
        ({"prompt": "Q", "responses": ["a", None], "rewards": [1, 0]}, "preferences", ["`responses` holds null"]),
        ({"prompt": "Q", "completion": "a", "label": "some"}, "labelled", ["`label`", '"some"', "true or false"]),
        (COMPARISON | {"choice": 2}, "preferences", ["`choice`", "2", "0 or 1"]),
        (COMPARISON | {"summaries": [{"text": "a"}]}, "preferences", ["`summaries`", "two"]),
        (COMPARISON | {"info": "post"}, "preferences", ["`info`", "object"]),
        ({"info": {"title": "T"}}, "prompts", ["no post", "title"]),
        ({"messages": "Q"}, "prompts", ["`messages`", "list"]),
        ({"text": ["a"]}, "texts", ["`text`", '["a"]']),
    ],
)
def test_wrong_values_are_refused_in_every_format(row: dict[str, Any], kind: Kind, words: list[str]):
    message = message_of(lambda: read(row, kind=kind))
    assert all(word in message for word in ["rows.jsonl:1", *words]), message


def test_prompts_are_all_text_or_all_chats():
    message = message_of(lambda: read({"prompt": "P"}, {"prompt": "Q"}, {"prompt": chat("R")}, kind="prompts"))
    assert "rows.jsonl:3: the prompt is chat messages, but that of rows.jsonl:1 is plain text. Make all" in message
    message = message_of(lambda: read(PAIR | {"prompt": chat("P")}, PAIR, PAIR))
    assert "rows.jsonl:2: the prompt is plain text, but that of rows.jsonl:1 is chat messages. Make all" in message


def test_unknown_columns_are_answered_with_the_forms_that_would_do():
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
