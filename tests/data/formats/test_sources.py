"""Files, globs, slices and downloaded folders are read; damaged ones are one message."""

import bz2
import csv
import gzip
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import PAIR, chat, message_of

from lit_align.data.formats import Rows, read_rows
from lit_align.data.formats.identity import identity_of
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError
from lit_align.data.formats.slices import sliced
from lit_align.data.formats.sources import load_hub

PAIRS = [{"prompt": f'Q{i}, "so"\n?', "chosen": "a", "rejected": "b"} for i in range(10)]
PROMPTS = [pair["prompt"] for pair in PAIRS]


def lines(rows: list[dict[str, Any]] = PAIRS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(path: Path, delimiter: str) -> bytes:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PAIRS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(PAIRS)
    return path.read_bytes()


def prompts(source: Any, **options: Any) -> list[Any]:
    return [row.prompt for row in read_rows(source, kind="preferences", **options)]


def pairs(path: Path) -> Rows:
    return read_rows(path, kind="preferences")


def zst(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
def test_each_kind_of_file_is_read_compressed_or_not(tmp_path: Path, suffix: str):
    files = {
        "rows.jsonl": lines(),
        "rows.ndjson": lines(),
        "list.json": json.dumps(PAIRS).encode(),
        "rows.csv": b"\xef\xbb\xbf" + table(tmp_path / "x.csv", ","),
        "rows.tsv": table(tmp_path / "x.tsv", "\t"),
    }
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zst}[suffix]
    for name, content in files.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(compress(content))
        assert prompts(path) == PROMPTS, name


def test_endings_of_names_may_be_capitals(tmp_path: Path):
    (tmp_path / "ROWS.JSONL.GZ").write_bytes(gzip.compress(lines()))
    (tmp_path / "Rows.Csv").write_bytes(table(tmp_path / "x.tsv", ","))
    (tmp_path / "ROWS.TSV").write_bytes(table(tmp_path / "x.csv", "\t"))
    for name in ("ROWS.JSONL.GZ", "Rows.Csv", "ROWS.TSV"):
        assert prompts(tmp_path / name) == PROMPTS, name


@pytest.mark.parametrize("content", [json.dumps(PAIRS), json.dumps(PAIRS, indent=1), " \n" + json.dumps(PAIRS)])
def test_a_jsonl_file_may_be_one_list(tmp_path: Path, content: str):
    (tmp_path / "rows.jsonl").write_text(content)
    assert prompts(tmp_path / "rows.jsonl") == PROMPTS


def test_a_list_on_each_line_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(chat("Q", "a")) + "\n"))
    assert "rows.jsonl:1: the row is [{" in message_of(lambda: pairs(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_are_read(tmp_path: Path, writer: Any):
    file, rows = tmp_path / "rows.arrow", pa.Table.from_pylist(PAIRS)
    with writer(str(file), rows.schema) as opened:
        opened.write_table(rows, max_chunksize=3)
    assert prompts(file) == PROMPTS
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "rows.arrow" in message_of(lambda: prompts(file))


def test_maps_of_arrow_are_objects(tmp_path: Path):
    messages = [[("role", "user"), ("content", "Q")], [("role", "assistant"), ("content", "a")]]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pa.array([messages], kind)}), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", kind="texts")[0].prompt == chat("Q")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_file_of_a_spreadsheet_is_read(tmp_path: Path, delimiter: str):
    table(tmp_path / "rows.csv", delimiter)
    assert prompts(tmp_path / "rows.csv") == PROMPTS


SPREADSHEET = 'Frage, kurz;gut;"schlecht, leider";Note gut;Note schlecht\nGröße?;"Groß; sehr";klein;1,5;-0,5\n'
COLUMNS = {"prompt": "Frage, kurz", "chosen": "gut", "rejected": "schlecht, leider"}


def test_a_german_spreadsheet_is_read_or_its_fix_is_named(tmp_path: Path):
    """Commas in names, a byte order mark, umlauts; another encoding and decimal commas are refused."""
    file = tmp_path / "fragen.csv"
    file.write_text(SPREADSHEET, encoding="utf-8-sig")
    (row,) = read_rows(file, kind="preferences", columns=COLUMNS)
    assert (row.prompt, *row.responses) == ("Größe?", "Groß; sehr", "klein")
    scores = {"score_chosen": "Note gut", "score_rejected": "Note schlecht"}
    message = message_of(lambda: read_rows(file, kind="preferences", columns=COLUMNS | scores))
    assert '`score_chosen` holds "1,5", but needs a number with a decimal point.' in message
    file.write_text(SPREADSHEET, encoding="cp1252")
    assert "not UTF-8 near line 1" in (message := message_of(lambda: pairs(file)))
    assert message.endswith("Save it as UTF-8 (in Excel: CSV UTF-8).")


