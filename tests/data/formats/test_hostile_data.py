"""Whatever a file holds, it is read or refused with one message."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import PAIR, chat, read

from lit_align.data.formats import DataError, Kind, Row, read_rows
from lit_align.data.formats.columns import TARGETS

KINDS = st.sampled_from(get_args(Kind))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "x", None, 3])},
    optional={
        "content": st.sampled_from(["Q", "", None, ["a"], [{"type": "text", "text": "t"}], [{"type": "image"}], 3]),
        "tool_calls": st.sampled_from([None, [], "[", '[{"a": 1}]', [{"function": {"name": "t"}}], 3, "x"]),
        "weight": st.sampled_from([0, 1, None, "x", []]),
        "thinking": st.sampled_from(["t", 3, {}]),
    },
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUE = st.one_of(
    SCALAR,
    st.sampled_from(["Q", "a", "b", "[", "[{'role': 'x'}]", '[{"role": "user", "content": "Q"}]', '["a", "b"]', "{}"]),
    st.sampled_from([0, 1, 2, -1, 10**400, 1e308, "tie", "a", "model_a", "first"]),
    st.lists(MESSAGE, max_size=3),
    MESSAGE,
    st.recursive(
        SCALAR, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    st.lists(
        st.fixed_dictionaries({"answer": st.text(max_size=3)}, optional={"rank": SCALAR, "score": SCALAR}), max_size=3
    ),
)
NAMES = [
    *TARGETS,
    *("instruction", "input", "question", "output", "answer", "conversations", "initial_reason_steps", "answers"),
    *("response_a", "response_b", "conversation_a", "conversation_b", "score_a", "score_b", "preference_strength"),
    *("winner_model_a", "winner_model_b", "rejected_response", "rejected_messages", "info", "summaries", "choice"),
    *(
        "post",
        "summary",
        "ranks",
        "ratings",
        "chosen_rating",
        "images",
        "labels",
        "human_ref_A",
        "human_ref_B",
        "extra",
    ),
]
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
GOOD = [
    {"prompt": "Q", "chosen": "a", "rejected": "b"},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "b"}]},
    {"chosen": "Q a", "rejected": "Q b"},
    {"messages": CHAT},
    {"messages": CHAT[:1], "chosen": CHAT[1], "rejected": {"role": "assistant", "content": "b"}},
    {"messages": CHAT, "rejected_response": "b"},
    {"question": "Q", "response_a": "a", "response_b": "b", "winner": "a"},
    {"conversation_a": CHAT, "conversation_b": [*CHAT[:1], {"role": "gpt", "content": "b"}], "winner": "model_a"},
    {"instruction": "Q", "input": "x", "output": "a"},
    {"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    {"prompt": "Q", "responses": ["a", "b"], "rewards": [1, 2]},
    {"prompt": "Q", "completion": "a", "label": True},
    {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -1},
    {"text": "all"},
    {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
]
JUNK = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=7)
ROW = st.one_of(
    JUNK,
    st.builds(
        lambda good, junk: good | junk,
        st.sampled_from(GOOD),
        st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=2),
    ),
)


def check(rows: Sequence[Row]) -> None:
    """A row that is read keeps the promises of its type."""
    for row in rows:
        assert isinstance(row.prompt, str) or all(
            isinstance(each["role"], str) and (each["content"] is None or isinstance(each["content"], str))
            for each in row.prompt
        )
        for answer in row.responses:
            assert isinstance(answer, str) or (answer["role"] == "assistant" and len(answer) > 2)
        for each in (row.rewards, row.labels):
            assert each is None or len(each) == len(row.responses)


def assert_one_paragraph(error: DataError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@settings(deadline=None, max_examples=400)
@given(st.lists(ROW, min_size=1, max_size=3), KINDS)
def test_any_row_is_read_or_refused(rows: list[dict[str, Any]], kind: str):
    try:
        check(read(*rows, kind=kind).rows)
    except DataError as error:
        assert_one_paragraph(error)


PATHS = st.sampled_from(
    ["a", "b", "c.0", "c.0.content", "c.x", "{a}", "{a}\n{b}", "{c.-1.content}: {b}", "{", "{}", "z"]
)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.fixed_dictionaries({"a": VALUE, "b": VALUE, "c": VALUE}), min_size=1, max_size=2),
    st.dictionaries(st.sampled_from([*TARGETS]), PATHS, max_size=4),
    KINDS,
)
def test_any_mapping_is_applied_or_refused(rows: list[dict[str, Any]], columns: dict[str, str], kind: str):
    try:
        check(read(*rows, kind=kind, columns=columns).rows)
    except DataError as error:
        assert_one_paragraph(error)


PAIRS = [
    {"prompt": f"Q{i}", "chosen": "a" * i, "rejected": "b", "score_chosen": i, "score_rejected": 0} for i in range(1, 9)
]


def _contents(folder: Path) -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    with (folder / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PAIRS[0])
        writer.writeheader()
        writer.writerows(PAIRS)
    pq.write_table(pa.Table.from_pylist(PAIRS), folder / "x.parquet")
    return {
        "rows.jsonl": lines.encode(),
        "rows.json": json.dumps(PAIRS).encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode()),
        "rows.csv": (folder / "x.csv").read_bytes(),
        "rows.parquet": (folder / "x.parquet").read_bytes(),
    }


FILES = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.parquet"]


def damage_and_read(name: str, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        content = bytearray(_contents(Path(folder))[name])
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        path = Path(folder, name)
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
        try:
            check(read_rows(path, kind="preferences").rows)
        except DataError as error:
            assert_one_paragraph(error)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_damage_to_a_file_is_read_over_or_refused(name: str, data: st.DataObject):
    damage_and_read(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_much_damage_to_a_file_is_read_over_or_refused(name: str, data: st.DataObject):
    damage_and_read(name, data)


hostile = st.one_of(
    st.text(),
    st.sampled_from(["", " ", "\0", "👩‍👩‍👧", "e\u0301", "مرحبا", "\u202eabc", "\u2028", "<|im_end|>", "</s>", "\r\n"]),
    st.text(alphabet=" \n\n\tab\0\u2028HumanAssistant:", max_size=40),
)


@settings(deadline=None)
@given(prompt=hostile, chosen=hostile, rejected=hostile)
def test_text_arrives_unchanged_or_is_counted(prompt: str, chosen: str, rejected: str):
    rows = read({"prompt": prompt, "chosen": chosen, "rejected": rejected}, PAIR)
    first = Row(prompt, (chosen, rejected), source="rows.jsonl:1")
    if chosen.strip() and rejected.strip() and chosen != rejected:
        assert rows[0] == first
    left_out = rows.skipped.total() - rows.skipped["prompts without any text"]
    assert len(rows) + left_out == 2
    assert rows.skipped["prompts without any text"] == (not prompt and len(rows) == 2)


@settings(deadline=None)
@given(shared=hostile, chosen=hostile, rejected=hostile)
def test_prompt_and_response_of_an_implicit_pair_join_to_the_text_read(shared: str, chosen: str, rejected: str):
    chosen, rejected = f"It {shared}{chosen}", f"It {shared}{rejected}"
    rows = read({"chosen": chosen, "rejected": rejected}, {"chosen": "x a", "rejected": "x b"})
    if len(rows) == 2:
        prompt = rows[0].prompt
        assert isinstance(prompt, str)
        assert [prompt + response for response in rows[0].responses] == [chosen, rejected]
    assert len(rows) + rows.skipped.total() == 2


@settings(deadline=None)
@given(question=hostile, chosen=hostile, rejected=hostile)
def test_messages_arrive_unchanged_or_are_counted(question: str, chosen: str, rejected: str):
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


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": r'[{"role": "user", "content": "a\ud83d"}]'}, {}),
        ({"prompt": r"{'role': 'user', 'content': 'a\ud83d'}"}, {}),
        ({"prompt": '["a\\ud83d"]', "response_a": '["x"]', "response_b": '["y"]', "winner": "a"}, {}),
        ({"row": r'{"text": "a\ud83d"}'}, {"prompt": "row.text"}),
        ({"prompt": chat("Q"), "tools": r'[{"name": "a\ud83d"}]'}, {}),
        ({"prompt": "Q", "\ud83d": 1}, {}),
    ],
)
def test_half_a_surrogate_pair_may_be_spelled_out_in_a_text(row: dict[str, Any], columns: dict[str, str]):
    rows = read(row, kind="prompts", columns=columns)
    assert "a�" in str((rows[0].prompt, rows[0].tools)) or rows.unread == ("�",)
    assert rows.skipped["texts with half a surrogate pair, now �"] == 1


def test_a_hundred_thousand_letters_without_a_space_are_read_at_once():
    words = "It " + "a" * 100_000 + " " + "a" * 100_000
    row = read({"chosen": words + "b", "rejected": words + "c"})[0]
    assert row.prompt == "It " + "a" * 100_000
