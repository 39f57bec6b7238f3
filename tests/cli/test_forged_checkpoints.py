"""A checkpoint with entries that no run writes resumes or is refused with one message, and never with a traceback."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_pairs

from lit_align.cli import main

NONSENSE: list[Any] = [None, "x", 3, -1, 0.5, True, [], {}, [None], {"a": 1}]
OPTIONS = {
    "model": "DPO",
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 0.1,
    "reference_refresh": "ReferenceRefresh",
    "reference_refresh.alpha": 0.5,
    "reference_refresh.tau": 1,
    "data": "OfflinePairs",
    "data.train": "pairs.jsonl",
    "data.batch_size": 4,
    "trainer.accelerator": "cpu",
    "trainer.default_root_dir": "run",
    "trainer.enable_progress_bar": False,
}


def train(model: str, *more: str) -> None:
    options = OPTIONS | {"model.policy.path": model}
    main(["fit", *(f"--{key}={value}" for key, value in options.items()), *more])


@pytest.fixture(scope="module")
def whole(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("forged")
    write_pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(tiny_model, "--trainer.max_epochs=1")
    return next(folder.glob("run/checkpoints/step=*.ckpt"))


def places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Each key of nested dictionaries and lists with what holds it, without the state of other packages' objects."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        if depth > 1 and key != "optimizer_states" and "ModelCheckpoint" not in str(key):
            yield from places(inner, depth - 1)


def check(forged: dict[str, Any], model: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Resume; returns the message, or nothing where the run resumes."""
    shutil.rmtree("run", ignore_errors=True)
    torch.save(forged, "forged.ckpt")
    write_pairs(Path())
    capsys.readouterr()
    try:
        train(model, "--trainer.max_epochs=2", "--ckpt_path=forged.ckpt")
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
    "callbacks: a list": lambda whole: whole | {"callbacks": []},
    "no optimizer's state": lambda whole: whole | {"optimizer_states": []},
    "weights of another project": lambda whole: whole | {"state_dict": {"encoder.weight": torch.ones(2)}},
    "another project": lambda whole: {
        "state_dict": {"encoder.weight": torch.ones(2)},
        **{key: whole[key] for key in ("pytorch-lightning_version", "loops", "optimizer_states", "lr_schedulers")},
    },
}


@pytest.mark.parametrize("name", FORGED)
def test_an_entry_that_no_run_writes_is_one_message(tiny_model, in_tmp, blank_figures, whole: Path, capsys, name: str):
    assert "checkpoint" in check(FORGED[name](torch.load(whole, weights_only=True)), tiny_model, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_random_entries_resume_or_are_one_message(tiny_model, in_tmp, blank_figures, whole: Path, capsys, number: int):
    chance = random.Random(number)
    for _ in range(40):
        forged = torch.load(whole, weights_only=True)
        holder, key = chance.choice([*places(forged, chance.choice([1, 2, 3, 5]))])
        if chance.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = chance.choice(NONSENSE)
        check(forged, tiny_model, capsys)
