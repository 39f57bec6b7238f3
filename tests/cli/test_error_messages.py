"""Each error of the user is one paragraph that names the key, the value and the fix."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import DPO_YAML, FIT, Errors, edited
from lightning.pytorch import Trainer
from tiny import REWARDS

from lit_align import cli
from lit_align.cli import AlignCLI, main
from lit_align.console import paragraph
from lit_align.errors import UserError

pytestmark = pytest.mark.usefixtures("folder")


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
        (["--model.lr=1"], "model.init_args.lr", "'optimizer.init_args.lr'"),
        (["--model.gamma=1"], "model.init_args.gamma", "It is an option of MPO, SimPO."),
        (["--data.prompts=p.jsonl"], "data.init_args.prompts", "It is an option of OnPolicyPairs."),
        (["--model.policy=m"], "model.init_args.policy=m must be options", "Set model.init_args.policy.path=m."),
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
        ("class_path: DPO", "class_path: TR-DPO", "model", "TR-DPO is DPO with a moving reference (reference_refresh)"),
        ("  class_path: DPO\n", "", "model", "no class is named, so its options are not known. Name it first:"),
        ("torch.optim.AdamW", "adamw", "model.init_args.optimizer", "no class 'adamw'. Did you mean 'AdamW'?"),
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
    assert "data.init_args.scorer: OfflinePairs has no option 'scorer'. It is an option of OnPolicyPairs. See: " in said
    assert "model.init_args.lora=5 must be options (key: value) or null" in fails(*FIT, "--model.lora=5")
    said = fails("fit", "--config", edited("lora: {r: 4}", "lora: true"))
    assert "model.init_args.lora=True must be options (key: value) or null" in said
    said = fails("fit", "--data.scorer.help=FunctionScorer")
    assert "data: no class is named, so its options are not known. Name it first: --data=NAME. Known: Off" in said


def test_the_start_is_not_compared_with_itself(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "rewards.py").write_text(REWARDS)
    verdict = ["--win_rate.prompts=pairs.jsonl", "--win_rate.scorer=FunctionScorer"]
    with pytest.raises(UserError, match=r"test: ckpt_path is not set.*: --ckpt_path=run/checkpoints/last"):
        AlignCLI(["test", *FIT[1:], *verdict, "--win_rate.scorer.function=rewards.py:reward"])


def test_a_missing_file_is_named(fails: Errors):
    assert fails("fit", "--config", "dpo.yml") == (
        "error: config: there is no file 'dpo.yml'. Did you mean 'dpo.yaml'?"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [{r: 16, lr: 0,001}, [0,1]]\n", "0,001 in line 2 must be written with a point. Write 0.001."),
        ("model:\n  beta: 1\n  tau: {a: 1}\n  beta: 2\n", "model.beta is given twice, in lines 2 and 4. Delete one."),
        ("model:\n  beta: 1\n\ttau: 1\n", "line 3 is indented with a tab. Indent with spaces."),
        ("model: caf\xe9\n", "line 1 is not UTF-8. Save the file with the encoding UTF-8."),
    ],
)
def test_a_mistake_that_yaml_parsers_pass_over_is_named(fails: Errors, text: str, said: str):
    Path("odd.yaml").write_bytes(text.encode("latin-1"))
    assert fails("fit", "--config", "odd.yaml") == f"error: config: {said} (in odd.yaml)"


@pytest.mark.parametrize("text", ["model: [1", "just text", "", "model: {[a, b]: 1}"])
def test_a_file_that_is_not_a_yaml_of_keys_is_named(fails: Errors, text: str):
    Path("bad.yaml").write_text(text)
    assert "not a YAML with keys and values" in (said := fails("fit", "--config", "bad.yaml"))
    assert said.endswith("(in bad.yaml)")


ROUNDS = ("fit", "--model=DPO", "--model.policy.path=m", "--data=OnPolicyPairs", "--data.prompts=p.jsonl")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit"], "model: not given. Name a YAML (python train.py fit --config X.yaml) or a class"),
        (["fit", "--model=DPO"], "model.init_args.policy.path: DPO needs a value"),
        ([], "python train.py fit --config X.yaml"),
        (["--config", "dpo.yaml"], "a command is needed: python train.py fit --config X.yaml. Known: fit, validate"),
        (["fitt", "--config", "dpo.yaml"], "there is no command 'fitt'. Did you mean 'fit'?"),
        ([*FIT, "stray"], "'stray' is not an option"),
        (
            ["fit", "dpo.yaml"],
            "'dpo.yaml' is not an option: options are written --key=value. A file is given as --config",
        ),
        ([*FIT, "--trainer.callbacks=EarlyStopping"], "is not a list. Add it to the list: --trainer.callbacks+=Early"),
        (
            [*FIT, "--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"],
            "there are two ModelCheckpoint with the same options, so that a checkpoint cannot tell their states apart",
        ),
        ([*ROUNDS, "--data.scorer=r.py:f"], "scorer=r.py:f is a function. Write class_path: FunctionScorer, and under"),
        ([*ROUNDS, "--data.scorer=Judge"], "data.init_args.scorer: there is no class 'Judge'. Known: Ensemble"),
        ([*FIT, "--trainer.accelerator=mps"], "trainer.accelerator=mps needs a device that torch does not see here."),
        ([*FIT, "--seed_everything=-1"], "seed_everything=-1 must be at least 0 and below 2³²."),
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


def test_an_error_of_wandb_is_one_paragraph(fails: Errors, monkeypatch: pytest.MonkeyPatch):
    class Error(Exception):
        pass

    def fit(*args: object, **kwargs: object) -> None:
        raise Error("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb.errors", SimpleNamespace(Error=Error))
    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(cli, "quiet", lambda: None)
    assert fails(*FIT, "--model.policy.path=nowhere").endswith("error: No API key configured.")


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


@pytest.mark.parametrize(
    "args", [["export", "run", "--adapter=true"], ["serve", "--print=1", *FIT[1:]], ["doctor", "--memory=8", *FIT[1:]]]
)
def test_a_flag_with_a_value_is_refused(fails: Errors, args: list[str]):
    flag = next(arg.partition("=")[0] for arg in args if arg.startswith("--") and not arg.startswith("--config"))
    assert f"{flag} takes no value. Write {flag} alone, or leave it out." in fails(*args)


def test_a_command_that_has_nothing_to_do_says_so(fails: Errors, tiny_model: str):
    given = (*FIT[1:], f"--model.policy.path={tiny_model}")
    for command, said in {"test": "there is nothing to test", "predict": "predict needs prompts"}.items():
        assert said in fails(command, *given)
