"""`lit-align rounds show`."""

import re
import shutil

import pytest
from stored_rounds import stored

from lit_align.cli import main
from lit_align.console import console
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.rounds.store import RoundStore


def test_best_and_worst_responses_fit_80_columns(tmp_path, capsys, monkeypatch):
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
        (["--round=9"], "--round=9 must be one of the rounds in .*: 1"),
        (["--rows=0"], "--rows=0 must be at least 1"),
        (["--round=x"], "rounds: argument --round: invalid int"),
    ],
)
def test_a_wrong_option_is_one_paragraph(tmp_path, capsys, args, words):
    stored(tmp_path)
    with pytest.raises(SystemExit):
        main(["rounds", "show", str(tmp_path), *args])
    assert re.search(words, capsys.readouterr().err)


def test_only_the_samples_that_are_shown_are_read(tmp_path, capsys):
    stored(tmp_path)
    (folder,) = tmp_path.glob("round_*")
    made = RoundStore(tmp_path, 0, {"index": 0})
    made.samples.write(1, [SampleRow("p.jsonl:3", "Far", [1], ["near", "far"], [[1], [2]], [True, False], None)])
    made.scores("vader").write(1, [ScoreRow("p.jsonl:3", "vader", [9.0, -9.0])])
    (folder / "samples-00000.parquet").write_bytes(b"damaged")
    main(["rounds", "show", str(tmp_path), "--rows=1"])
    said = capsys.readouterr().out
    assert "+9.000 near" in said
    assert "cannot be read" not in said
    main(["rounds", "show", str(tmp_path)])
    assert "cannot be read" in capsys.readouterr().out


def test_a_round_is_found_from_within_and_not_under_another_name(tmp_path, capsys, monkeypatch):
    made = stored(tmp_path / "rounds")
    for name in ("copy", f"rounds/{made.path.name} (copy)", "rounds/round_old-one"):
        shutil.copytree(made.path, tmp_path / name)
    main(["rounds", "show", str(tmp_path)])
    monkeypatch.chdir(made.path)
    main(["rounds", "show", "."])
    assert capsys.readouterr().out.count("round 1 · 2 prompts") == 2
    with pytest.raises(SystemExit):
        main(["rounds", "show", str(tmp_path / "copy")])
    assert "copy: a round's folder must keep its name" in capsys.readouterr().err


def test_numbers_on_a_narrow_terminal_are_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 40)
    stored(tmp_path)
    stored(tmp_path, index=1)
    main(["rounds", "show", str(tmp_path)])
    assert "…" not in capsys.readouterr().out
