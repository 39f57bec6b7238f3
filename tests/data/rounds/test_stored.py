"""The numbers of stored rounds are kept: a store of any size answers at once, and never with old numbers."""

import pytest

from lit_align.data.formats.identity import identity_of
from lit_align.data.formats.read import read_rows
from lit_align.data.rounds import stored as code
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.rounds.store import RoundStore
from lit_align.data.rounds.stored import StoredRound, read_rounds
from lit_align.errors import UserError


def write(folder, rewards=(1.0, 2.0), batches=3, scorer="s"):
    made = RoundStore(folder, 0, {})
    for number in range(batches):
        row = SampleRow(f"p:{number}", f"p{number}", [1], ["a", "b"], [[1], [2]], [True, False], None)
        made.samples.write(number, [row])
        made.scores(scorer).write(number, [ScoreRow(row.source, scorer, [number + each for each in rewards])])
    return made


def only(folder, scorer: str | None = None) -> StoredRound:
    (stored,) = read_rounds(folder, scorer)
    return stored


def test_a_second_look_reads_no_file_of_a_batch(tmp_path, monkeypatch):
    write(tmp_path)
    first = only(tmp_path)
    for name in ("_read_or_report", "_finished"):
        monkeypatch.setattr(code, name, lambda *args: pytest.fail("a file is read again"))
    again = only(tmp_path)
    for name in ("batch", "rewards", "finished"):
        assert (getattr(again.numbers, name) == getattr(first.numbers, name)).all(), name
    assert (again.numbers.scorer, again.numbers.rewards.tolist()) == ("s", [[1, 2], [2, 3], [3, 4]])


@pytest.mark.parametrize("change", ["another batch", "another scorer", "a cut file"])
def test_numbers_of_changed_files_are_read_again(tmp_path, capsys, change):
    made = write(tmp_path)
    assert len(only(tmp_path).numbers.rewards) == 3
    if change == "another batch":
        write(tmp_path, batches=4)
        assert len(only(tmp_path).numbers.rewards) == 4
    elif change == "another scorer":
        write(tmp_path, rewards=(5.0, 4.0), scorer="t")
        assert only(tmp_path, "t").numbers.rewards[0].tolist() == [5, 4]
    else:
        file = made.scores("s").file(1)
        file.write_bytes(file.read_bytes()[:-9])
        for _ in range(2):
            assert only(tmp_path).numbers.rewards.tolist() == [[1, 2], [3, 4]]
            assert "it is left out" in capsys.readouterr().out


def test_responses_that_were_cut_are_known_in_rounds_read_as_data(tmp_path):
    write(tmp_path)
    rows = read_rows(tmp_path, kind="preferences")
    assert [(row.responses, row.rewards, row.cut) for row in rows][:1] == [(("b", "a"), (2.0, 1.0), (True, False))]
    assert rows.skipped == {"responses cut when they were sampled, to which no end is added": 3}
    assert [row.cut for row in read_rows(tmp_path, kind="texts")] == [(True,)] * 3
    assert [row.cut for row in read_rows(tmp_path, kind="prompts")] == [None] * 3


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path, monkeypatch):
    def refuse(path, write):
        raise UserError(f"{path} cannot be written")

    write(tmp_path)
    monkeypatch.setattr("lit_align.data.rounds.numbers.write_whole", refuse)
    assert len(only(tmp_path).numbers.rewards) == 3
    assert not list(tmp_path.glob("*/.numbers*"))


def test_a_look_at_rounds_does_not_change_their_identity(tmp_path):
    write(tmp_path)
    before = identity_of(str(tmp_path), None)
    only(tmp_path)
    assert list(tmp_path.glob("*/.numbers*"))
    assert identity_of(str(tmp_path), None) == before
    write(tmp_path, batches=4)
    assert identity_of(str(tmp_path), None) != before
