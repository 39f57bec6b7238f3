"""The options of the command line, its error messages, and the files that a run writes."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lit_align import cli
from lit_align.callbacks import ReferenceRefresh
from lit_align.cli import AlignCLI, main
from lit_align.cli.commands import COMMANDS
from lit_align.console import paragraph
from lit_align.errors import UserError
from lit_align.objectives import DPO, IPO

CONFIGS = Path(__file__).parents[2] / "configs"

DPO_YAML = """
model:
  class_path: DPO
  init_args:
    policy: {path: ./model, dtype: float32}
    lora: {r: 4}
    beta: 0.2
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: OfflinePairs
  init_args: {train: pairs.jsonl, batch_size: 2}
reference_refresh: {alpha: 0.6, tau: 1}
trainer:
  max_epochs: 1
  accelerator: cpu
  default_root_dir: run
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""

Errors = Callable[..., str]


class StrictDPO(DPO):
    """An objective of the user's own, with another default.

    Args:
        beta: Weight of staying near the reference.
    """

    def __init__(self, beta: float = 2.0, **kwargs):
        super().__init__(beta=beta, **kwargs)


@pytest.fixture(autouse=True)
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with dpo.yaml and pairs.jsonl, in which `python train.py` runs."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    rows = [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": f"{i}, or so"} for i in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("dpo.yaml").write_text(DPO_YAML)
    return in_tmp


def parse(*args: str) -> AlignCLI:
    """All of it built, nothing run: no model is loaded before a run."""
    return AlignCLI(["--config", "dpo.yaml", *args], run=False)


def config(*args: str) -> dict:
    return parse(*args).config.as_dict()


def edited(old: str, new: str) -> str:
    """Name of a copy of dpo.yaml with one thing changed."""
    assert old in DPO_YAML
    Path("edited.yaml").write_text(DPO_YAML.replace(old, new))
    return "edited.yaml"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Errors:
    """Run a command that must fail with exit code 2, and return its one paragraph on stderr."""

    def run(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(list(args))
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1, "one paragraph"
        for noise in ("usage", "Traceback", "NoneType", "Namespace", "Union"):
            assert noise not in printed.err
        assert not printed.out
        return printed.err.strip()

    return run


# --- options ---


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


def test_help_is_the_docstrings(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--model.help=DPO"])
    said = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "--model.beta BETA" in said
    assert "Weight of staying near the reference" in said
    assert "Train a low-rank adapter" in said, "the base class's options too"


def test_the_help_lists_all_commands_with_a_line_each(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\S", said, re.MULTILINE), command


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


# --- error messages ---

FIT = ("fit", "--config", "dpo.yaml")


def test_an_unknown_key_is_named_with_the_nearest_one_and_all_there_are(fails: Errors):
    said = fails(*FIT, "--model.init_args.bta=1")
    assert said.startswith("error: model.init_args.bta: DPO has no option 'bta'. Did you mean 'beta'? Options: ")
    assert "label_smoothing" in said
    assert "proximal" in said, "the base class's options too"
    assert said.endswith("See: python train.py fit --model.help=DPO")
    assert fails("fit", "--config", edited("beta: 0.2", "bta: 0.2")) == f"{said} (in edited.yaml)"


@pytest.mark.parametrize(
    ("args", "key", "fix"),
    [
        (["--model.policy.dtpe=float32"], "model.init_args.policy.dtpe", "'policy.dtype'"),
        (["--model.lora.rank=4"], "model.init_args.lora.rank", "Options: r, alpha"),
        (["--model.optimizer.lrr=1"], "model.init_args.optimizer.init_args.lrr", "'lr'"),
        (["--reference_refresh.alhpa=1"], "reference_refresh.alhpa", "'alpha'"),
        (["--data.bach_size=1"], "data.init_args.bach_size", "'batch_size'"),
        (["--trainer.max_epoks=1"], "trainer.max_epoks", "'trainer.max_epochs'"),
        (["--trainr.max_epochs=1"], "trainr.max_epochs", "'trainer.max_epochs'"),
        (["--beta=1"], "beta", "'model.beta'"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitr=x"], "monitr", "'monitor'"),
    ],
)
def test_unknown_keys_anywhere(fails: Errors, args: list[str], key: str, fix: str):
    said = fails(*FIT, *args)
    assert key in said
    assert fix in said


@pytest.mark.parametrize(
    ("old", "new", "key", "fix"),
    [
        ("dtype: float32", "dtpe: float32", "model.init_args.policy.dtpe", "'policy.dtype'"),
        ("r: 4", "rank: 4", "model.init_args.lora.rank", "Options: r, alpha"),
        ("lr: 1", "lrr: 1", "model.init_args.optimizer.init_args.lrr", "'lr'"),
        ("tau: 1", "tua: 1", "reference_refresh.tua", "'tau'"),
        ("max_epochs", "max_epoks", "trainer.max_epoks", "'trainer.max_epochs'"),
        ("init_args: {train: pairs.jsonl, batch_size: 2}", "train: pairs.jsonl", "data", "under init_args:"),
        ("class_path: DPO", "class_pth: DPO", "model", "class_path: NAME"),
    ],
)
def test_unknown_keys_in_a_file(fails: Errors, old: str, new: str, key: str, fix: str):
    said = fails("fit", "--config", edited(old, new))
    assert f"error: {key}: " in said
    assert fix in said


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.beta=abc", "model.init_args.beta: 'abc' is not a number."),
        ("model.beta=null", "model.init_args.beta: 'null' is not a number."),
        ("model.lora.r=1.5", "model.init_args.lora.r: '1.5' is not an integer."),
        ("model.optimizer.lr=fast", "model.init_args.optimizer.init_args.lr: 'fast' is not a number."),
        ("reference_refresh.unit=steps", "'steps' is not one of step, round. Did you mean 'step'?"),
        ("model.schedule=cosin", "'cosin' is not one of constant, linear, cosine. Did you mean 'cosine'?"),
        ("trainer.max_epochs=two", "trainer.max_epochs: 'two' is not an integer or null."),
        ("seed_everything=x", "seed_everything: 'x' is not true or false or an integer."),
    ],
)
def test_a_wrong_value_is_named_with_the_allowed_values(fails: Errors, option: str, said: str):
    assert said in fails(*FIT, f"--{option}")


def test_null_in_a_file_is_not_a_number(fails: Errors):
    assert "model.init_args.beta: 'null' is not a number" in fails("fit", "--config", edited("beta: 0.2", "beta:"))


@pytest.mark.parametrize("how", ["option", "file"])
def test_an_unknown_class_is_named_with_those_there_are(fails: Errors, how: str):
    args = [*FIT, "--model=DPOO"] if how == "option" else ["fit", "--config", edited("path: DPO", "path: DPOO")]
    said = fails(*args)
    assert said.startswith("error: model: there is no class 'DPOO'. Did you mean 'DPO'? Known: ")
    assert "IPO" in said
    assert "AnchoredObjective" not in said, "a base, with no loss of its own"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("lit_align.nowhere.DPO", "cannot import 'lit_align.nowhere.DPO'"),
        ("torch.nn.Linear", "torch.nn.Linear is not a subclass of PreferenceObjective. Known: "),
    ],
)
def test_a_class_path_that_leads_nowhere(fails: Errors, path: str, said: str):
    assert said in fails("fit", "--config", edited("class_path: DPO", f"class_path: {path}"))