ONE = {"prompt": "Q", "chosen": "a", "rejected": "b"}


def test_a_json_file_may_be_one_row_on_several_lines(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ONE, indent=2))
    assert prompts(path) == ["Q"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": [ONE, ONE]}, "whose `data` seems to hold the rows"),
        ({"train": [ONE], "test": [ONE]}, "whose `train` seems to hold the rows"),
        ({name: [value, value] for name, value in ONE.items()}, "a table by columns"),
        ({name: {"0": value, "1": value} for name, value in ONE.items()}, "a table by columns"),
    ],
)
def test_a_json_file_that_is_not_a_list_of_rows_is_refused(tmp_path: Path, content: dict[str, Any], words: str):
    path = tmp_path / "rows.json"
    for indent in (None, 1):
        path.write_text(json.dumps(content, indent=indent))
        assert words in message_of(lambda: pairs(path))


def test_an_archive_must_be_unpacked(tmp_path: Path):
    (tmp_path / "rows.jsonl.zip").write_bytes(b"PK")
    assert "Unpack it" in message_of(lambda: pairs(tmp_path / "rows.jsonl.zip"))


def test_numbers_lists_and_messages_are_read_from_tables_of_text(tmp_path: Path):
    file = tmp_path / "rows.csv"
    chat = "\"[{'role': 'user', 'content': 'Q'}]\""
    file.write_text(f"prompt,chosen,rejected,score_chosen,score_rejected\n{chat},a,b,1.5,1\n")
    row = pairs(file)[0]
    assert row.prompt == [{"role": "user", "content": "Q"}]
    assert row.rewards == (1.5, 1.0)
    file.write_text('prompt,responses,rewards\nQ,"[""a"", ""b""]","[1, 2]"\n')
    assert pairs(file)[0].responses == ("b", "a")


def test_lists_and_globs_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for i in (2, 1, 0):
        Path(f"part{i}.jsonl").write_bytes(lines(PAIRS[3 * i : 3 * i + 3]))
    assert prompts("part*.jsonl") == PROMPTS[:9]
    assert prompts("part[12].jsonl") == PROMPTS[3:9]
    assert prompts(["part2.jsonl", "part0.jsonl[:1]"]) == [*PROMPTS[6:9], PROMPTS[0]]
    assert prompts("part*.jsonl[3:5]") == PROMPTS[3:5]
    assert "no file matches" in message_of(lambda: prompts("nothing*.jsonl"))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ("[:3]", PROMPTS[:3]),
        ("[3:]", PROMPTS[3:]),
        ("[-2:]", PROMPTS[-2:]),
        ("[2:4]", PROMPTS[2:4]),
        ("[:95%]", PROMPTS[:10]),
        ("[:90%]", PROMPTS[:9]),
        ("[90%:]", PROMPTS[9:]),
        ("[-10%:]", PROMPTS[9:]),
        ("[:99]", PROMPTS),
        ("[:]", PROMPTS),
    ],
)
def test_slices_of_files_folders_and_splits(tmp_path: Path, bounds: str, expected: list[str]):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines())
    DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS[:1])).save_to_disk(tmp_path / "saved")
    assert prompts(f"{file}{bounds}") == expected
    assert prompts(file, split=bounds) == expected
    assert prompts(tmp_path / "saved", split=f"train{bounds}") == expected
    assert prompts(f"{tmp_path / 'saved'}{bounds}") == expected


def test_a_slice_keeps_the_numbers_of_its_rows_and_a_wrong_one_is_refused(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines())
    assert read_rows(f"{file}[4:]", kind="prompts")[0].source == "rows.jsonl:5"
    for bounds in ("[a:]", "[1.5:]", "[1:2:3]"):
        assert "a slice must be" in message_of(lambda bounds=bounds: prompts(f"{file}{bounds}"))
    assert "is empty" in message_of(lambda: prompts(f"{file}[5:5]"))


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 1000))
def test_complementary_shares_have_each_row_once(count: int, tenths: int):
    records = [Record({}, str(i)) for i in range(count)]
    share = f"{tenths / 10}%"
    both = [*sliced(iter(records), f":{share}"), *sliced(iter(records), f"{share}:")]
    assert both == records


# --- downloaded folders ---


