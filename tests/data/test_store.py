"""Rounds on disk."""

import json
import re

import pytest

from lit_align.cli import main
from lit_align.console import console
from lit_align.data.formats.read import read_rows
from lit_align.data.rounds.store import RoundStore
from lit_align.errors import UserError


def test_rows_come_back_as_they_were_whatever_their_text(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a\x00b"}], "ids": [[1, 2], [3]], "logps": [-1.5, -2.25]},
        {"prompt": [{"role": "user", "content": "שלום 👩‍👩‍👧"}], "ids": [[], [3]], "logps": [0.1 + 0.2, -0.0]},
    ]
    made = RoundStore(tmp_path, 0, {"seed": 1})
    assert made.read("samples", 0) is None
    made.write("samples", 0, rows)
    assert made.read("samples", 0) == rows
    assert made.read("samples", 1) is None
    assert made.read("scores", 0) is None


def test_the_same_key_finds_the_same_folder_and_another_key_another(tmp_path):
    first = RoundStore(tmp_path, 2, {"seed": 1, "policy": "ab"})
    assert RoundStore(tmp_path, 2, {"policy": "ab", "seed": 1}).path == first.path
    assert RoundStore(tmp_path, 2, {"seed": 2, "policy": "ab"}).path != first.path
    assert json.loads((first.path / "round.json").read_text()) == {"seed": 1, "policy": "ab"}


def test_a_damaged_file_is_reported_set_aside_and_counts_as_missing(tmp_path, capsys):
    made = RoundStore(tmp_path, 0, {})
    made.write("samples", 0, [{"a": 1}])
    made.write("samples", 1, [{"a": 2}])
    file = made.path / "samples-00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert made.read("samples", 0) is None
    assert "cannot be read" in capsys.readouterr().out
    assert (made.path / "samples-00000.damaged").exists()
    assert made.read("samples", 1) == [{"a": 2}]


def test_a_write_that_is_cut_off_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    made = RoundStore(tmp_path, 0, {})

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_align.data.rounds.store.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        made.write("samples", 0, [{"a": 1}])
    assert made.read("samples", 0) is None


def test_whatever_byte_is_damaged_the_rows_are_as_written_or_the_file_is_set_aside(tmp_path):
    rows = [
        {"source": f"p:{n}", "responses": ["a b", "ü"], "ids": [[1, 2], [n]], "logps": [-1.5, 0.1]} for n in range(3)
    ]
    made = RoundStore(tmp_path, 0, {})
    made.write("samples", 0, rows)
    file = made.path / "samples-00000.parquet"
    whole = file.read_bytes()
    set_aside = 0
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        read = made.read("samples", 0)
        assert read in (None, rows), place
        set_aside += read is None
    assert set_aside > 100


def stored(folder, scores=(("vader", [[0.5, 2.0], [1.0, -1.0]]),), index=0):
    """A round of one batch with two prompts, under each of several scorers."""
    made = RoundStore(folder, index, {"index": index})
    prompts = [[{"role": "user", "content": text}] for text in ("Once upon", "Hi")]
    responses = [[" a time", " a\x1b[31m hill\nred"], ["Hello", "Go away"]]
    samples = [
        {"source": f"p.jsonl:{n}", "prompt": prompt, "responses": drawn, "finished": [True, False]}
        for n, (prompt, drawn) in enumerate(zip(prompts, responses, strict=True))
    ]
    made.write("samples", 0, samples)
    for name, values in scores:
        rows = [{"source": f"p.jsonl:{n}", "scores": v, "scorer": name} for n, v in enumerate(values)]
        made.write(f"scores-{name}", 0, rows)
    return made


def test_a_round_is_a_data_set_of_ranked_responses(tmp_path):
    made = stored(tmp_path)
    for folder in (made.path, tmp_path):
        rows = read_rows(folder, kind="preferences")
        assert rows.format == "ranked responses with rewards"
        assert [row.responses for row in rows] == [(" a\x1b[31m hill\nred", " a time"), ("Hello", "Go away")]
        assert [row.rewards for row in rows] == [(2.0, 0.5), (1.0, -1.0)]
        assert rows[0].source == f"{made.path.name}/p.jsonl:0"


def test_of_several_scorers_one_is_named(tmp_path):
    stored(tmp_path, [("vader", [[0.0, 1.0]] * 2), ("judge@1", [[1.0, 0.0]] * 2)])
    with pytest.raises(UserError, match=r"has several scorers: name one by a part of its name .*: judge@1; vader"):
        read_rows(tmp_path, kind="preferences")
    assert read_rows(tmp_path, split="judge", kind="preferences")[0].responses[0] == " a time"
    with pytest.raises(UserError, match="no scorer 'bert'"):
        read_rows(tmp_path, split="bert", kind="preferences")


def test_the_best_and_the_worst_responses_are_shown_within_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    stored(tmp_path / "rounds")
    stored(tmp_path / "rounds", index=1)
    main(["rounds", "show", str(tmp_path)])
    said = capsys.readouterr().out
    assert "0.625" in said
    main(["rounds", "show", str(tmp_path), "--round", "2", "--rows=1"])
    said = capsys.readouterr().out
    assert "round 2 · 2 prompts · 4 responses · mean reward 0.625" in said
    assert "+1.000 Hello" in said
    assert "-1.000 Go away" in said
    assert "time" not in said
    main(["rounds", "show", str(tmp_path), "--round=1"])
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if "│" in line or "┃" in line]
    assert table
    assert max(map(len, table)) <= 80
    assert "a�[31m hill⏎red" in said.replace("\n", "")
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--round=9"], "--round=9: .* has the rounds 1"),
        (["--rows=0"], "--rows=0 must be at least 1"),
        (["--round=x"], "rounds: argument --round: invalid int"),
    ],
)
def test_what_cannot_be_shown_is_one_paragraph(tmp_path, capsys, args, words):
    stored(tmp_path)
    with pytest.raises(SystemExit):
        main(["rounds", "show", str(tmp_path), *args])
    assert re.search(words, capsys.readouterr().err)


def test_a_damaged_part_is_left_out_of_what_is_read_and_named(tmp_path, capsys):
    made = stored(tmp_path)
    made.write("samples", 1, [{"source": "x", "prompt": "p", "responses": ["a", "b"], "finished": [True, True]}])
    made.write("scores-vader", 1, [{"source": "x", "scores": [1.0, 0.0], "scorer": "vader"}])
    (made.path / "samples-00001.parquet").write_bytes(b"PAR1")
    assert len(read_rows(tmp_path, kind="preferences")) == 2
    assert "samples-00001.parquet cannot be read" in capsys.readouterr().out