def test_a_function_is_refused_and_not_called(fails: Errors):
    """To instantiate the configuration would run it."""
    adamw = "{class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}"
    system = "{class_path: os.system, init_args: {command: touch called}}"
    said = fails("fit", "--config", edited(adamw, system))
    assert "model.init_args.optimizer.class_path=os.system must be a class" in said
    assert not Path("called").exists()
    assert "optimizer: os.system is not a subclass of Optimizer" in fails("fit", "--config", edited(adamw, "os.system"))


def test_an_option_below_one_that_does_not_exist_names_the_upper_one(fails: Errors):
    said = fails(*FIT, "--data.scorer.help=FunctionScorer")
    assert "data.init_args.scorer: OfflinePairs has no option 'scorer'. See: " in said
    assert "model.init_args.lora=5 must be options (key: value) or null" in fails(*FIT, "--model.lora=5")


def test_a_missing_file_is_named(fails: Errors):
    assert fails("fit", "--config", "dpo.yml") == (
        "error: config: there is no file 'dpo.yml'. Did you mean 'dpo.yaml'?"
    )


@pytest.mark.parametrize("text", ["model: [1", "just text", ""])
def test_a_file_that_is_not_a_yaml_of_keys_is_named(fails: Errors, text: str):
    Path("bad.yaml").write_text(text)
    assert "not a YAML with keys and values" in (said := fails("fit", "--config", "bad.yaml"))
    assert said.endswith("(in bad.yaml)")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit"], "model: not given. Name a YAML (python train.py fit --config X.yaml) or a class"),
        (["fit", "--model=DPO"], "model.init_args.policy.path: DPO needs a value"),
        ([], "python train.py fit --config X.yaml"),
        (["--config", "dpo.yaml"], "a command is needed: python train.py fit --config X.yaml. Known: fit, validate"),
        (["fitt", "--config", "dpo.yaml"], "there is no command 'fitt'. Did you mean 'fit'?"),
        ([*FIT, "stray"], "'stray' is not an option"),
        ([*FIT, "--model.beta"], "needs a value"),
        (["--config=dpo.yaml", "fit"], "the command must be the first argument: python train.py fit"),
        (["--trainer.max_epochs=1", "fit"], "the command must be the first argument"),
        ([*FIT, "--trainer=null"], "trainer=null must be options (key: value)"),
    ],
)
def test_missing_arguments_are_named(fails: Errors, args: list[str], said: str):
    assert said in fails(*args)