def test_a_downloaded_folder_is_read_by_the_names_of_its_files(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Birds\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_bytes(lines())
    pq.write_table(pa.Table.from_pylist(PAIRS[:4]), tmp_path / "data" / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(PAIRS[4:6]), tmp_path / "data" / "train-00001-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(PAIRS[6:]), tmp_path / "data" / "test-00000-of-00001.parquet")
    assert prompts(tmp_path) == PROMPTS[:6]
    assert prompts(tmp_path, split="test") == PROMPTS[6:]
    assert prompts(tmp_path, split="train[:50%]") == PROMPTS[:3]
    assert "Set `split` to one of test, train" in message_of(lambda: prompts(tmp_path, split="dev"))


def test_the_files_of_the_hub_are_named_after_their_splits(tmp_path: Path):
    """As in UltraFeedback binarized, whose train_sft has the pairs of train_prefs once more."""
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft-00000-of-00001-a1b2"):
        pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / f"{name}.parquet")
    assert "Set `split` to one of train_prefs, train_sft" in message_of(lambda: prompts(tmp_path))
    assert prompts(tmp_path, split="train_prefs") == PROMPTS * 2


def test_a_folder_with_plain_names_is_one_data_set(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines(PAIRS[:2]))
    (tmp_path / "b.csv").write_bytes(table(tmp_path / "b.csv", ","))
    assert prompts(tmp_path) == PROMPTS[:2] + PROMPTS
    (tmp_path / "train.jsonl").write_bytes(lines())
    assert "not clear to which split" in message_of(lambda: prompts(tmp_path))


def test_the_configurations_of_a_readme_name_the_files(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n    path: big/*.jsonl\n"
        "- config_name: small\n  default: true\n  data_files: small.jsonl\n---\n"
    )
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "x.jsonl").write_bytes(lines())
    (tmp_path / "small.jsonl").write_bytes(lines(PAIRS[:2]))
    assert prompts(tmp_path) == PROMPTS[:2]
    assert prompts(f"{tmp_path}:big") == PROMPTS
    assert "has the configurations big, small" in message_of(lambda: prompts(f"{tmp_path}:huge"))
    os.remove(tmp_path / "small.jsonl")
    assert "not in the folder" in message_of(lambda: prompts(tmp_path))


def test_a_name_may_end_with_a_split_and_a_slice(tmp_path: Path):
    for name, rows in (("train", PAIRS[:2]), ("test", PAIRS[2:])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    assert prompts(tmp_path) == PROMPTS[:2]
    assert prompts(f"{tmp_path}[test]") == PROMPTS[2:]
    assert prompts(f"{tmp_path}[test][1:3]") == PROMPTS[3:5]
    assert "no split 'dev'" in message_of(lambda: prompts(f"{tmp_path}[dev]"))
    both = message_of(lambda: read_rows(f"{tmp_path}[test]", split="train", kind="prompts"))
    assert "names a split, and split='train' another" in both
    assert prompts(f"{tmp_path}/t[er]*.jsonl") == PROMPTS[2:] + PROMPTS[:2], "a glob"
    (tmp_path / "test.jsonl").rename(tmp_path / "rows_1")
    assert identity_of(f"{tmp_path}[test]", None) == identity_of(str(tmp_path), None)


def test_a_configuration_of_a_readme_may_be_a_folder(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_dir: data/big\n- config_name: small\n  data_dir: data/small\n"
        "- config_name: first\n  data_dir: data/big\n  data_files: a*.jsonl\n"
        "- config_name: gone\n  data_dir: data/gone\n---\n"
    )
    for name, rows in (("big/a.jsonl", PAIRS[:1]), ("big/b.jsonl", PAIRS[1:]), ("small/train.jsonl", PAIRS[:2])):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(lines(rows))
    (tmp_path / "data/small/test.jsonl").write_bytes(lines(PAIRS[2:]))
    assert prompts(f"{tmp_path}:big") == PROMPTS
    assert prompts(f"{tmp_path}:first") == PROMPTS[:1]
    assert prompts(f"{tmp_path}:small") == PROMPTS[:2]
    assert [row.prompt for row in read_rows(f"{tmp_path}:small", split="test", kind="prompts")] == PROMPTS[2:]
    assert "the configurations big, small" in message_of(lambda: prompts(tmp_path))
    assert "configuration gone names files for train" in message_of(lambda: prompts(f"{tmp_path}:gone"))


def test_rows_of_files_with_the_same_name_are_told_apart(tmp_path: Path):
    for place in ("a", "b/c"):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / "train.jsonl").write_bytes(lines(PAIRS[:1]))
    sources = ["a/train.jsonl:1", "b/c/train.jsonl:1"]
    for path in (tmp_path / "data", tmp_path / "data/**/train.jsonl"):
        assert [row.source for row in read_rows(str(path), kind="preferences")] == sources
    (tmp_path / "data/a/train.jsonl").rename(tmp_path / "data/a/train_2.jsonl")
    rows = read_rows(str(tmp_path / "data"), kind="preferences")
    assert [row.source for row in rows] == ["train_2.jsonl:1", "train.jsonl:1"]


# --- damaged input ---


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", lines() + b'{"prompt": ' + b"9" * 5000 + b"}", ["rows.jsonl:11", "too many digits"]),
        ("rows.jsonl", b'{"prompt": ' + b"[" * 200_000, ["rows.jsonl:1", "nested too deeply"]),
        ("rows.jsonl", b'{"prompt": "a", "prompt": "b"}', ["rows.jsonl:1", '"prompt" twice']),
        ("rows.jsonl", b'{"prompt": [{"role": "user", "role": "x"}]}', ["rows.jsonl:1", '"role" twice']),
        ("rows.json", json.dumps(PAIRS).encode()[:-9], ["rows.json:1", "not valid JSON"]),
        ("rows.jsonl.gz", gzip.compress(lines() * 999)[:-99], ["rows.jsonl.gz", "damaged or cut off"]),
        ("rows.jsonl.gz", lines(), ["rows.jsonl.gz", "damaged or cut off"]),
        ("rows.jsonl.bz2", lines(), ["rows.jsonl.bz2", "damaged or cut off"]),
        ("rows.csv", b"prompt,prompt\na,b\n", ["rows.csv", "same name (prompt)"]),
        ("rows.csv", b"prompt,chosen\na,b\na,b,c\n", ["rows.csv:2", "3 fields", "2 columns"]),
        ("rows.csv", b'prompt,chosen\na,"b', ["rows.csv", "not valid CSV"]),
        ("rows.csv", b"prompt,chosen\ncaf\xe9,b\n", ["rows.csv", "not UTF-8"]),
        ("rows.csv", b"prompt,chosen\n", ["rows.csv", "empty"]),
        ("rows.csv", b"", ["rows.csv", "empty"]),
        ("rows.parquet", b"PAR1" + bytes(99) + b"PAR1", ["rows.parquet", "not a Parquet file"]),
    ],
)
def test_damaged_files_are_one_message(tmp_path: Path, name: str, content: bytes, words: list[str]):
    (tmp_path / name).write_bytes(content)
    message = message_of(lambda: prompts(tmp_path / name))
    assert all(word in message for word in words), message
    assert len(message) < 600


