"""`python train.py fit` in several processes, as a user would type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import write_pairs, write_prompts

from lit_align.reporting.metrics_csv import read_metrics

ROOT = Path(__file__).parents[1]
OFFLINE = ["--config=configs/tr_dpo.yaml", "--data.train={folder}/pairs.jsonl", "--data.batch_size=2"]
ON_POLICY = [
    "--config=configs/pr_dpo.yaml",
    "--config=configs/overlays/tr_soft.yaml",
    "--data.prompts={folder}/prompts.jsonl",
    "--data.scorer.function={folder}/rewards.py:reward",
    "--data.prompts_per_round=8",
    "--data.batch_size=2",
    "--data.sampling.stop=[]",
    "--data.sampling.max_new_tokens=8",
    "--win_rate.prompts={folder}/prompts.jsonl",
    "--win_rate.scorer.class_path=FunctionScorer",
    "--win_rate.scorer.function={folder}/rewards.py:reward",
    "--win_rate.responses_per_prompt=1",
    "--trainer.max_epochs=2",
]


@pytest.mark.parametrize("overlay", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize(
    "data", [pytest.param(OFFLINE, id="offline", marks=pytest.mark.slow), pytest.param(ON_POLICY, id="on-policy")]
)
def test_the_command_line_trains_in_two_processes(tiny_model, tmp_path, data, overlay):
    write_pairs(tmp_path, 16)
    write_prompts(tmp_path)
    run = tmp_path / "run"
    command = [sys.executable, "train.py", "fit", *(option.format(folder=tmp_path) for option in data)]
    command += [f"--config=configs/overlays/{overlay}.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    command += [
        f"--model.policy.path={tiny_model}",
        f"--trainer.default_root_dir={run}",
        "--trainer.log_every_n_steps=1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert not {"LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & environment.keys(), (
        "it has to start its own processes"
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(run / "metrics.csv")
    refreshes = [row["reference/refreshes"] for row in rows if "reference/refreshes" in row]
    assert refreshes == list(range(1, 5)) if data is OFFLINE else len(refreshes) >= 2
    weights = load_file(run / "model" / "model.safetensors")
    assert weights
    start = load_file(Path(tiny_model) / "model.safetensors")
    assert {name: tuple(w.shape) for name, w in weights.items()} == {n: tuple(w.shape) for n, w in start.items()}
    assert any((weights[name] - start[name]).abs().max() > 0 for name in weights)
    if data is ON_POLICY:
        assert 0 <= json.loads((run / "summary.json").read_text())["scorers"]["training"]["win_rate"] <= 1
        assert done.stdout.count("round 1 of 2") == 1, "the first process speaks for all"
