"""A list in a .json file is read piece by piece: the same rows and messages wherever a piece ends, in little memory."""

import codecs
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lit_align.data.formats import json_files
from lit_align.data.formats.files import find_reader
from lit_align.data.formats.rows import DataError

ROWS = [
    {"prompt": 'a"b\\', "numbers": [-1.5e3, 12, 0], "n": None},
    {},
    {"prompt": "ü 👩 中\u2028]", "more": {"deep": [{"x": "}"}, []]}},
    {"prompt": "\n\t,", "yes": True},
]
PIECES = [1, 2, 5, 17, 1 << 18]


def read(name: str) -> list[Any]:
    reader = find_reader(Path(name))
    assert reader is not None
    return [record.values for record in reader(Path(name), Counter())]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16"])
def test_a_list_is_the_same_wherever_its_pieces_end(in_tmp, monkeypatch, piece, encoding):
    monkeypatch.setattr(json_files, "PIECE", max(piece, 4))  # the encoding shows in 4 bytes
    for text in (
        json.dumps(ROWS),
        json.dumps(ROWS, ensure_ascii=False, indent=3),
        "[ ]\r\n",
        '[{"x": 1} , \n\n{"x": 2}]',
    ):
        Path("rows.json").write_bytes(text.encode(encoding))
        assert read("rows.json") == json.loads(text)


def test_a_line_that_ends_within_an_object_is_named(in_tmp):
    Path("rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: this line is not valid JSON .*, column 6\): .*a"):
        read("rows.jsonl")


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', r"rows.json:3: .*delimiter, column 2\): "),
        (b'[{"a": 1}, {"a": 2}, {"a" 3}]', r"rows.json:1: .*delimiter, column 27\)"),
        (b'[{"a": 1},\n{"b": 2},\n]', r"rows.json:3: .*Expecting value"),
        (b'[{"a": 1}]\n]', r"rows.json:2: .*Extra data, column 1\)"),
        (b'[{"a": 1},\n{"a": "x', r"rows.json:2: .*Unterminated string starting at, column 7\)"),
        (b'[{"a": 1}', "rows.json:1: this line is not valid JSON"),
        (b'[{"a": 1},\n{"a": "caf\xe9"}]', "rows.json:2: this line is not UTF-8"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', "rows.json:2: an object holds the key \"a\" twice|key 'a' twice"),
        (b'[{"a": 1},\n3]', "rows.json:2: the row is 3, but needs to be an object"),
        (b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b"}]", "rows.json:2: a number has too many digits"),
    ],
)
def test_an_error_names_the_line(in_tmp, monkeypatch, piece, text, message):
    monkeypatch.setattr(json_files, "PIECE", max(piece, 4))
    Path("rows.json").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read("rows.json")


def test_half_a_surrogate_pair_in_a_list_is_replaced(in_tmp):
    Path("rows.json").write_bytes(b'[{"a": "\\ud83d"}, {"a": "\xed\xa0\x81"}, {"a": "\\ud83d\\udc26"}]')
    assert read("rows.json") == [{"a": "�"}, {"a": "�"}, {"a": "🐦"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.zst", "rows.jsonl.zst"])
def test_a_large_file_is_never_in_memory(in_tmp, name):
    rows = [{"prompt": f"{number} " * 1000} for number in range(900)]
    text = json.dumps(rows) if ".json" in Path(name).suffixes else "\n".join(map(json.dumps, rows))
    with pa.output_stream(name) as file:
        file.write(text.encode())
    reader = find_reader(Path(name))
    assert reader is not None
    tracemalloc.start()
    assert sum(1 for _ in reader(Path(name), Counter())) == 900
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(text) / 2


@pytest.mark.parametrize("name", ["rows.json", "rows.json.zst"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_large_object_is_refused_before_it_is_in_memory(in_tmp, name, indent, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST_ROW", 100_000)
    text = json.dumps({"data": [{"prompt": f"{number} " * 1000} for number in range(500)]}, indent=indent)
    with pa.output_stream(name) as file:
        file.write(text.encode())
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{name}: the file begins with an object of more than 0 MB"):
        read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(text) / 2
    Path("row.json").write_text(json.dumps({"prompt": "a"}, indent=indent))
    assert read("row.json") == [{"prompt": "a"}]
    Path("lines.json").write_text('{"prompt": "a", "prompt": "b"}\n' + '{"prompt": "c"}\n' * 10_000)
    with pytest.raises(DataError, match=r'lines.json:1: an object holds the key "prompt" twice'):
        read("lines.json")


def test_a_zst_file_that_is_cut_off_is_one_message(in_tmp):
    with pa.output_stream("rows.jsonl.zst") as file:
        file.write(b"".join(codecs.encode(json.dumps({"n": number}) + "\n") for number in range(9999)))
    whole = Path("rows.jsonl.zst").read_bytes()
    Path("rows.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"rows.jsonl.zst: the compressed file is damaged or cut off"):
        read("rows.jsonl.zst")