def test_a_trainer_of_null_in_a_file_is_refused(fails: Errors):
    Path("no_trainer.yaml").write_text(DPO_YAML.partition("trainer:")[0] + "trainer: null\n")
    assert "trainer=null must be options (key: value)" in fails("fit", "--config", "no_trainer.yaml")


def test_data_is_required(fails: Errors):
    Path("half.yaml").write_text(DPO_YAML.partition("data:")[0])
    assert "data: not given." in (said := fails("fit", "--config", "half.yaml"))
    assert "OfflinePairs" in said


def test_abbreviated_options_are_refused(fails: Errors):
    assert "Did you mean 'trainer.max_epochs'?" in fails(*FIT, "--trainer.max_epoch=3")


def test_the_packages_own_checks_end_in_a_paragraph(fails: Errors):
    assert "reference_refresh.alpha=2.0 must be in (0, 1]" in fails(*FIT, "--reference_refresh.alpha=2")
    assert "beta=-1.0" in fails(*FIT, "--model.beta=-1")


def test_a_user_error_during_the_run_ends_in_a_paragraph(fails: Errors, monkeypatch: pytest.MonkeyPatch):
    def fit(*args: object, **kwargs: object) -> None:
        raise UserError("pairs.jsonl, row 3: no 'chosen'.")

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(cli, "quiet", lambda: None)
    assert fails(*FIT, "--model.policy.path=nowhere").endswith("error: pairs.jsonl, row 3: no 'chosen'.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["export", "run", "--out", "dpo.yaml"], "--out=dpo.yaml must be a folder, not a file"),
        (["compare", "a", "b", "--out", "."], "--out=. must be a file, not a folder"),
        ([*FIT, "--ckpt_path=best"], "ckpt_path=best has no effect here"),
        ([*FIT, "--ckpt_path=none.ckpt"], "ckpt_path=none.ckpt does not exist"),
        ([*FIT, "--ckpt_path=dpo.yaml"], "ckpt_path=dpo.yaml is not a valid checkpoint"),
        ([*FIT, "--ckpt_path=https://x.org/a.ckpt"], "must be a file: a checkpoint from the web may run code"),
        ([*FIT, "--trainer.fast_dev_run=2"], "trainer.fast_dev_run=2 is refused because it would overwrite"),
        ([*FIT, "--ckpt_path=last"], "there is no last checkpoint in a run without checkpoints"),
        (
            [*FIT, "--ckpt_path=last", "--trainer.enable_checkpointing=true"],
            "there is no last checkpoint in run/checkpoints. Name one",
        ),
        ([*FIT, "--trainer.default_root_dir=dpo.yaml", "--model.policy.path={model}"], "dpo.yaml"),
    ],
)
def test_files_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str], tiny_model: str, args, said: str):
    with pytest.raises(SystemExit) as exit:
        main([arg.format(model=tiny_model) for arg in args])
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last


