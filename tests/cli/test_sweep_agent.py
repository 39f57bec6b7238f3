"""`wandb agent` itself runs the shipped sweeps, against a stand-in for W&B's server on this machine."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_prompts
from wandb_server import ENTITY, ENVIRONMENT, PROJECT, SWEEP, Server, Trial

from lit_align.reporting.metrics_csv import read_metrics

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv" / "bin"


def shipped(name: str, folder: Path, model: str, epochs: int | None = None) -> dict[str, Any]:
    """A sweep of configs/sweeps, over a tiny run in place of the quickstart."""
    prompts = write_prompts(folder, 8)
    scorer = {"class_path": "FunctionScorer", "init_args": {"function": f"{folder / 'rewards.py'}:reward"}}
    config = {
        "model": {"class_path": "DPO", "init_args": {"policy": {"path": model}, "schedule": "constant"}},
        "data": {
            "class_path": "OnPolicyPairs",
            "init_args": {"prompts": prompts, "scorer": scorer, "sampling": {"max_new_tokens": 4}, "batch_size": 2},
        },
        "win_rate": {"prompts": prompts, "validation": prompts, "scorer": scorer, "judges": {"judge": scorer}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / f"{name}.yaml").read_text())
    replaced = {"configs/quickstart.yaml": str(folder / "tiny.yaml"), "runs/sweep": str(folder / "runs")}
    sweep["command"] = [
        next((piece.replace(old, new) for old, new in replaced.items() if old in piece), piece)
        for piece in sweep["command"]
    ]
    if epochs is not None:
        sweep["parameters"]["trainer.max_epochs"] = {"value": epochs}
    return sweep


def run_agent(server: Server, folder: Path, during: Callable[[int], None] = lambda pid: None) -> tuple[int, str]:
    """Exit code and output of `wandb agent`; `during` is called with its process id until it has ended."""
    environment = os.environ | ENVIRONMENT | {
        "WANDB_BASE_URL": server.url,
        "WANDB_DIR": str(folder),
        "HOME": str(folder),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [str(BIN / "wandb"), "agent", f"{ENTITY}/{PROJECT}/{SWEEP}"]
    with (folder / "agent.txt").open("w") as output:
        agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            while agent.poll() is None:
                during(agent.pid)
                time.sleep(0.2)
        finally:
            agent.kill()
    server.close()
    return agent.returncode, (folder / "agent.txt").read_text()


@pytest.fixture
def long_run(tiny_model, tmp_path) -> dict[str, Any]:
    """A Bayes sweep whose trials only end when they are stopped."""
    return shipped("bayes", tmp_path, tiny_model, epochs=1000)


class StopsEarly(Server):
    """Stops a trial after two rounds of its second start, or of its only one, as a server does for hyperband."""

    def __init__(self, sweep: dict[str, Any], starts: int):
        super().__init__(sweep, 1)
        self.last_start = starts
        self.seen = 0

    def on_heartbeat(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        (trial,) = self.trials
        if running and trial.starts == self.last_start and len(trial.values("val/win_rate_judge")) >= self.seen + 2:
            return [self.command("stop", trial)]
        return super().on_heartbeat(running)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid", "random", "bayes"])
def test_an_agent_runs_two_trials_of_each_sweep(tiny_model, tmp_path, name):
    sweep = shipped(name, tmp_path, tiny_model)
    server = Server(sweep, 2)
    code, output = run_agent(server, tmp_path)
    assert code == 0, output
    assert "Traceback" not in output
    for trial in server.trials:
        assert trial.exit_codes == [0]
        metric = sweep["metric"]["name"]
        assert 0 <= trial.summary[metric] <= 1
        assert trial.summary[metric] == trial.values(metric)[-1]
        assert {"verdict/win_rate", "verdict/judge/win_rate"} <= {*trial.summary}
        for key, given in trial.args.items():
            assert followed(trial, key) == pytest.approx(given["value"])
        assert (tmp_path / "runs" / trial.id / "report.html").exists()


def followed(trial: Trial, key: str) -> Any:
    """The value of an option in the configuration that the trial sent."""
    value = trial.config["cli"]["value"]
    for step in key.replace("reference_refresh.", "reference_refresh.init_args.").split("."):
        value = value[step]
    return value


@pytest.mark.slow
def test_an_early_stop_saves_and_ends_a_trial_without_failure(long_run, tmp_path):
    server = StopsEarly(long_run, starts=1)
    code, output = run_agent(server, tmp_path)
    (trial,) = server.trials
    assert code == 0, output
    assert "Traceback" not in output
    assert trial.exit_codes == [0]
    assert trial.summary["val/win_rate_judge"] == trial.values("val/win_rate_judge")[-1]
    # within an epoch or its evaluation a checkpoint of its own is saved; while a round is sampled the last one holds
    said = re.search(r"SIGTERM at step (\d+)\. Saved\. Resume:\npython (.*)", output)
    assert said, output
    command = [str(BIN / "python"), *said[2].split(), f"--trainer.max_steps={int(said[1]) + 1}"]
    resumed = subprocess.run(command, cwd=ROOT, env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert read_metrics(tmp_path / "runs" / trial.id / "metrics.csv")[-1]["step"] == int(said[1]) + 1


@pytest.mark.slow
def test_a_killed_trial_that_is_started_again_resumes(long_run, tmp_path):
    server = StopsEarly(long_run, starts=2)
    (trial,) = server.trials

    def kill_once(agent: int) -> None:
        children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
        trials = [pid for pid in children if b"fit" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
        if not server.seen and len(trial.values("val/win_rate_judge")) >= 2 and trials:
            server.seen = len(trial.values("val/win_rate_judge"))
            server.commands.append(server.command("resume", trial))
            os.kill(trials[0], signal.SIGKILL)

    code, output = run_agent(server, tmp_path, kill_once)
    assert code == 0, output
    assert "Traceback" not in output
    resumed = re.search(r"resumes .*trial0 from .*\.ckpt, its newest checkpoint", output)
    assert resumed, output
    steps = [row["trainer/global_step"] for row in trial.history if "val/win_rate_judge" in row]
    assert len(steps) >= server.seen + 2
    assert steps == sorted(steps)
    assert trial.starts == 2
    assert trial.exit_codes == [0]
