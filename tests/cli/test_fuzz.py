"""Random configurations: a run trains or ends with one paragraph, and never with a traceback."""

import copy
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_pairs, write_prompts

from lit_align.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NONSENSE: list[Any] = [
    *(-1, 0, 1, 2, 3, 1000, 2**63, 10**400, -0.5, 0.5, 1e-9, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "null", "none", "auto", "yes", "1e-3", "\x1b[31m", "../..", "a/b/c", "http://[", "é" * 300),
    *(None, True, False, [], [1], [None], ["a", "b"], {}, {"a": 1}, {"class_path": "os.system"}, {"init_args": {}}),
    *({"class_path": "AdamW"}, {"class_path": "DPO", "init_args": {}}, {"path": 3}, [[]], [{}]),
]
SMALL = {
    "max_epochs": 1,
    "max_steps": 1,
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "default_root_dir": "run",
}
KEYS = {
    "model": ["beta", "lora", "optimizer", "schedule", "warmup_steps", "proximal", "reference", "label_smoothing"],
    "data": [
        "batch_size",
        "validation",
        "columns",
        "sampling",
        "pairing",
        "seed",
        "max_prompt_length",
        "template_args",
    ],
    "trainer": ["precision", "callbacks", "logger", "max_time", "val_check_interval", "gradient_clip_val", "profiler"],
    "": ["reference_refresh", "win_rate", "drift", "checkpoint", "seed_everything", "fsdp_sharding", "predictions"],
}


def places(config: Any) -> Iterator[tuple[Any, Any]]:
    """Each key of a configuration with the dictionary or the list that holds it."""
    entries = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in entries:
        yield config, key
        yield from places(value)


def small(config: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """A shipped configuration with a tiny model, tiny data and one step."""
    options = config["data"]["init_args"]
    config["model"]["init_args"]["policy"] = {"path": model, "dtype": "float32"}
    if config["data"]["class_path"] == "OnPolicyPairs":
        scorer = {"class_path": "FunctionScorer", "init_args": {"function": f"{folder / 'rewards.py'}:reward"}}
        options |= {"prompts": str(folder / "prompts.jsonl"), "scorer": scorer, "prompts_per_round": 4}
        options |= {"sampling": {"max_new_tokens": 4}}
    options["batch_size"] = 2
    config["trainer"] = config.get("trainer", {}) | SMALL
    return config


def mutated(chance: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """One to three values replaced, removed, added or moved."""
    for _ in range(chance.choice([1, 1, 2, 3])):
        holder, key = chance.choice([*places(config)])
        kind = chance.randrange(5)
        if kind == 0 and isinstance(holder, dict) and key in holder:
            del holder[key]
        elif kind == 1:
            above = chance.choice([*KEYS])
            target = config.get(above, config) if above else config
            target = target.get("init_args", target) if isinstance(target, dict) else target
            if isinstance(target, dict):
                target[chance.choice(KEYS[above])] = copy.deepcopy(chance.choice(NONSENSE))
        elif kind == 2 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.get(key)
        else:
            holder[key] = copy.deepcopy(chance.choice(NONSENSE))
    return config


def check(number: int, model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(number)
    config = small(yaml.safe_load(chance.choice(CONFIGS).read_text()), model, folder)
    path = Path("fuzzed.yaml")
    path.write_text(yaml.safe_dump(mutated(chance, config), allow_unicode=True))
    short = ["--trainer.max_steps=1", "--trainer.max_epochs=1", "--trainer.default_root_dir=run", "--fresh"]
    try:
        main(["fit", "--config", str(path), *short])
    except SystemExit as left:
        said = capsys.readouterr().err
        assert left.code in (0, 2), f"{number}: {path.read_text()}"  # noqa: PT017
        if left.code:
            last = said.splitlines()[-1] if said else ""
            assert last.startswith("error: "), f"{number}: {said}"
            assert "Namespace(" not in last, f"{number}: {last}"
            assert len(last) < 1200, f"{number}: {last}"
            assert "\x1b" not in last, f"{number}: {last!r}"


@pytest.fixture
def data(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, blank_figures: None) -> Path:
    """A folder in which the paths of shipped configurations hold tiny data."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    write_prompts(in_tmp)
    write_pairs(in_tmp)
    samples = in_tmp / "data" / "samples"
    samples.mkdir(parents=True)
    for source in (Path(__file__).parents[2] / "data" / "samples").glob("*.jsonl"):
        rows = source.read_text().splitlines()[:8]
        assert all(json.loads(row) for row in rows)
        (samples / source.name).write_text("\n".join(rows) + "\n")
    return in_tmp


@pytest.mark.parametrize("number", range(30))
def test_a_random_configuration_trains_or_says_why_not(number: int, tiny_model: str, data: Path, capsys):
    check(number, tiny_model, data, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30, 430))
def test_more_random_configurations_train_or_say_why_not(number: int, tiny_model: str, data: Path, capsys):
    check(number, tiny_model, data, capsys)
