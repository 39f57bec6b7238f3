"""`lit-align cache`."""

import json
from pathlib import Path

import pytest

from lit_align.cli.commands import cache as command
from lit_align.data.cache import Entry, Report, TokenCache, default_folder
from lit_align.errors import UserError


@pytest.fixture
def entries(in_tmp, monkeypatch) -> list[Entry]:
    """A cache with two entries."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", "cache")
    cache = TokenCache(default_folder())
    for name, size in {"data/a.jsonl": 1_500_000, "org/b": 7_000}.items():
        cache.load_or_make(name, {}, {}, lambda folder, report, size=size: (folder / "x").write_bytes(bytes(size)))
    return cache.entries()


def test_entries_are_listed_with_their_source_and_size(entries, capsys):
    command.run([])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [entries[0].path.name, "data/a.jsonl", "1.5", "MB"]
    assert second.split() == [entries[1].path.name, "org/b", "7", "kB"]


@pytest.mark.parametrize("named", ["its name", "its source"])
def test_one_entry_is_cleared(entries, named, capsys):
    command.run(["clear", entries[0].path.name if named == "its name" else "data/a.jsonl"])
    assert capsys.readouterr().out == "1 of 2 entries deleted, 1.5 MB.\n"
    assert TokenCache(default_folder()).entries() == entries[1:]


def test_all_entries_are_cleared(entries, capsys):
    command.run(["clear"])
    command.run(["--folder", "cache"])
    assert capsys.readouterr().out == "2 of 2 entries deleted, 1.5 MB.\ncache is empty.\n"


def test_an_unknown_entry_is_named(entries):
    with pytest.raises(UserError, match=r"cache has no entry 'c'. Its entries are: a.jsonl-"):
        command.run(["clear", "c"])


def test_what_is_not_an_entry_stays(entries):
    Path("cache/other").mkdir()
    Path("cache/other/entry.json").write_text(json.dumps({"made": "by another program"}))
    command.run(["clear"])
    assert Path("cache/other/entry.json").exists()


def test_an_entry_that_is_named_twice_counts_once(entries, capsys):
    command.run(["clear", "org/b", entries[1].path.name])
    assert capsys.readouterr().out == "1 of 2 entries deleted, 7 kB.\n"


def test_a_long_name_is_listed_whole(in_tmp, capsys):
    name = "a" * 55
    TokenCache(Path("cache")).load_or_make(f"{'folder/' * 20}{name}", {}, {}, lambda folder, report: None)
    command.run(["--folder", "cache"])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert shown.count("a") >= 2 * 55


@pytest.mark.parametrize("damage", ["a file is cut", "no description", "half a description", "killed while made"])
def test_a_damaged_entry_is_listed_and_cleared(entries, damage, capsys):
    place = entries[0].path
    if damage == "a file is cut":
        (place / "x").write_bytes(bytes(1000))
    elif damage == "half a description":
        (place / "entry.json").write_text('{"source')
    else:
        (place / "entry.json").unlink()
    if damage == "killed while made":
        place.rename(place.with_name(f".{place.name}.part"))
    command.run([])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == place.name
    assert first.split()[-1] == "damaged"
    assert "damaged" not in second
    command.run(["clear", place.name])
    assert capsys.readouterr().out.startswith("1 of 2 entries deleted, ")
    assert [*Path("cache").rglob("x")] == [entries[1].path / "x"]
    assert TokenCache(default_folder()).entries() == entries[1:]


def test_an_entry_that_is_being_made_is_neither_listed_nor_cleared(in_tmp):
    cache = TokenCache(Path("cache"))

    def make(folder: Path, report: Report) -> None:
        command.run(["clear", "--folder", "cache"])
        assert folder.exists()

    cache.load_or_make("a", {}, {}, make)
    assert len(cache.entries()) == 1
