"""held_out/*.parquet: one schema, whatever the run has."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_align.errors import UserError
from lit_align.evaluation.rows import SCHEMA, HeldOutRow, ScoredRow, read_held_out, write_held_out


def row(**changes) -> HeldOutRow:
    values = {
        "source": "prompts.jsonl:1",
        "prompt": "Say",
        "prompt_ids": [1, 2],
        "responses": ["a", ""],
        "responses_start": ["b", "c"],
        "response_ids": [[3, 4], [0]],
        "response_ids_start": [[5], [6]],
        "finished": [False, True],
        "finished_start": [True, True],
        "logps": [-1.0, -2.0],
        "logps_start": [-1.5, -2.5],
        "scorers": [ScoredRow("training", "reward@1", [1.0, 2.0], [0.0, 3.0], 0.5)],
    }
    return HeldOutRow(**(values | changes))


def test_rows_are_read_as_they_were_written(tmp_path):
    own = row(response_data="d", scorers=[ScoredRow("judge", "j", [1.0], [2.0], 0.0, reward_data=3.0)])
    for name, rows in {"plain": [row()], "own": [own]}.items():
        write_held_out(tmp_path / "held_out" / f"{name}.parquet", rows)
        assert read_held_out(tmp_path / "held_out" / f"{name}.parquet") == rows
        assert pq.read_schema(tmp_path / "held_out" / f"{name}.parquet").equals(SCHEMA)
    assert row().lengths == [2, 1]
    assert row().scored_by("judge") is None


def test_files_that_are_not_held_out_rows_are_refused(tmp_path):
    assert read_held_out(tmp_path / "none.parquet") == []
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name in ("other", "torn"):
        with pytest.raises(UserError, match=rf"{name}\.parquet: this version of lit_align cannot read it"):
            read_held_out(tmp_path / f"{name}.parquet")
