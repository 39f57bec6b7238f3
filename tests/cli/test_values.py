"""Values that make no sense are refused, by every option of every class of the command line."""

import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_pairs, write_prompts

from lit_align import callbacks, data, objectives
from lit_align.cli import main
from lit_align.data.examples import Source
from lit_align.data.scorers.endpoint import Endpoint
from lit_align.errors import UserError
from lit_align.policy import LoRAConfig, PolicyConfig

OPTION_CLASSES = [PolicyConfig, LoRAConfig, Source, Endpoint]
EXPORTED = [getattr(module, name) for module in (objectives, data, callbacks) for name in module.__all__]
CLASSES = {each for each in EXPORTED if inspect.isclass(each) and "__init__" in vars(each)} | {*OPTION_CLASSES}
CLASSES = {each for each in CLASSES if not inspect.isabstract(each)}
CLASSES -= {data.VLLMSampler, data.Scores}  # the first needs a package, the other is not an option

# Where a number below 0 has a meaning.
NEGATIVE_ALLOWED = {"threshold", "lowest"}
ZERO_ALLOWED = {
    *("alpha of CPO", "beta of MPO", "gamma", "margin", "min_margin", "proximal", "label_smoothing", "dropout"),
    *("pretraining_weight", "sft_weight", "price_input", "price_output", "retries", "seed", "shown", "threshold"),
    *("temperature of Sampling", "temperature of Endpoint", "top_k", "unanswered of PairwiseJudge", "warmup_steps"),
    *("lowest", "wait_minutes of VLLMServerSampler"),
}


def numeric_options() -> Iterator[tuple[type, str]]:
    for cls in sorted(CLASSES, key=lambda cls: cls.__name__):
        for name, parameter in inspect.signature(cls).parameters.items():
            kinds = inspect.formatannotation(parameter.annotation)
            number = re.search(r"\b(float|int)\b", kinds) and "dict" not in kinds and "Literal['" not in kinds[:20]
            if number and not cls.__name__.startswith(("Sample", "Peer", "RunReport", "SequenceClass")):
                yield cls, name