def test_a_package_that_a_logger_needs_is_named(capsys: pytest.CaptureFixture[str], tiny_model: str, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(SystemExit):
        main(
            [
                *FIT,
                f"--model.policy.path={tiny_model}",
                "--trainer.logger=TensorBoardLogger",
                "--trainer.logger.save_dir=.",
            ]
        )
    assert "error: a package is missing: Neither `tensorboard` nor" in capsys.readouterr().err


def test_an_objective_that_passes_no_policy_on_is_told(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch):
    code = "from lit_align.objectives import DPO\nclass Bare(DPO):\n    def __init__(self, weight: float = 1.0):\n"
    (folder / "bare_objective.py").write_text(code + "        super().__init__()\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(SystemExit):
        main(["fit", "--model=bare_objective.Bare", "--data=OfflinePairs", "--data.train=pairs.jsonl"])
    said = capsys.readouterr().err
    assert "missing 1 required positional argument: 'policy'. Take it in the __init__ of your class" in said
    assert "Traceback" not in said


def test_the_last_checkpoint_is_found_by_its_name(fit: Callable[..., None]):
    saving = "--trainer.enable_checkpointing=true"
    fit(saving)
    fit(saving, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8


def test_ctrl_c_before_a_fit_takes_it_over_is_a_line(monkeypatch, capsys: pytest.CaptureFixture[str]):
    def fit(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(SystemExit) as exit:
        main(list(FIT))
    assert exit.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def fit(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(ValueError, match="a bug"):
        main(list(FIT))


def test_lines_break_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch):
    text = "error: " + "word " * 40
    assert paragraph(text).count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, paragraph(text).splitlines())) <= 80


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


# --- the files of a run, and resuming ---

CHECKPOINT = "--ckpt_path=run/checkpoints/last.ckpt"


@pytest.fixture
def fit(tiny_model: str) -> Callable[..., None]:
    return lambda *args: main([*FIT, f"--model.policy.path={tiny_model}", *args])


def test_a_fresh_run_moves_the_files_of_the_one_before(fit: Callable[..., None]):
    for beta in (0.4, 0.2):
        fit(f"--model.beta={beta}", "--trainer.limit_train_batches=1", "--fresh")
    for folder, beta in {"run-1": 0.4, "run": 0.2}.items():
        saved = yaml.safe_load(Path(folder, "config.yaml").read_text())
        assert saved["model"]["init_args"]["beta"] == beta
        assert "fresh" not in saved


@pytest.mark.parametrize("wrong", [["--model.policy.path=/no/such"], ["--reference_refresh.tau=3", CHECKPOINT]])
def test_a_run_that_is_refused_leaves_the_configuration_of_the_last(fit: Callable[..., None], wrong: list[str]):
    refresh = ["--reference_refresh.alpha=1", "--reference_refresh.tau=2"]
    fit(*refresh, "--trainer.enable_checkpointing=true")
    saved = Path("run/config.yaml").read_text()
    with pytest.raises(SystemExit):
        fit(*refresh, "--trainer.enable_checkpointing=true", *wrong)
    assert Path("run/config.yaml").read_text() == saved


def test_validation_leaves_the_configuration_of_training_alone(tiny_model: str):
    main(["validate", *FIT[1:], f"--model.policy.path={tiny_model}", "--data.validation=pairs.jsonl"])
    assert [path.name for path in Path("run").iterdir()] == ["config_validate.yaml"]


def test_the_saved_configuration_is_a_configuration(fit: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    fit("--trainer.limit_train_batches=1")
    saved = Path("run/config.yaml").read_text()
    main(["fit", "--config", "run/config.yaml", "--fresh"])
    assert Path("run/config.yaml").read_text() == saved


def test_a_checkpoint_does_not_replace_the_configuration(fit: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    fit("--trainer.enable_checkpointing=true")
    checkpoint = Path("run/checkpoints/last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert kept["beta"] == 0.2, "there is something that could replace it"

    seen: list[IPO] = []
    monkeypatch.setattr(AlignCLI, "_run_subcommand", lambda self, subcommand: seen.append(self.model))
    fit("--model=IPO", "--model.beta=0.9", f"--ckpt_path={checkpoint}")
    assert type(seen[0]) is IPO
    assert seen[0].beta == 0.9


def test_the_saved_configuration_leaves_out_the_resumed_checkpoint(fit: Callable[..., None]):
    fit("--trainer.enable_checkpointing=true")
    fit("--trainer.max_epochs=2", "--ckpt_path=run/checkpoints/last.ckpt")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 2
    assert saved["ckpt_path"] is None


def test_wandb_gets_the_configuration(fit: Callable[..., None]):
    fit(
        "--trainer.limit_train_batches=1",
        "--trainer.logger=WandbLogger",
        "--trainer.logger.mode=offline",
        "--trainer.logger.save_dir=run",
    )
    import wandb

    assert wandb.run is not None
    assert wandb.run.config["cli"]["model"]["init_args"]["beta"] == 0.2
    saved = yaml.safe_load((Path(wandb.run.dir) / "lit_align.yaml").read_text())
    assert saved["reference_refresh"]["init_args"]["alpha"] == 0.6
    wandb.finish()


def test_a_first_run_says_nothing_that_nobody_can_act_on(
    fit: Callable[..., None], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
):
    fit("--trainer.limit_train_batches=1", "--trainer.enable_checkpointing=true", "--trainer.logger=true")
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "GPU available" in said, "what is said was caught"
    for noise in (
        "eval mode",
        "many workers",
        "litlogger",
        "litmodels",
        "tensorboardX",
        "TPU",
        "across ranks",
    ):
        assert noise not in said
