"""Every shipped YAML trains: as it is, but for a tiny model and few steps."""

import inspect
import math
import re
from pathlib import Path

import pytest
import yaml
from tiny import write_prompts

from lit_align import objectives
from lit_align.callbacks import FSDPSharding, ReferenceRefresh
from lit_align.cli import AlignCLI, main
from lit_align.loggers import read_metrics
from lit_align.objectives import AnchoredObjective, PreferenceObjective

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
OBJECTIVES = sorted(
    name
    for name in objectives.__all__
    if isinstance(getattr(objectives, name), type)
    and issubclass(getattr(objectives, name), PreferenceObjective)
    and name not in ("PreferenceObjective", "AnchoredObjective")
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_configuration_trains_a_tiny_model_from_a_finite_loss(path, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(path.read_text())
    args = [f"--model.policy.path={tiny_model}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    args += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_checkpointing=false"]
    if config["data"]["class_path"] == "OnPolicyPairs":
        prompts = write_prompts(tmp_path)
        args += [f"--data.prompts={prompts}", "--data.prompts_per_round=8", "--data.batch_size=2"]
        args += [f"--data.scorer.function={tmp_path / 'rewards.py'}:reward", "--data.sampling.stop=[]"]
    main(["fit", f"--config={path}", *args])
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "train/loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    anchored = issubclass(getattr(objectives, config["model"]["class_path"]), AnchoredObjective)
    assert ("step-0 check" in capsys.readouterr().out) == anchored


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_a_file_an_export_a_yaml_a_test_and_a_row_of_the_readme(name):
    module = inspect.getmodule(getattr(objectives, name))
    assert module is not None
    assert module.__doc__, "a docstring that opens with the formula"
    stem = module.__name__.rpartition(".")[2]
    assert f"class_path: {name}\n" in (ROOT / "configs" / f"{stem}.yaml").read_text()
    assert (ROOT / "tests" / "objectives" / f"test_{stem}.py").exists()
    assert re.search(rf"^\| `{name}` \|.*{stem}.py", (ROOT / "README.md").read_text(), re.MULTILINE)


OF_ROUNDS = sorted(path for folder in ("samplers", "scorers") for path in (ROOT / "configs" / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", OF_ROUNDS, ids=lambda path: path.stem)
def test_every_sampler_and_scorer_goes_over_every_configuration_of_rounds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for config in SHIPPED:
        if yaml.safe_load(config.read_text())["data"]["class_path"] == "OnPolicyPairs":
            with pytest.raises(SystemExit) as left:
                main(["fit", f"--config={config}", f"--config={path}", "--print_config"])
            assert left.value.code == 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_overlays_go_over_each_configuration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    anchored = issubclass(
        getattr(objectives, yaml.safe_load(path.read_text())["model"]["class_path"]), AnchoredObjective
    )
    for names in (["lora", "fsdp", *(["tr_soft"] if anchored else [])], ["ddp", *(["tr_hard"] if anchored else [])]):
        overlays = [f"--config=configs/overlays/{name}.yaml" for name in names]
        cli = AlignCLI([f"--config={path}", *overlays, "--trainer.accelerator=cpu"], run=False)
        kinds = {type(callback) for callback in cli.trainer.callbacks}
        assert (FSDPSharding in kinds) == ("fsdp" in names)
        assert cli.model.lora is not None or "lora" not in names
        if anchored:
            (refresh,) = (c for c in cli.trainer.callbacks if isinstance(c, ReferenceRefresh))
            assert refresh.rule.alpha == (0.6 if "lora" in names else 1.0)
