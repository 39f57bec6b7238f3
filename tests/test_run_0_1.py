"""Files of version 0.1 are a promise: its checkpoint, run folder and config.yaml work in this version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align.cli import main
from lit_align.export import load_policy
from lit_align.reporting.metrics_csv import read_metrics
from lit_align.reporting.run_folder import Run

FIXTURE = Path(__file__).parent / "fixtures" / "run_0_1"
CHECKPOINT = "run/checkpoints/step=2.ckpt"


@pytest.fixture
def in_run(in_tmp: Path) -> Path:
    """Work in a copy of the fixture."""
    shutil.copytree(FIXTURE, in_tmp, dirs_exist_ok=True)
    return in_tmp


def test_the_fixture_is_small_and_names_no_folder_of_its_maker():
    files = [path for path in FIXTURE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        assert not [word for word in (b"/tmp/", b"/home/", b"/work/") if word in path.read_bytes()], path


def test_its_checkpoint_loads_with_its_weights(in_run):
    policy, _ = load_policy(Path(CHECKPOINT))
    saved = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    trained = policy.model.get_input_embeddings().weight
    assert any(weight.shape == trained.shape and torch.equal(weight, trained) for weight in saved.values())
    start = AutoModelForCausalLM.from_pretrained("model").get_input_embeddings().weight
    assert not torch.equal(trained, start)


def test_its_run_resumes_and_is_reported_and_exported(in_run, capsys):
    before = read_metrics("run/metrics.csv")
    main(["fit", "--config=run/config.yaml", f"--ckpt_path={CHECKPOINT}"])
    printed = capsys.readouterr().out
    assert "round 2 of 2" in printed
    assert "round 1 of 2" not in printed
    after = read_metrics("run/metrics.csv")
    assert {row["step"] for row in after} == {row["step"] for row in before}
    record = json.loads(Path("run/run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 2]

    main(["report", "run"])
    page = Path("run/report.html").read_text()
    assert "resumed at step 2" in page
    assert "4 optimizer steps in 2 rounds" in page
    main(["export", "run", "--out", "exported"])
    AutoModelForCausalLM.from_pretrained("exported")
    assert "judge: rewards.py:reward@" in Path("exported/README.md").read_text()


def test_its_folder_is_read_as_it_is(in_run, capsys):
    run = Run(Path("run"), "run")
    assert list(run.scorers) == ["training", "judge"]
    assert [*run.validations] == [2, 4]
    assert len(run.held_out) == 8
    main(["report", "run"])
    assert "Verdict on held-out prompts" in Path("run/report.html").read_text()
    main(["rounds", "show", "run"])
    printed = capsys.readouterr().out
    assert "round_000" in printed
    assert "round_001" in printed
