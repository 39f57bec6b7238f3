"""The shipped sweeps, by W&B's own code, and what a WandbLogger is shown, offline."""

import json
from pathlib import Path

import pytest
import wandb
import yaml
from tiny import write_pairs, write_prompts
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lit_align.cli import AlignCLI, main

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def agents_environment(monkeypatch):
    """As an agent sets it for a run of its own; W&B reads it once per process, unless torn down."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "run7")
    wandb.teardown()
    yield
    wandb.teardown()


def commands(sweep: dict) -> list[list[str]]:
    """Commands that an agent would run (`wandb.wandb_agent.Agent._command_run`), at both ends of every parameter."""
    made = []
    for end in (0, -1):
        swept = {}
        for name, given in sweep["parameters"].items():
            swept[name] = {"value": [given["value"]][0] if "value" in given else
                           given["values"][end] if "values" in given else given[("min", "max")[end]]}  # fmt: skip
        variables = create_sweep_command_args({"args": swept})
        variables |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
        command: list[str] = []
        for piece in map(str, create_sweep_command(list(sweep["command"]))):
            command += variables[piece[2:-1]] if piece.startswith("${") else [piece]
        made.append(command)
    return made


@pytest.mark.skipif(not (ROOT / "data/quickstart/judge").exists(), reason="`make install` prepares data/quickstart")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_an_agents_commands_parse_into_the_swept_options(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    for command in commands(sweep):
        assert command[:4] == ["/usr/bin/env", "python", "train.py", "fit"]
        config = AlignCLI([*command[4:], "--trainer.logger.mode=offline"], run=False).config
        assert config.trainer.default_root_dir == "runs/sweep/run7"
        assert config.trainer.logger.init_args.resume == "allow"
        options = dict(piece.removeprefix("--").split("=", 1) for piece in command[4:] if piece.startswith("--"))
        for name in sweep["parameters"]:
            key = name.replace("reference_refresh.", "reference_refresh.init_args.")
            assert float(config[key]) == float(options[name])
    wandb.finish()


def test_the_random_sweep_covers_soft_and_hard_rules():
    rule = yaml.safe_load((ROOT / "configs/sweeps/random.yaml").read_text())["parameters"]
    alphas = rule["reference_refresh.alpha"]["values"]
    assert {0.6, 1.0} < set(alphas)
    assert 1 in rule["reference_refresh.tau"]["values"]


def test_wandb_gets_marks_tables_the_report_and_rounds(tiny_model, in_tmp):
    write_pairs(in_tmp)
    write_prompts(in_tmp, 12)
    scorer = {"class_path": "FunctionScorer", "init_args": {"function": "rewards.py:reward"}}
    config = {
        "model": {"class_path": "DPO", "init_args": {"policy": {"path": tiny_model}}},
        "data": {
            "class_path": "OnPolicyPairs",
            "init_args": {
                "prompts": "prompts.jsonl",
                "scorer": scorer,
                "sampling": {"max_new_tokens": 4},
                "store": "store",
            },
        },
        "win_rate": {
            "prompts": "prompts.jsonl",
            "validation": "prompts.jsonl",
            "scorer": scorer,
            "judges": {"other": scorer},
        },
        "reference_refresh": {"alpha": 1.0, "tau": 1},
        "wandb_report": {"artifacts": True, "rows": 5},
        "trainer": {"max_epochs": 2, "default_root_dir": "run", "accelerator": "cpu", "log_every_n_steps": 1},
    }
    Path("dpo.yaml").write_text(yaml.safe_dump(config))
    Path("store/round_000-another").mkdir(parents=True)
    Path("store/round_000-another/round.json").write_text("{}")
    main(["fit", "--config=dpo.yaml", "--trainer.logger=WandbLogger", "--trainer.logger.mode=offline"])
    run = wandb.run
    assert run is not None
    assert run.id == "run7"
    summary = json.loads(Path("run/run7/summary.json").read_text())
    assert run.summary["verdict/other/win_rate"] == run.summary["verdict/win_rate"]
    assert run.summary["verdict/win_rate"] == summary["scorers"]["training"]["win_rate"]
    assert run.summary["reference/refreshed"] == run.summary["reference/refreshes"] > 1
    media = Path(run.dir) / "media"
    tables = [json.loads(path.read_text()) for path in media.glob("table/responses/*.table.json")]
    assert len(tables) == 3
    assert all(len(table["data"]) == 5 for table in tables)
    assert [*media.glob("html/report*.html")]
    wandb.finish()
    (record,) = Path(run.dir).parent.glob("*.wandb")
    assert all(name in record.read_bytes() for name in (b"run7-round-000", b"run7-round-001"))
    assert b"round_000-another" not in record.read_bytes()  # of another run with the same store
