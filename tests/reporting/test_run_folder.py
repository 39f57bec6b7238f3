"""A run's folder whose files are cut off, empty or edited: one message that names the file."""

from pathlib import Path

import pytest

from lit_align.cli import main
from lit_align.evaluation.rows import HeldOutRow, ScoredRow, write_held_out
from lit_align.reporting.run_record import RunStart, record_start

METRICS = "step,loss\n1,0.5\n2,0.25\n"
ROW = HeldOutRow(
    "source", "prompt", [1], ["a"], ["b"], [[2]], [[3]], [True], [True], [-1.0], [-2.0],
    [ScoredRow("training", "length", [1.0], [0.0], 1.0)],
)  # fmt: skip

DAMAGED = {
    "an empty summary": ("summary.json", b""),
    "half a summary": ("summary.json", b'{"version": 3, "scorers": {"tr'),
    "a summary of a list": ("summary.json", b"[1]"),
    "a summary without its numbers": ("summary.json", b'{"version": 3}'),
    "a summary of bytes": ("summary.json", b"\xff\xfe\x00"),
    "metrics with a word": ("metrics.csv", b"step,loss\n1,zero\n"),
    "metrics with a value too many": ("metrics.csv", b"step,loss\n1,2,3\n"),
    "metrics without steps": ("metrics.csv", b"loss\n1\n"),
    "metrics of bytes": ("metrics.csv", b"step,loss\n\xff\xfe,\x00\n"),
    "no table": ("held_out/test.parquet", b""),
    "half a table": ("held_out/test.parquet", b"PAR1 and no more"),
    "a record of a list": ("run.json", b"[1]"),
    "half a record": ("run.json", b'{"version": 1, "hea'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_in_one_message(in_tmp, capsys, damage):
    name, content = DAMAGED[damage]
    Path("run/held_out").mkdir(parents=True)
    Path("run/metrics.csv").write_text(METRICS)
    Path("run", name).write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        main(["report", "run"])
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert said.startswith(f"error: run/{name}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("place", [4, 60, 400, -300, -20])
def test_a_table_with_a_flipped_byte_reads_or_is_named(in_tmp, capsys, place):
    path = Path("run/held_out/test.parquet")
    write_held_out(path, [ROW])
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    Path("run/metrics.csv").write_text(METRICS)
    try:
        main(["report", "run"])
    except SystemExit:
        assert capsys.readouterr().err.startswith("error: run/held_out/test.parquet")


def test_a_configuration_of_bytes_is_shown_as_it_is(in_tmp):
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(METRICS)
    Path("run/config.yaml").write_bytes(b"\xff\xfe<script>")
    main(["report", "run"])
    assert "\ufffd\ufffd&lt;script&gt;" in Path("run/report.html").read_text()


def test_a_run_that_was_killed_before_its_first_metric_is_reported(in_tmp):
    record_start("killed", [("objective", "DPO")], RunStart("2026-01-02 03:04 UTC", "train.py fit", 0), resumes=False)
    Path("at once").mkdir()
    Path("at once/config.yaml").write_text("# lit_align==0.2.0\n")
    for run, said in {"killed": "2026-01-02 03:04 UTC: train.py fit", "at once": "# lit_align==0.2.0"}.items():
        main(["report", run])
        page = Path(run, "report.html").read_text()
        assert said in page
        assert "nothing is recorded yet" in page
