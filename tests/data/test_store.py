"""Rounds on disk."""

import json

import pytest

from lit_align.data.store import Round


def test_rows_come_back_as_they_were_whatever_their_text(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a\x00b"}], "ids": [[1, 2], [3]], "logps": [-1.5, -2.25]},
        {"prompt": [{"role": "user", "content": "שלום 👩‍👩‍👧"}], "ids": [[], [3]], "logps": [0.1 + 0.2, -0.0]},
    ]
    made = Round(tmp_path, 0, {"seed": 1})
    assert made.read("samples", 0) is None
    made.write("samples", 0, rows)
    assert made.read("samples", 0) == rows
    assert made.read("samples", 1) is None
    assert made.read("scores", 0) is None


def test_the_same_key_finds_the_same_folder_and_another_key_another(tmp_path):
    first = Round(tmp_path, 2, {"seed": 1, "policy": "ab"})
    assert Round(tmp_path, 2, {"policy": "ab", "seed": 1}).path == first.path
    assert Round(tmp_path, 2, {"seed": 2, "policy": "ab"}).path != first.path
    assert json.loads((first.path / "round.json").read_text()) == {"seed": 1, "policy": "ab"}


def test_a_damaged_file_is_reported_set_aside_and_counts_as_missing(tmp_path, capsys):
    made = Round(tmp_path, 0, {})
    made.write("samples", 0, [{"a": 1}])
    made.write("samples", 1, [{"a": 2}])
    file = made.path / "samples-00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert made.read("samples", 0) is None
    assert "cannot be read" in capsys.readouterr().out
    assert (made.path / "samples-00000.damaged").exists()
    assert made.read("samples", 1) == [{"a": 2}]


def test_a_write_that_is_cut_off_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    made = Round(tmp_path, 0, {})

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_align.data.store.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        made.write("samples", 0, [{"a": 1}])
    assert made.read("samples", 0) is None
