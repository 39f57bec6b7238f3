"""The quickstart as shipped but small: the real model, texts and judge, through the command line."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_align.cli import main
from lit_align.evaluation.summary import Summary

ROOT = Path(__file__).parent.parent
PREPARED = ROOT / "data" / "quickstart"


@pytest.mark.skipif(not (PREPARED / "judge").exists(), reason="`make install` prepares data/quickstart")
def test_the_quickstart_runs_and_reports_its_results(tmp_path, monkeypatch, capsys, blank_figures):
    monkeypatch.chdir(ROOT)
    prompts = (PREPARED / "test.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(prompts[:2]))
    main(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--trainer.max_epochs=1",
            "--data.prompts_per_round=4",
            "--data.batch_size=2",
            "--data.sampling.max_new_tokens=6",
            f"--win_rate.prompts={tmp_path / 'few.jsonl'}",
            f"--win_rate.validation={tmp_path / 'few.jsonl'}",
        ]
    )
    summary = Summary.read(tmp_path / "run")
    assert summary is not None
    assert list(summary.scorers) == ["training", "judge"]
    assert (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.model_type == "llama"
    said = capsys.readouterr().out
    assert "step-0 check" in said
    assert "Against the start, on 2 held-out prompts" in said
    assert "--trainer.max_epochs=2\n" in said, "the command that extends the run"


@pytest.mark.skipif(not PREPARED.exists(), reason="`make install` prepares data/quickstart")
def test_no_prompt_is_in_two_splits():
    splits = [set((PREPARED / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [1024, 64, 128]
    assert len(set.union(*splits)) == 1216
