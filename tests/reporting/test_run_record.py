"""run.json: the header and the starts of a run."""

import sys

import pytest

from lit_align.errors import UserError
from lit_align.reporting.run_record import RunRecord, RunStart, record_start


def test_a_resumed_run_adds_its_start_and_a_fresh_one_begins_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "a b.yaml"])
    counted = [
        record_start(tmp_path, [("objective", "DPO")], RunStart.now(step), resumes)
        for step, resumes in ((0, False), (4, True))
    ]
    assert counted == [1, 2]
    record = RunRecord.read(tmp_path)
    assert record is not None
    assert record.header == [("objective", "DPO")]
    assert [start.step for start in record.starts] == [0, 4]
    assert record.starts[0].command == "python train.py fit --config 'a b.yaml'"
    assert record_start(tmp_path, [], RunStart.now(0), resumes=False) == 1
    again = RunRecord.read(tmp_path)
    assert again is not None
    assert len(again.starts) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "header": 3, "starts": []}'])
def test_a_damaged_record_is_one_message(tmp_path, text):
    assert RunRecord.read(tmp_path) is None
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: this version of lit_align cannot read it"):
        RunRecord.read(tmp_path)
