"""How options of files and of the command line are read and combined."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from command_line import DPO_YAML, FIT, Errors, config, edited, parse
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import Callback
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lit_align.callbacks import AlignCallback, ReferenceRefresh
from lit_align.cli import AlignCLI, main
from lit_align.cli.classes import subclasses
from lit_align.cli.commands import COMMANDS
from lit_align.data import PairingRule, Sampler, Scorer
from lit_align.data.base import PairsDataModule
from lit_align.objectives import DPO, IPO, PreferenceObjective

pytestmark = pytest.mark.usefixtures("folder")


class StrictDPO(DPO):
    """An objective of the user's own, with another default.

    Args:
        beta: Weight of staying near the reference.
    """

    def __init__(self, beta: float = 2.0, **kwargs):
        super().__init__(beta=beta, **kwargs)


def test_classes_are_found_by_their_short_names():
    built = parse("--model=IPO")
    assert type(built.model) is IPO
    assert type(built.datamodule).__name__ == "OfflinePairs"


def test_later_files_override_earlier_ones_key_by_key():
    Path("over.yaml").write_text("model: {init_args: {beta: 0.3}}\ntrainer: {max_epochs: 2}\n")
    merged = config("--config", "over.yaml")
    assert merged["model"]["init_args"]["beta"] == 0.3
    assert merged["model"]["init_args"]["lora"]["r"] == 4
    assert merged["trainer"]["max_epochs"] == 2
    assert merged["trainer"]["accelerator"] == "cpu"


@pytest.mark.parametrize(
    "options",
    [
        "--model.beta=0.7 --config dpo.yaml",
        "--model.init_args.beta 0.7 --config=dpo.yaml",
        "--config dpo.yaml --model.beta=0.7",
        "--model.beta=0.7 -c dpo.yaml",
    ],
)
def test_the_command_line_overrides_files_in_any_order(options: str):
    assert AlignCLI(shlex.split(options), run=False).config.model.init_args.beta == 0.7


def test_a_class_may_follow_its_options():
    Path("bare.yaml").write_text(DPO_YAML.replace("class_path: DPO", "class_path: IPO").replace("beta: 0.2", ""))
    built = AlignCLI(["--model.label_smoothing=0.1", "--model=DPO", "--config=bare.yaml"], run=False)
    assert built.config.model.init_args.label_smoothing == 0.1


@pytest.mark.parametrize("kind", [PreferenceObjective, PairsDataModule, Scorer, Sampler, PairingRule, AlignCallback])
def test_every_option_has_a_help_text(kind: type):
    ours = [cls for cls in subclasses(kind) if cls.__module__.startswith("lit_align.")]
    undocumented = [(cls, each.name) for cls in ours for each in get_signature_parameters(cls) if not each.doc]
    assert ours
    assert not undocumented


@pytest.mark.parametrize("text", ["prompt,chosen,rejected\na,b,c\n", '{"prompt": "a", "chosen": "b", "rejected": "c"}'])
def test_the_name_of_a_data_file_is_not_read_as_options(text: str):
    Path("rows").write_text(text)
    options = config("--data.train=rows", "--data.validation=rows", "--data.sft=rows")["data"]["init_args"]
    assert (options["train"], options["validation"], options["sft"]) == ("rows", "rows", "rows")


@pytest.mark.parametrize("key", ["model.policy.path", "model.init_args.policy.path"])
def test_nested_options_are_reached_by_dots(key: str):
    assert config(f"--{key}=elsewhere")["model"]["init_args"]["policy"]["path"] == "elsewhere"


def test_lora_can_be_switched_off():
    assert config("--model.lora=null")["model"]["init_args"]["lora"] is None


def test_the_refresh_needs_no_class_path_and_becomes_a_callback():
    refreshes = [c for c in parse().trainer.callbacks if isinstance(c, ReferenceRefresh)]  # type: ignore[attr-defined]
    assert [(refresh.rule.alpha, refresh.rule.tau) for refresh in refreshes] == [(0.6, 1)]


def test_one_key_of_the_refresh_is_overridden_and_the_others_stay():
    rule = config("--reference_refresh.alpha=0.3", "--reference_refresh.unit=round")["reference_refresh"]
    assert (rule["init_args"]["alpha"], rule["init_args"]["tau"], rule["init_args"]["unit"]) == (
        0.3,
        1,
        "round",
    )


@pytest.mark.parametrize("how", ["option", "file"])
def test_null_switches_the_refresh_off(how: str):
    Path("still.yaml").write_text("reference_refresh: null\n")
    built = parse(*(["--reference_refresh=null"] if how == "option" else ["--config", "still.yaml"]))
    callbacks: list[Callback] = built.trainer.callbacks  # type: ignore[attr-defined]
    assert not any(isinstance(callback, ReferenceRefresh) for callback in callbacks)
    assert None not in callbacks


def test_the_refresh_can_be_set_where_the_file_has_none():
    path = edited("reference_refresh: {alpha: 0.6, tau: 1}\n", "")
    built = AlignCLI(["--config", path, "--reference_refresh.alpha=1", "--reference_refresh.tau=512"], run=False)
    assert built.config.reference_refresh.init_args.tau == 512


def test_the_seed_is_1_by_default():
    first, second = parse(), parse()
    assert first.config.seed_everything == second.config.seed_everything == 1
    assert parse("--seed_everything=7").config.seed_everything == 7


def test_a_printed_configuration_reads_back_as_itself(capsys: pytest.CaptureFixture[str]):
    def printed(path: str) -> str:
        with pytest.raises(SystemExit):
            main(["fit", "--config", path, "--print_config"])
        return capsys.readouterr().out

    Path("printed.yaml").write_text(printed("dpo.yaml"))
    assert yaml.safe_load(Path("printed.yaml").read_text())["model"]["init_args"]["beta"] == 0.2
    assert printed("printed.yaml") == Path("printed.yaml").read_text()


def test_modules_of_the_current_folder_are_found(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("own_pairing.py").write_text("from lit_align.data import BestWorst\nclass Mine(BestWorst): ...\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = "--model=DPO --model.policy.path=m --data=OfflinePairs --data.train=t --data.pairing=own_pairing.Mine"
    with pytest.raises(SystemExit) as left:
        main(["fit", *options.split(), "--print_config"])
    assert left.value.code == 0
    assert "class_path: own_pairing.Mine" in capsys.readouterr().out
    assert sys.path[-1] == str(in_tmp)


def test_help_is_the_docstrings(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--model.help=DPO"])
    said = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "--model.beta BETA" in said
    assert "Weight of staying near the reference" in said
    assert "Train a low-rank adapter" in said, "the base class's options too"


def test_the_help_of_fit_begins_with_a_short_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = capsys.readouterr().out
    usage, description = said.split("\n\n")[:2]
    assert usage.endswith(" fit [--config X.yaml ...] [--KEY=VALUE ...]")
    assert description.startswith("Train a model, or continue the run in its folder.")
    assert "\nThe objective, and the policy that it trains:\n" in said


def test_the_help_lists_all_commands_with_a_line_each(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\S", said, re.MULTILINE), command


# --- one objective's options do not configure another ---


def test_options_written_for_one_objective_are_refused_by_another(fails: Errors):
    said = fails(*FIT, f"--model={__name__}.StrictDPO")
    assert "model.init_args.beta=0.2 is meant for DPO in dpo.yaml" in said
    assert "StrictDPO (default 2.0) would use it" in said


def test_they_are_taken_when_given_for_the_new_one():
    assert parse(f"--model={__name__}.StrictDPO", "--model.beta=0.2").model.beta == 0.2  # type: ignore[attr-defined]


def test_they_are_taken_when_a_later_file_sets_them_for_the_new_one(fails: Errors):
    mine = {"class_path": f"{__name__}.StrictDPO", "init_args": {"beta": 0.2}}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": mine}))
    assert parse("--config", "mine.yaml").model.beta == 0.2  # type: ignore[attr-defined]
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"class_path": mine["class_path"]}}))
    assert "beta=0.2 is meant for DPO in dpo.yaml" in fails(*FIT, "--config", "mine.yaml")


def test_settings_that_mean_the_same_in_both_stay():
    init_args = config("--model=IPO")["model"]["init_args"]
    assert init_args["lora"]["r"] == 4
    assert init_args["optimizer"]["init_args"]["lr"] == 1e-3


# --- W&B sweeps, by W&B's own formatter ---

SWEEP = {
    "model.init_args.beta": 0.5,
    "model.init_args.optimizer.init_args.lr": 1.2345e-07,
    "model.init_args.lora.r": 8,
    "reference_refresh.alpha": 0.25,
    "trainer.precision": "bf16-mixed",
    "trainer.deterministic": False,
    "config": "dpo.yaml",
}


@pytest.mark.parametrize("macro", ["args", "args_no_equals"])
def test_a_sweep_sets_its_parameters(macro: str):
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in SWEEP.items()}})[macro]
    swept = AlignCLI(args, run=False).config
    assert swept.model.init_args.beta == 0.5
    assert swept.model.init_args.optimizer.init_args.lr == 1.2345e-07
    assert swept.model.init_args.lora.r == 8
    assert swept.reference_refresh.init_args.alpha == 0.25
    assert swept.trainer.precision == "bf16-mixed"
    assert swept.trainer.deterministic is False


def test_a_sweep_without_hyphens_is_refused(fails: Errors):
    args = create_sweep_command_args({"args": {"model.init_args.beta": {"value": 0.5}}})["args_no_hyphens"]
    assert "options are written --key=value" in fails("fit", "--config", "dpo.yaml", *args)


def test_a_plain_null_of_a_sweep_is_refused_and_a_quoted_one_works(fails: Errors):
    plain, quoted = (
        create_sweep_command_args({"args": {"model.init_args.lora": {"value": v}}})["args"] for v in (None, "null")
    )
    assert "model.init_args.lora" in fails("fit", "--config", "dpo.yaml", *plain)
    assert parse(*quoted).config.model.init_args.lora is None
