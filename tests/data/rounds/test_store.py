"""Rounds on disk: written whole, read as they were, never another batch's rows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_rounds import stored

from lit_align.data.formats.read import read_rows
from lit_align.data.rounds.row_types import LogpsRow, SampledTexts, SampleRow, ScoreRow
from lit_align.data.rounds.store import RoundStore, checksum
from lit_align.data.rounds.stored import find_rounds, read_rounds
from lit_align.errors import UserError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "rounds_80641ec"

SAMPLE = SampleRow("p:1", "Hi", [1, 2], ["a b", "ü"], [[1, 2], [3]], [True, False], [-1.5, 0.1 + 0.2])
CHAT = [{"role": "user", "content": "a\x00b"}, {"role": "assistant", "content": "שלום 👩‍👩‍👧", "thinking": "hm"}]
ROWS = {
    "plain": [SAMPLE, replace(SAMPLE, source="p:2", response_ids=[[], [3]], responses=["", "x"])],
    "chats": [replace(SAMPLE, prompt=CHAT), replace(SAMPLE, prompt=CHAT[:1])],
    "beside": [replace(SAMPLE, prompt=CHAT, beside={"tools": [{"name": "é"}]}), SAMPLE],
    "unrecorded": [replace(SAMPLE, sampler_logps=None)],
    "scores": [ScoreRow("p:1", "s@1", [1.0, -0.0])],
    "parts": [ScoreRow("p:1", "s@1", [1.5, 2.0], parts={"wit": [1.0, 2.0], "grace": [2.0, 2.0]})],
    "preferences": [ScoreRow("p:1", "s@1", [0.9, 0.1], preferences=[[0.5, 0.9], [0.1, 0.5]])],
    "logps": [LogpsRow("p:1", [-1.5, -2.25]), LogpsRow("p:2", [0.1 + 0.2])],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_as_they_were_written(tmp_path, name):
    rows = ROWS[name]
    store = RoundStore(tmp_path, 0, {"seed": 1})
    parts = {SampleRow: store.samples, ScoreRow: store.scores("s@1"), LogpsRow: store.logps("reference", lambda: "r")}
    part = parts[type(rows[0])]
    assert part.read(0) is None
    part.write(0, rows)
    assert part.read(0) == rows
    assert part.read(1) is None


def test_the_schema_of_a_part_does_not_depend_on_its_rows():
    tables = [SampleRow.to_arrow(ROWS[name]) for name in ("plain", "chats", "unrecorded")]
    assert tables[0].schema == tables[1].schema == tables[2].schema


def test_equal_keys_share_a_folder_and_different_keys_do_not(tmp_path):
    first = RoundStore(tmp_path, 2, {"seed": 1, "policy": "ab"})
    assert RoundStore(tmp_path, 2, {"policy": "ab", "seed": 1}).path == first.path
    assert RoundStore(tmp_path, 2, {"seed": 2, "policy": "ab"}).path != first.path
    assert json.loads((first.path / "round.json").read_text()) == {"seed": 1, "policy": "ab"}


def test_what_determines_logps_is_read_once_if_it_has_a_shorter_name(tmp_path):
    store = RoundStore(tmp_path, 0, {})
    name = store.logps("reference", lambda: ["tok", "ens"]).name
    assert store.logps("reference", lambda: "tokens", "digest").name == name
    assert store.logps("reference", lambda: pytest.fail("read again"), "digest").name == name
    assert store.logps("reference", lambda: "others", "another digest").name != name


# --- damage ---


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def make_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def copy_another_batch(file: Path) -> None:
    shutil.copy(file.with_name("samples-00001.parquet"), file)


def copy_another_round(file: Path) -> None:
    other = RoundStore(file.parent.parent, 0, {"another": "round"}).samples
    other.write(0, [SAMPLE])
    shutil.copy(other.file(0), file)


def remove_the_checksum(file: Path) -> None:
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)


def change_a_row(file: Path) -> None:
    table = pq.read_table(file)
    rows = [row | {"source": "q:1"} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def turn_text_into_binary(file: Path) -> None:
    table = pq.read_table(file)
    column = table.column("source").cast(pa.binary())
    table = table.set_column(0, "source", column)
    pq.write_table(table, file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, ""),
        (make_a_folder, "it is not a file"),
        (copy_another_batch, "it belongs to .*/samples-00001"),
        (copy_another_round, "it belongs to .*/samples-00000"),
        (remove_the_checksum, "it has no checksum"),
        (change_a_row, "its rows do not match their checksum"),
        (turn_text_into_binary, "do not match their checksum"),
    ],
)
def test_a_damaged_or_misplaced_file_is_reported_and_set_aside(tmp_path, capsys, damage, reason):
    samples = RoundStore(tmp_path, 0, {}).samples
    samples.write(0, [SAMPLE])
    samples.write(1, [replace(SAMPLE, source="p:2")])
    damage(samples.file(0))
    assert samples.read(0) is None
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"samples-00000.parquet cannot be read \(.*{reason}", said)
    assert samples.file(0).with_suffix(".damaged").exists()
    assert samples.read(1) == [replace(SAMPLE, source="p:2")]
    samples.write(0, [SAMPLE])
    assert samples.read(0) == [SAMPLE]


def test_an_interrupted_write_leaves_nothing_to_read(tmp_path, monkeypatch):
    samples = RoundStore(tmp_path, 0, {}).samples

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_align.data.rounds.store.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        samples.write(0, [SAMPLE])
    assert samples.read(0) is None


def test_a_flipped_bit_changes_no_row_unnoticed(tmp_path):
    rows = [replace(SAMPLE, source=f"p:{n}", response_ids=[[1, 2], [n]]) for n in range(3)]
    samples = RoundStore(tmp_path, 0, {}).samples
    samples.write(0, rows)
    file = samples.file(0)
    whole = file.read_bytes()
    set_aside = 0
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        read = samples.read(0)
        assert read in (None, rows), place
        set_aside += read is None
    assert set_aside > 100


@pytest.mark.parametrize("name", ["plain", "chats", "beside", "unrecorded"])
def test_texts_are_read_without_tokens(name):
    table = SampleRow.to_arrow(ROWS[name])
    texts = [(row.source, row.prompt, row.responses, row.finished, row.beside) for row in ROWS[name]]
    assert SampledTexts.from_arrow(table) == texts
    assert SampledTexts.from_arrow(table.drop_columns(["prompt_ids", "response_ids"]))


@pytest.mark.parametrize("name", ROWS)
def test_a_checksum_is_of_the_values_alone(name):
    """Chunks and buffers of a table may be laid out in several ways; another value gives another checksum."""
    table = type(ROWS[name][0]).to_arrow([*ROWS[name]] * 3)
    chunked = pa.concat_tables([table[:1], table[1:]])
    assert checksum(chunked) == checksum(table) != checksum(table[1:])
    renamed = table.rename_columns([f"{column}_" for column in table.column_names])
    assert checksum(renamed) != checksum(table)


def test_equal_values_at_other_places_have_another_checksum():
    tokens = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3], []], [[1, 2], [4]]]
    tables = [SampleRow.to_arrow([replace(SAMPLE, response_ids=ids)]) for ids in tokens]
    texts = [("a", "b"), ("ab", ""), ("", "ab")]
    tables += [SampleRow.to_arrow([replace(SAMPLE, responses=list(pair))]) for pair in texts]
    tables += [SampleRow.to_arrow([replace(SAMPLE, sampler_logps=logps)]) for logps in (None, [], [0.0], [-0.0])]
    assert len({checksum(table) for table in tables}) == len(tables)


# --- rounds of earlier versions ---


@pytest.mark.parametrize("digit", ["0", "1"])
def test_a_checksum_with_texts_as_json_is_read(tmp_path, digit):
    samples = RoundStore(tmp_path, 0, {}).samples
    samples.write(0, [SAMPLE])
    table = pq.read_table(samples.file(0))
    found = f"{digit}8415bd93bd46f1e7568ea6baae132bae38a11d30c5181ea2d57b75a58e5b608"
    place = table.schema.metadata[b"lit_align.place"]
    metadata = {b"lit_align.sha256_of_buffers": found.encode(), b"lit_align.place": place}
    pq.write_table(table.replace_schema_metadata(metadata), samples.file(0))
    assert samples.read(0) == ([SAMPLE] if digit == "0" else None)


def test_a_round_of_an_earlier_version_is_read(tmp_path):
    """Its rows, against the tables as pyarrow reads them."""
    shutil.copytree(FIXTURE, tmp_path / "rounds")
    (path,) = find_rounds(tmp_path)
    store = RoundStore(tmp_path / "rounds", 0, json.loads((path / "round.json").read_text()))
    assert store.path == path, "a resumed run finds it"

    def tables(pattern: str) -> list[dict]:
        return [row for file in sorted(path.glob(pattern)) for row in pq.read_table(file).to_pylist()]

    samples = [row for batch in (0, 1) for row in store.samples.read(batch) or []]
    assert [vars(row) for row in samples] == [{**row, "beside": None} for row in tables("samples-*")]
    old = tables("scores-*")
    scores = [row for batch in (0, 1) for row in store.scores(old[0]["scorer"]).read(batch) or []]
    assert [vars(row) | {"preferences": None} for row in scores] == [row | {"preferences": None} for row in old]
    assert scores[0].parts
    assert {"first", "second", "disagreement"} == set(scores[0].parts)
    logps = LogpsRow.from_arrow(pq.read_table(path / "reference-1c866465-00000.parquet"))
    assert [row.logps for row in logps] == [row["reference_logps"] for row in tables("reference-*")]
    (stored,) = read_rounds(tmp_path)
    texts = [(sample.source, sample.prompt, sample.responses, sample.finished, None) for sample in samples]
    assert list(stored.rows()) == [(each, scored.scores) for each, scored in zip(texts, scores, strict=True)]
    assert [row.rewards for row in read_rows(tmp_path, kind="preferences")]


# --- rounds as data ---


def test_a_round_is_a_data_set_of_ranked_responses(tmp_path):
    made = stored(tmp_path)
    for folder in (made.path, tmp_path):
        rows = read_rows(folder, kind="preferences")
        assert rows.format == "ranked responses with rewards"
        assert [row.responses for row in rows] == [(" a\x1b[31m hill\nred", " a time"), ("Hello", "Go away")]
        assert [row.rewards for row in rows] == [(2.0, 0.5), (1.0, -1.0)]
        assert rows[0].source == f"{made.path.name}/p.jsonl:0"


def test_several_scorers_need_one_to_be_named(tmp_path):
    stored(tmp_path, [("vader", [[0.0, 1.0]] * 2), ("judge@1", [[1.0, 0.0]] * 2)])
    with pytest.raises(UserError, match=r"has several scorers. Name one by a part of its name .*: judge@1; vader"):
        read_rows(tmp_path, kind="preferences")
    assert read_rows(tmp_path, split="judge", kind="preferences")[0].responses[0] == " a time"
    with pytest.raises(UserError, match="no scorer 'bert'"):
        read_rows(tmp_path, split="bert", kind="preferences")


def test_a_scorer_whose_name_is_within_anothers_is_found(tmp_path):
    ensemble = "ensemble of 1 vader, 1 judge@1"
    stored(tmp_path, [("vader", [[0.0, 1.0]] * 2), (ensemble, [[1.0, 0.0]] * 2)])
    assert [each.numbers.scorer for each in read_rounds(tmp_path, "vader")] == ["vader"]
    assert [each.numbers.scorer for each in read_rounds(tmp_path, "judge")] == [ensemble]


def test_parts_of_some_batches_only_are_named(tmp_path):
    made = RoundStore(tmp_path, 0, {})
    for number, parts in enumerate(({"wit": [1.0, 2.0]}, None)):
        made.samples.write(number, [SAMPLE])
        made.scores("s").write(number, [ScoreRow("p:1", "s", [1.0, 2.0], parts)])
    with pytest.raises(UserError, match=r"scorer s gave parts\['wit'\] for 1 of 2 sampling batches"):
        read_rounds(tmp_path)


def test_the_name_of_a_file_that_is_not_utf8_is_stored(tmp_path):
    made = RoundStore(tmp_path, 0, {})
    made.samples.write(0, [replace(SAMPLE, source="caf\udce9.jsonl:1")])
    assert [row.source for row in made.samples.read(0) or []] == ["caf?.jsonl:1"]


def test_a_damaged_batch_is_left_out_and_named(tmp_path, capsys):
    made = stored(tmp_path)
    made.samples.write(1, [SAMPLE])
    made.scores("vader").write(1, [ScoreRow(SAMPLE.source, "vader", [1.0, 0.0])])
    (made.path / "samples-00001.parquet").write_bytes(b"PAR1")
    assert len(read_rows(tmp_path, kind="preferences")) == 2
    assert "samples-00001.parquet cannot be read" in capsys.readouterr().out
