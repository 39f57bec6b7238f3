"""The files that a run writes, and what they keep of its configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from command_line import FIT

from lit_align.cli import AlignCLI, main
from lit_align.cli.continuation import check_verdict_is_ours
from lit_align.errors import UserError
from lit_align.objectives import IPO

pytestmark = pytest.mark.usefixtures("folder")

CHECKPOINT = "--ckpt_path=run/checkpoints/last.ckpt"


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
    )
    import wandb

    assert wandb.run is not None
    assert Path(wandb.run.dir).absolute().is_relative_to(Path("run").absolute())
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


def test_a_verdict_does_not_replace_that_of_another_run(tmp_path: Path):
    for name in ("moved run", "run"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        for file in ("config.yaml", "run.json"):
            (tmp_path / name / file).touch()
    moved = tmp_path / "moved run"
    with pytest.raises(UserError, match=r"Add --trainer\.default_root_dir='moved run'"):
        check_verdict_is_ours(f"{moved}/checkpoints/last.ckpt", f"{tmp_path}/run")
    check_verdict_is_ours(f"{moved}/checkpoints/last.ckpt", str(moved))
    check_verdict_is_ours(f"{moved}/checkpoints/last.ckpt", f"{tmp_path}/new")
