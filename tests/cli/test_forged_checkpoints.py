"""A checkpoint with entries that no run writes resumes or is refused with one message, and never with a traceback."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_pairs, write_prompts

from lit_align.cli import main

NONSENSE: list[Any] = [None, "x", "3", b"x", 3, -1, 2**70, 0.5, float("nan"), True, [], {}, [None], {"a": 1}]
NONSENSE += [torch.ones(2), torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor(True)]
OPTIONS = {
    "model": "DPO",
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 0.1,
    "reference_refresh": "ReferenceRefresh",
    "reference_refresh.alpha": 0.5,
    "reference_refresh.tau": 1,
    "data.batch_size": 4,
    "checkpoint.every_n_train_steps": 1,
    "checkpoint.monitor": "train/loss",
    "checkpoint.save_top_k": 2,
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "trainer.enable_progress_bar": False,
}
DATA = {
    "pairs": {"data": "OfflinePairs", "data.train": "pairs.jsonl"},
    "rounds": {
        "data": "OnPolicyPairs",
        "data.prompts": "prompts.jsonl",
        "data.scorer": "FunctionScorer",
        "data.scorer.function": "rewards.py:reward",
        "data.prompts_per_round": 8,
        "data.sampling.max_new_tokens": 4,
        "data.batch_size": 3,
    },
}


def train(model: str, data: str, *more: str) -> None:
    write_pairs(Path())
    write_prompts(Path())
    options = OPTIONS | DATA[data] | {"model.policy.path": model}
    main(["fit", *(f"--{key}={value}" for key, value in options.items()), *more])


@pytest.fixture(scope="module")
def wholes(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint from the middle of the first epoch, by the data."""
    found = {}
    for data in DATA:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(data))
            train(tiny_model, data, "--trainer.max_epochs=1")
            found[data] = min(Path("run/checkpoints").glob("step=*.ckpt")).absolute()
    return found


def places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Each key of nested dictionaries and lists with what holds it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        if depth > 1:
            yield from places(inner, depth - 1)


def check(forged: dict[str, Any], model: str, data: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Resume; returns the message, or nothing where the run resumes."""
    shutil.rmtree("run", ignore_errors=True)
    torch.save(forged, "forged.ckpt")
    capsys.readouterr()
    try:
        train(model, data, "--trainer.max_epochs=2", "--ckpt_path=forged.ckpt")
    except SystemExit as left:
        said = capsys.readouterr().err
        assert left.code == 2  # noqa: PT017
        assert said.count("error: ") == 1, said
        assert len(said) < 1200, said
        return said
    return ""


FORGED = {
    "loops: None": lambda whole: whole | {"loops": None},
    "loops without fit_loop": lambda whole: whole | {"loops": {}},
    "a position of words": lambda whole: whole | {"position": dict.fromkeys(whole["position"], "x")},
    "no position": lambda whole: {key: value for key, value in whole.items() if key != "position"},
    "no identity": lambda whole: {key: value for key, value in whole.items() if key != "identity"},
    "an empty identity": lambda whole: whole | {"identity": {}},
    "callbacks: a list": lambda whole: whole | {"callbacks": []},
    "no optimizer's state": lambda whole: whole | {"optimizer_states": []},
    "no schedule's state": lambda whole: whole | {"lr_schedulers": []},
    "weights of another project": lambda whole: whole | {"state_dict": {"encoder.weight": torch.ones(2)}},
    "another project": lambda whole: {
        "state_dict": {"encoder.weight": torch.ones(2)},
        **{key: whole[key] for key in ("pytorch-lightning_version", "loops", "optimizer_states", "lr_schedulers")},
    },
}


@pytest.mark.parametrize("name", FORGED)
def test_an_entry_that_no_run_writes_is_one_message(tiny_model, in_tmp, blank_figures, wholes, capsys, name: str):
    forged = FORGED[name](torch.load(wholes["pairs"], weights_only=True))
    assert "checkpoint" in check(forged, tiny_model, "pairs", capsys)


# Paths of entries, what takes their place, and the part that the message names.
ENTRIES = {
    "moments of another shape": ("optimizer_states 0 state 0 exp_avg", torch.ones(2), "RuntimeError: "),
    "a learning rate of words": ("optimizer_states 0 param_groups 0 lr", "x", 'TypeError: lr is "x"'),
    "weights out of order": (
        "optimizer_states 0 param_groups 0 params",
        [1, 0, *range(2, 20)],
        "TypeError: param_groups.0.params is [1, 0, 2, ",
    ),
    "a metric of words": ("metrics_csv pending", {"step": 0, "loss": "x"}, 'TypeError: pending."loss" is "x"'),
    "a schedule of words": ("lr_schedulers 0 last_epoch", "x", 'TypeError: lr_schedulers.last_epoch is "x"'),
    "a loader's place of words": (
        "loops fit_loop state_dict combined_loader 0 tokens",
        "x",
        'TypeError: tokens is "x"',
    ),
    "kept checkpoints of words": (
        "callbacks ModelCheckpoint best_k_models",
        "x",
        'ModelCheckpoint.best_k_models is "x"',
    ),
    "a round of words": ("OnPolicyPairs made_at", "x", 'TypeError: made_at is "x"'),
}


def put(value: Any, path: str, new: Any) -> None:
    """Replace an entry; a callback's key is found by its beginning."""
    *above, last = path.split(" ")
    for name in above:
        value = value[0 if name == "0" else next(key for key in value if key.startswith(name))]
    value[last] = new


@pytest.mark.parametrize("name", ENTRIES)
def test_the_message_names_the_entry(tiny_model, in_tmp, blank_figures, wholes, capsys, name: str):
    path, new, part = ENTRIES[name]
    data = "rounds" if path.startswith("OnPolicyPairs") else "pairs"
    forged = torch.load(wholes[data], weights_only=True)
    put(forged, path, new)
    said = check(forged, tiny_model, data, capsys)
    assert "error: ckpt_path=forged.ckpt cannot be resumed from (" in said
    assert part in said


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("number", range(10))
def test_random_entries_resume_or_are_one_message(tiny_model, in_tmp, blank_figures, wholes, capsys, number, data):
    chance = random.Random(number)
    for _ in range(40):
        forged = torch.load(wholes[data], weights_only=True)
        holder, key = chance.choice([*places(forged, chance.choice([1, 2, 3, 5, 7]))])
        if chance.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = chance.choice(NONSENSE)
        check(forged, tiny_model, data, capsys)