def test_a_parquet_file_that_is_damaged_inside_a_page_is_one_message(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(PAIRS * 50), file, compression="zstd", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[60:160] = bytes(100)
    file.write_bytes(content)
    assert "the file is damaged" in message_of(lambda: prompts(file))


def test_parquet_text_that_is_not_utf_8_is_one_message(tmp_path: Path):
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0])), pa.py_buffer(b"caf\xe9")]
    )
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": text, "chosen": ["a"], "rejected": ["b"]}), file)
    assert "the file is damaged" in message_of(lambda: prompts(file))


def test_parquet_columns_of_the_same_name_are_refused(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["Q"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"]), file)
    assert "same name (chosen)" in message_of(lambda: prompts(file))


@pytest.mark.parametrize("number", ["1e400", "-1e308", "1e39", "1" + "0" * 400, "NaN", '"inf"'])
def test_rewards_that_32_bits_cannot_hold_are_refused(tmp_path: Path, number: str):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": {number}, "score_rejected": 1}}')
    message = message_of(lambda: prompts(file))
    assert "rows.jsonl:1: `score_chosen`" in message
    assert "finite number" in message


def test_decimals_are_numbers(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    scores = {"score_chosen": [Decimal("1.5")], "score_rejected": [Decimal("-2.0")]}
    pq.write_table(pa.table({"prompt": ["Q"], "chosen": ["a"], "rejected": ["b"]} | scores), file)
    assert read_rows(file, kind="preferences")[0].rewards == (1.5, -2.0)


def test_keys_that_only_other_rows_have_are_not_added_to_tool_calls(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    calls = [{"function": {"name": "t", "arguments": {"x": 1}}}, {"function": {"name": "u", "arguments": {"y": 2}}}]
    chats = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(chats), file)
    read = [row.responses[0]["tool_calls"] for row in read_rows(file, kind="texts")]  # type: ignore[index]
    assert read == [[call] for call in calls]


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


def test_a_files_folder_belongs_to_the_identity_of_a_source(tmp_path):
    for name in ("train/0.jsonl", "val/1.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(lines())
    (tmp_path / "train" / "link").symlink_to(tmp_path / "nowhere")
    names = [str(tmp_path), f"{tmp_path}:configuration"]
    before = [identity_of(name, None) for name in names]
    (tmp_path / "val" / "1.jsonl").rename(tmp_path / "train" / "1.jsonl")
    for name, earlier in zip(names, before, strict=True):
        assert identity_of(name, None) != earlier


def test_a_data_set_that_the_hub_has_but_cannot_be_prepared_says_why(monkeypatch):
    def load_dataset(*args: Any, **options: Any) -> Any:
        raise DatasetGenerationError("An error occurred while generating the dataset") from OSError("disk is full")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/pairs: `datasets` cannot prepare this data set \(disk is full\)"):
        load_hub("owner/pairs", None)
