"""The same command continues: `fit` in a folder that holds a run."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import fork
from tiny import write_pairs

from lit_align.checkpoints import newest_whole, write_hash
from lit_align.cli import AlignCLI, main
from lit_align.objectives import SFT
from lit_align.reporting.metrics_csv import read_metrics

Fit = Callable[..., str]


class Killed(BaseException):
    pass


def command(model: str, *more: str) -> list[str]:
    """A `fit` with two epochs of four steps in the folder `run`."""
    options = {
        "model": "SFT",
        "model.policy.path": model,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "model.schedule": "constant",
        "data": "OfflinePairs",
        "data.train": "pairs.jsonl",
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": "run",
        "trainer.max_epochs": 2,
        "trainer.enable_progress_bar": False,
        "trainer.log_every_n_steps": 1,
    }
    return ["fit", *(f"--{key}={value}" for key, value in options.items()), *more]


@pytest.fixture(scope="module")
def runs(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run and of one that was killed before its seventh step, two after its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    write_pairs(folder, 8)

    def kill(module: SFT, *args: object) -> None:
        if module.global_step == 6:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(command(tiny_model))
        Path("run").rename("finished")
        patch.setattr(SFT, "on_train_batch_start", kill)
        with pytest.raises(Killed):
            main(command(tiny_model))
        Path("run").rename("killed")
    return folder


@pytest.fixture
def finished(runs: Path, in_tmp: Path) -> None:
    """The folder `run` holds a finished run."""
    shutil.copytree(runs / "finished", "run", symlinks=True)


@pytest.fixture
def killed(runs: Path, in_tmp: Path) -> None:
    """The folder `run` holds a killed run."""
    shutil.copytree(runs / "killed", "run", symlinks=True)


@pytest.fixture
def fit(tiny_model: str, in_tmp: Path, blank_figures: None, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Run `fit` with more options; returns what it prints."""
    write_pairs(in_tmp, 8)

    def run(*more: str) -> str:
        capsys.readouterr()
        main(command(tiny_model, *more))
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Run a command that must fail and leave the folder as it is; returns its message."""

    def run(*args: str) -> str:
        before = contents("run")
        with pytest.raises(SystemExit) as exit:
            fit(*args)
        assert exit.value.code == 2
        assert contents("run") == before
        return capsys.readouterr().err.strip()

    return run


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def weights(folder: str | Path) -> bytes:
    return Path(folder, "model", "model.safetensors").read_bytes()


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_the_same_command_resumes_a_killed_run(fit: Fit, runs: Path, monkeypatch, fresh: list[str]):
    """Also a job that is queued again, whose command says --fresh for its first start."""
    if fresh:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Path("run/checkpoints/.step=6.ckpt.7").touch()  # was being written when the run was killed
    said = fit(*fresh)
    assert said.count("resumes run from step=4.ckpt, its newest checkpoint (--fresh starts from nothing)\n") == 1
    assert weights("run") == weights(runs / "finished")
    kept, expected = ({p.name for p in folder.glob("checkpoints/*")} for folder in (Path("run"), runs / "finished"))
    assert kept == expected, "the checkpoint that it resumed from is deleted as any other"
    steps = [row["step"] for row in read_metrics("run/metrics.csv")]
    assert steps == [row["step"] for row in read_metrics(runs / "finished" / "metrics.csv")]


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("links", [True, False], ids=["links stay", "links become files"])
def test_the_newest_checkpoint_of_a_copied_run_is_found(fit: Fit, links: bool):
    """Copies, restored backups and checkouts have other times."""
    fit("--trainer.max_epochs=3", "--checkpoint.save_top_k=-1")
    shutil.copytree("run", "copy", symlinks=links)
    for age, name in enumerate(("last", "step=12", "step=8", "step=4")):
        os.utime(f"copy/checkpoints/{name}.ckpt", (1000 + age, 1000 + age))
    said = fit("--trainer.max_epochs=4", "--trainer.default_root_dir=copy")
    assert "resumes copy from step=12.ckpt" in said
    fit("--trainer.max_epochs=4", "--trainer.default_root_dir=whole")
    assert weights("copy") == weights("whole")


@pytest.mark.usefixtures("killed")
def test_a_run_killed_before_its_checkpoint_had_a_hash_writes_it(fit: Fit):
    hashed = Path("run/checkpoints/step=4.ckpt.sha256")
    expected = hashed.read_text()
    hashed.unlink()
    fit("--checkpoint.save_top_k=-1")
    assert hashed.read_text() == expected


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_not_overwritten_but_extended(fit: Fit, refused: Fit):
    message = (
        "error: trainer.default_root_dir=run holds a finished run, which is not overwritten. To extend it, raise "
        "trainer.max_epochs=2. To start another, name another folder, or add --fresh, which moves it to run-1."
    )
    assert refused().splitlines()[-1] == message
    assert "trainer.max_epochs=1." in refused("--trainer.max_epochs=1")
    said = fit("--trainer.max_epochs=3")
    assert "resumes run from step=8.ckpt" in said
    assert "--ckpt_path" not in said
    assert said.endswith("extend     python train.py fit --config run/config.yaml --trainer.max_epochs=6\n")
    fit("--trainer.max_epochs=3", "--trainer.default_root_dir=whole")
    assert weights("run") == weights("whole")


@pytest.mark.usefixtures("finished")
def test_a_run_that_ended_within_an_epoch_is_extended_from_there(fit: Fit):
    """Epochs have four steps."""
    said = fit("--trainer.max_steps=3", "--trainer.default_root_dir=cut")
    assert said.endswith("extend     python train.py fit --config cut/config.yaml --trainer.max_steps=6\n")
    fit("--trainer.max_steps=6", "--trainer.default_root_dir=cut")
    fit("--trainer.max_steps=6", "--trainer.default_root_dir=whole")
    assert weights("cut") == weights("whole")


@pytest.mark.usefixtures("killed")
def test_other_options_are_listed(fit: Fit, refused: Fit):
    said = refused("--model.optimizer.lr=0.2", "--trainer.gradient_clip_val=1", "--trainer.devices=1")
    assert said.endswith(
        "error: trainer.default_root_dir=run holds a run with other options (then → now):\n"
        "  model.optimizer.lr: 0.1 → 0.2\n"
        "  trainer.gradient_clip_val: None → 1\n"
        "Restore its options, name another folder, or add --fresh, which moves it to run-1. To resume it with these "
        "options, name its checkpoint: --ckpt_path=run/checkpoints/step=4.ckpt"
    )
    assert "resumes run" in fit("--model.optimizer.lr=0.2", "--model.accept_changes=[model.optimizer.lr]")


@pytest.mark.usefixtures("killed")
def test_options_of_a_group_that_the_run_had_not_are_one_line(refused: Fit):
    said = refused("--reference_refresh.alpha=0.5", "--model.lora.r=4")
    assert "(then → now):\n  model.lora: None → set\n  reference_refresh: None → set\nRestore its options" in said


@pytest.mark.usefixtures("killed")
def test_a_run_without_a_checkpoint_starts_again_with_any_options(fit: Fit):
    shutil.rmtree("run/checkpoints")
    said = fit("--model.optimizer.lr=0.2", "--trainer.max_epochs=1")
    assert "run holds a run without a checkpoint; it starts from the beginning\n" in said


@pytest.mark.usefixtures("killed")
def test_fresh_moves_the_files_of_the_run_alone(fit: Fit, refused: Fit):
    before = {name.replace("run/", "run-2/", 1): data for name, data in contents("run").items()}
    Path("run/other").mkdir()
    Path("run/notes.txt").write_text("mine")
    Path("run-1").mkdir()
    said = fit("--fresh", "--model.optimizer.lr=0.2", "--trainer.max_epochs=1")
    assert "the run in run is now in run-2\n" in said
    assert "resumes" not in said
    assert contents("run-2") == before
    assert Path("run/other").exists()
    assert Path("run/notes.txt").read_text() == "mine"
    again = refused("--config=run/config.yaml", "--model.optimizer.lr=0.2", "--trainer.max_epochs=1")
    assert "holds a finished run" in again, "--fresh is not saved in config.yaml"


@pytest.mark.usefixtures("killed")
def test_a_killed_move_is_finished_by_the_next_run(fit: Fit, monkeypatch):
    """Each start but the last is killed after it has moved one file."""
    before = {name.replace("run/", "run-1/", 1): data for name, data in contents("run").items()}
    move, moved = shutil.move, []

    def dying(source: Path, target: Path) -> None:
        if moved:
            raise Killed
        moved.append(move(source, target))

    monkeypatch.setattr(shutil, "move", dying)
    for _ in [*Path("run").iterdir()]:
        with pytest.raises(Killed):
            fit("--fresh")
        moved.clear()
    monkeypatch.setattr(shutil, "move", move)
    said = fit("--trainer.max_epochs=1")
    assert "the run in run is now in run-1\n" in said
    assert contents("run-1") == before
    assert {row["epoch"] for row in read_metrics("run/metrics.csv") if "epoch" in row} == {0}


def test_a_configuration_that_no_run_wrote_is_kept(refused: Fit):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: mine\n")
    assert "run/config.yaml was not written by a run, and a run in this folder would overwrite it" in refused()


@pytest.mark.usefixtures("killed")
def test_a_random_seed_is_kept_by_the_resumed_run(tiny_model: str, monkeypatch):
    write_pairs(Path(), 8)
    text = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(text.replace("seed_everything: 1\n", "seed_everything: 77\n"))
    options = ["--seed_everything=true", *command(tiny_model)[1:]]
    assert AlignCLI(options, run=False).config["seed_everything"] == 77
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert AlignCLI([*options, "--fresh"], run=False).config["seed_everything"] != 77


@pytest.mark.usefixtures("finished")
def test_another_runs_checkpoint_does_not_overwrite_a_finished_run(refused: Fit, runs: Path):
    named = f"--ckpt_path={runs}/finished/checkpoints/last.ckpt"
    said = refused(named, "--trainer.max_epochs=3")
    assert "trainer.default_root_dir=run holds a finished run, and ckpt_path=" in said
    assert said.endswith("checkpoints/last.ckpt belongs to another. Name another folder.")


RATE = ["--model.optimizer.lr=0.2", "--model.accept_changes=[model.optimizer.lr]", "--checkpoint.save_top_k=-1"]


@pytest.fixture
def killed_at(tiny_model: str, fit: Fit) -> Callable[..., str]:
    """Run `fit` in a process that is killed before a step; returns what it prints."""

    def run(step: int, *args: str) -> str:
        def kill(module: SFT, *more: object) -> None:
            if module.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def doomed() -> None:
            sys.stdout = Path("said").open("w", buffering=1)  # noqa: SIM115
            SFT.on_train_batch_start = kill
            main(command(tiny_model, *args))

        assert fork(doomed) == -signal.SIGKILL
        return Path("said").read_text()

    return run


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("where", ["run", "other"], ids=["of its own folder", "of another folder"])
def test_a_run_from_a_named_checkpoint_continues_by_the_same_command(fit: Fit, killed_at, refused: Fit, where: str):
    """Not again from that checkpoint, once it has one of its own."""
    Path("run").rename("before")
    shutil.copytree("before", where, symlinks=True)
    named = f"--ckpt_path={where}/checkpoints/step=4.ckpt"
    args = [named, *RATE, "--trainer.max_epochs=4"]
    assert "resumes" not in killed_at(6, *args)
    assert "resumes" not in killed_at(10, *args), "it had no checkpoint of its own"
    for _ in range(2):
        said = killed_at(10, *args)
        assert "resumes run from step=8.ckpt, its newest checkpoint (to start again from " in said
    assert "resumes run from step=8.ckpt" in fit(*args)
    assert "run holds a finished run, which is not overwritten" in refused(*args)

    fit("--ckpt_path=before/checkpoints/step=4.ckpt", *args[1:], "--trainer.default_root_dir=whole")
    assert weights("run") == weights("whole")


@pytest.mark.usefixtures("finished")
def test_another_command_starts_from_the_checkpoint_that_it_names(fit: Fit, killed_at):
    """The checkpoints beyond it, of the start before, are not the newest any more."""
    fit("--trainer.max_epochs=4", "--checkpoint.save_top_k=-1")
    named = "--ckpt_path=run/checkpoints/step=12.ckpt"
    longer = ["--trainer.max_epochs=6", "--checkpoint.save_top_k=-1"]
    assert "resumes" not in killed_at(18, named, *longer)
    Path("run/checkpoints/step=16.ckpt").rename("run/checkpoints/other.ckpt")
    torch.save(torch.load("run/checkpoints/other.ckpt", weights_only=True) | {"starts": 1}, "run/checkpoints/old.ckpt")
    os.utime("run/checkpoints/other.ckpt", (1000, 1000))
    assert "resumes run from other.ckpt" in killed_at(18, *longer)
    assert "resumes" not in killed_at(18, named, *longer), "the last start named none"
    assert "resumes" not in killed_at(18, named, *longer, *RATE[:2]), "other options"


@pytest.mark.usefixtures("killed")
def test_fresh_from_a_named_checkpoint_moves_the_run_before(fit: Fit, refused: Fit, runs: Path):
    said = refused("--fresh", "--ckpt_path=run/checkpoints/step=4.ckpt")
    assert "ckpt_path=run/checkpoints/step=4.ckpt is of the run in run, which --fresh moves. Leave" in said
    assert "ckpt_path=last is of the run in run" in refused("--fresh", "--ckpt_path=last")
    said = fit("--fresh", f"--ckpt_path={runs}/killed/checkpoints/step=4.ckpt")
    assert "the run in run is now in run-1\n" in said
    assert weights("run") == weights(runs / "finished")


def test_a_folder_of_checkpoints_is_no_checkpoint(refused: Fit, runs: Path):
    newest = (runs / "finished/checkpoints/last.ckpt").resolve()
    for name in ("finished", "finished/checkpoints"):
        said = refused(f"--ckpt_path={runs}/{name}")
        assert said.endswith(f"{name} is a folder, not a checkpoint. Name the newest one in it: {newest}"), said


def test_the_newest_checkpoint_that_is_whole_is_found(in_tmp: Path):
    for age, name in enumerate(("new", "damaged", "torn", "old")):
        torch.save({"step": age}, f"{name}.ckpt")
        write_hash(f"{name}.ckpt")
        os.utime(f"{name}.ckpt", (1000 - age, 1000 - age))
    Path("last.ckpt").symlink_to("new.ckpt")
    assert newest_whole([in_tmp]) == in_tmp / "new.ckpt"
    Path("new.ckpt").unlink()
    Path("damaged.ckpt").write_bytes(b"damaged")
    os.utime("damaged.ckpt", (999, 999))
    Path("torn.ckpt").write_bytes(b"PK")
    Path("torn.ckpt.sha256").unlink()
    assert newest_whole([in_tmp]) == in_tmp / "old.ckpt"
    assert newest_whole([in_tmp / "none"]) is None