@pytest.fixture(scope="module")
def required(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("values")
    prompts, pairs = write_prompts(folder), write_pairs(folder)
    scorer = data.FunctionScorer(f"{folder / 'rewards.py'}:reward")
    endpoint = Endpoint("judge", api_key_variable=None)
    options = {
        "policy": PolicyConfig(tiny_model),
        "path": tiny_model,
        "train": pairs,
        "prompts": prompts,
        "scorer": scorer,
        "scorers": {"one": scorer, "two": scorer},
        "function": f"{folder / 'rewards.py'}:reward",
        "alpha": 0.5,
        "model": "judge",
        "endpoint": endpoint,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "key")
        yield options


def refuses(cls: type, name: str, value: Any, required: dict[str, Any]) -> bool:
    needed = {
        key: required[key]
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty and key in required
    }
    cls(**needed)  # fits
    try:
        cls(**(needed | {name: value}))
    except UserError as error:
        return f"{name}={value}" in str(error) and bool(re.search(r"\bmust\b|has no effect", str(error)))
    return False


@pytest.mark.parametrize(("cls", "name"), [*numeric_options()], ids=lambda each: getattr(each, "__name__", each))
def test_a_number_without_a_meaning_is_refused(cls: type, name: str, required: dict[str, Any]):
    assert refuses(cls, name, -1, required) or name in NEGATIVE_ALLOWED
    assert refuses(cls, name, 0, required) or not ZERO_ALLOWED.isdisjoint({name, f"{name} of {cls.__name__}"})
    if "float" in str(inspect.signature(cls).parameters[name].annotation):
        assert refuses(cls, name, math.nan, required)


@pytest.fixture
def fails(in_tmp: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    common = f"fit --model=DPO --model.policy.path={tiny_model} --data=OfflinePairs --data.train={write_pairs(in_tmp)}"

    def run(*options: str) -> str:
        with pytest.raises(SystemExit) as left:
            main([*common.split(), *options])
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: ")
        return said

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.optimizer.lr=.inf", "model.init_args.optimizer.init_args.lr=inf must be a finite number"),
        ("--model.lora.dropout=.nan", "model.init_args.lora.dropout=nan must be"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val=nan must be a finite number"),
        ("--reference_refresh.alpha=.nan", "reference_refresh.init_args.alpha=nan must be a finite number"),
        ("--data.train_split=", "data.init_args.train_split must not be empty"),
        ("--data.validation_split=test", "data.validation_split=test has no effect without data.validation"),
        ("--data.seed=-1", "data.seed=-1 must be at least 0"),
        (f"--data.seed={2**32}", "data.seed=4294967296 must be at least 0 and at most"),
        ("--data.text_batch_size=4", "data.text_batch_size=4 has no effect without data.sft or data.pretraining"),
        ("--model.policy.revision=v2", "model.policy.revision=v2 has no effect because"),
        ("--model.lora.r=0", "model.lora.r=0 must be at least 1"),
        ("--model.lora.targets=[]", "model.lora.targets must name at least one layer"),
        ("--model.warmup_steps=-1", "model.warmup_steps=-1 must be at least 0"),
        ("--trainer.callbacks=EarlyStopping", "trainer.callbacks: 'EarlyStopping' is not a list"),
        ("--model.reference=null", "model.init_args.reference=null must be options (key: value)"),
        ("--config=group.yaml", "model.init_args.reference=3 must be options (key: value)"),
        ("--trainer.max_time=abc", "is not a valid duration"),
    ],
)
def test_the_command_line_names_the_key_and_what_it_must_be(fails, option: str, message: str):
    Path("group.yaml").write_text("model: {class_path: DPO, init_args: {reference: 3}}")
    assert message in fails(option)


HOSTILE: dict[str, dict[str, Any]] = {
    "os.system": {"command": "touch called"},
    "subprocess.Popen": {"args": "touch called", "shell": True},
    "torch.nn.Linear": {"in_features": 1, "out_features": 1},
}


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("model", "os.system"),
        ("model", "torch.nn.Linear"),
        ("model.optimizer", "os.system"),
        ("model.optimizer", "subprocess.Popen"),
        ("data", "os.system"),
        ("data", "subprocess.Popen"),
        ("data.pairing", "subprocess.Popen"),
        ("trainer.callbacks", "subprocess.Popen"),
        ("trainer.logger", "subprocess.Popen"),
        ("trainer.plugins", "subprocess.Popen"),
        ("trainer.profiler", "subprocess.Popen"),
        ("trainer.strategy", "subprocess.Popen"),
        ("trainer.accelerator", "subprocess.Popen"),
        ("checkpoint", "subprocess.Popen"),
        ("drift", "subprocess.Popen"),
        ("win_rate", "subprocess.Popen"),
        ("win_rate.scorer", "subprocess.Popen"),
        ("predictions.scorer", "os.system"),
        ("reference_refresh", "os.system"),
        ("fsdp_sharding", "subprocess.Popen"),
    ],
)
def test_no_option_runs_code_of_another_class(fails, in_tmp: Path, option: str, path: str):
    """A class must be a subclass of what its option takes; to build another one would run it."""
    entry = {"class_path": path, "init_args": HOSTILE[path]}
    for part in reversed(option.split(".")):
        entry = {part: entry}  # type: ignore[dict-item]
    Path("hostile.json").write_text(json.dumps(entry))
    said = fails("--config=hostile.json")
    assert len(said) < 600
    assert "Namespace" not in said
    assert not Path("called").exists()


def test_no_scorer_of_rounds_runs_code_of_another_class(fails):
    scorer = {"class_path": "subprocess.Popen", "init_args": {"args": "touch called", "shell": True}}
    Path("hostile.json").write_text(
        json.dumps({"data": {"class_path": "OnPolicyPairs", "init_args": {"prompts": "x", "scorer": scorer}}})
    )
    fails("--config=hostile.json")
    assert not Path("called").exists()
