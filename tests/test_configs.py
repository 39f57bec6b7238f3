"""Every shipped YAML trains: as it is, but for a tiny model and few steps."""

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import write_prompts

import lit_align.metrics.preference
import lit_align.objectives.base
from lit_align import objectives
from lit_align.callbacks import FSDPSharding, ReferenceRefresh
from lit_align.cli import AlignCLI, main
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import AnchoredObjective, PreferenceObjective
from lit_align.objectives.per_token import PerTokenObjective
from lit_align.reporting.metrics_csv import read_metrics

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
OBJECTIVES = sorted(
    name
    for name in objectives.__all__
    if isinstance(getattr(objectives, name), type)
    and issubclass(getattr(objectives, name), PreferenceObjective)
    and name not in ("PreferenceObjective", "AnchoredObjective")
)


def kl_of_uniform_to_softmax(rewards: torch.Tensor, temperature: float) -> float:
    logs = (rewards.double() / temperature).log_softmax(-1)
    return float((-math.log(logs.shape[1]) - logs).mean())


def sppo_at_anchor(wins: torch.Tensor, beta: float) -> float:
    return float(((wins.double() - 0.5) / beta).square().sum(1).mean())


# the loss of the first batch, where policy and anchor are one; by the test's own formulas
CLOSED_FORMS: dict[str, Callable[[PreferenceBatch], float]] = {
    "dpo": lambda batch: math.log(2),
    "tr_dpo": lambda batch: math.log(2),
    "pr_dpo": lambda batch: math.log(2),
    "ipo": lambda batch: 1 / (2 * 0.1) ** 2,
    "tr_ipo": lambda batch: 1 / (2 * 0.05) ** 2,
    "pr_ipo": lambda batch: 1 / (2 * (0.1 + 0.1)) ** 2,
    "kto": lambda batch: float(torch.where(batch.labels == 1, 1.0, 1.33).mean()) / 2,
    "tr_kto": lambda batch: 1 / 2,
    "exo": lambda batch: kl_of_uniform_to_softmax(batch.rewards, 0.1),
    "pr_exo": lambda batch: kl_of_uniform_to_softmax(batch.rewards, 0.1),
    "sppo": lambda batch: sppo_at_anchor(batch.win_probabilities, 0.05),
    "pr_sppo": lambda batch: sppo_at_anchor(batch.win_probabilities, 0.05 + 0.05),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_configuration_trains_from_its_closed_form_loss(
    path, tiny_model, tmp_path, monkeypatch, capsys, blank_figures
):
    monkeypatch.chdir(ROOT)
    first: list[PreferenceBatch] = []
    step = PreferenceObjective._step

    def watched(module: Any, batch: PreferenceBatch, stage: Any) -> torch.Tensor:
        first.append(batch)
        return step(module, batch, stage)

    monkeypatch.setattr(PreferenceObjective, "_step", watched)
    config = yaml.safe_load(path.read_text())
    args = [f"--model.policy.path={tiny_model}", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    args += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_checkpointing=false"]
    if config["data"]["class_path"] == "OnPolicyPairs":
        prompts = write_prompts(tmp_path)
        args += [f"--data.prompts={prompts}", "--data.prompts_per_round=8", "--data.batch_size=2"]
        args += [f"--data.scorer.function={tmp_path / 'rewards.py'}:reward", "--data.sampling.stop=[]"]
    main(["fit", f"--config={path}", *args])
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    objective = getattr(objectives, config["model"]["class_path"])
    anchored = issubclass(objective, AnchoredObjective)
    assert ("step-0 check" in capsys.readouterr().out) == anchored
    if path.stem in CLOSED_FORMS:
        assert losses[0] == pytest.approx(CLOSED_FORMS[path.stem](first[0]), rel=1e-3)

    logged = {name.partition("/")[2] for row in rows for name in row if name.startswith("train/")}
    pages = (inspect.getmodule(objective), lit_align.metrics.preference, lit_align.objectives.base)
    documented = " ".join(page.__doc__ or "" for page in pages)
    assert not {name for name in logged if not re.search(rf"\b{name}\b", documented)}


def test_no_closed_form_is_of_a_configuration_that_is_gone():
    assert CLOSED_FORMS.keys() <= {path.stem for path in SHIPPED}


def test_the_proximal_configurations_are_base_objectives_with_a_lambda():
    for path in SHIPPED:
        model = yaml.safe_load(path.read_text())["model"]
        assert (model["init_args"].get("proximal", 0) > 0) == path.stem.startswith("pr_"), path
        if path.stem.startswith(("pr_", "tr_")):
            assert model["class_path"] == path.stem[3:].upper(), "no class of its own"


def test_the_trust_region_configurations_have_the_papers_values():
    for path in sorted((ROOT / "configs").glob("tr_*.yaml")):
        config = yaml.safe_load(path.read_text())
        options = config["model"]["init_args"]
        assert options["beta"] == 0.05
        assert options["optimizer"]["init_args"]["lr"] == 1e-6
        assert options["warmup_steps"] == 100
        assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (1, 2.0)
        assert config["reference_refresh"] == {"alpha": 0.6, "tau": 1}  # soft, each step
    hard = yaml.safe_load((ROOT / "configs/overlays/tr_hard.yaml").read_text())
    assert hard["reference_refresh"] == {"alpha": 1.0, "tau": 512, "unit": "step"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_a_file_an_export_a_yaml_a_test_and_a_row(name):
    module = inspect.getmodule(getattr(objectives, name))
    assert module is not None
    page = " ".join((module.__doc__ or "").split())
    for part in ("Use it", "Where we differ: ", "Logged: "):
        assert part in page
    assert re.search(r"arXiv \d{4}\.\d{5}", page) or name == "SFT", "the paper"
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


@pytest.mark.parametrize("path", [*SHIPPED, ROOT / "configs/quickstart.yaml"], ids=lambda path: path.stem)
def test_the_overlays_go_over_each_configuration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = getattr(objectives, yaml.safe_load(path.read_text())["model"]["class_path"])
    anchored, per_token = issubclass(objective, AnchoredObjective), issubclass(objective, PerTokenObjective)
    sets = (
        ["lora", "fsdp", *(["tr_soft"] if anchored else [])],
        ["ddp", "qlora", *(["tr_hard"] if anchored else []), *(["per_token"] if per_token else [])],
    )
    shipped = {path.stem for path in (ROOT / "configs/overlays").glob("*.yaml")}
    assert {*sets[0], *sets[1]} == shipped or not per_token, "an overlay is left out"
    for names in sets:
        overlays = [f"--config=configs/overlays/{name}.yaml" for name in names]
        cli = AlignCLI([f"--config={path}", *overlays, "--trainer.accelerator=cpu"], run=False)
        kinds = {type(callback) for callback in cli.trainer.callbacks}
        assert (FSDPSharding in kinds) == ("fsdp" in names)
        assert cli.model.lora is not None or not {"lora", "qlora"} & {*names}
        assert (cli.model.policy_config.quantize == "nf4") == ("qlora" in names)
        if anchored:
            (refresh,) = (c for c in cli.trainer.callbacks if isinstance(c, ReferenceRefresh))
            assert refresh.rule.alpha == (0.6 if "tr_soft" in names else 1.0)
            assert refresh.rule.unit == "step", "the configuration may count rounds"


HINGE = """
from lit_align.objectives import AnchoredObjective


class Hinge(AnchoredObjective):
    formula = "max(0, 1 − β·Δlog π/anchor)"

    def loss(self, logps, anchor_logps, beta, batch):
        ratios = logps - anchor_logps
        return (1 - beta * (ratios[:, 0] - ratios[:, 1])).clamp(min=0)

    def loss_at_anchor(self, beta, batch):
        return 1.0
"""


def test_an_objective_of_ones_own_is_a_file_and_a_yaml(tiny_model, tmp_path, monkeypatch, capsys):
    """Nothing else is edited, and it has its step-0 check, its moving reference and its metrics."""
    (tmp_path / "hinge_of_mine.py").write_text(HINGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    yaml_of_mine = (
        (ROOT / "configs/tr_dpo.yaml").read_text().replace("class_path: DPO", "class_path: hinge_of_mine.Hinge")
    )
    (tmp_path / "hinge.yaml").write_text(yaml_of_mine)
    args = [f"--model.policy.path={tiny_model}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    main(["fit", f"--config={tmp_path / 'hinge.yaml'}", *args, "--trainer.enable_checkpointing=false"])
    said = capsys.readouterr().out
    assert "Hinge: max(0, 1 − β·Δlog π/anchor)" in said
    assert "step-0 check loss 1.0000 = 1.0000 ✓" in " ".join(said.split())
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert next(row["train/loss"] for row in rows if "train/loss" in row) == 1
    assert max(row.get("reference/refreshes", 0) for row in rows) == 4
