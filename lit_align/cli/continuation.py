"""`fit` in a folder that holds a run: the same command continues an unfinished run and overwrites no finished one.

| the folder holds | the same command | with other options |
|---|---|---|
| an unfinished run | resumes from its newest whole checkpoint | is refused, with the list of differences |
| a finished run | is refused | is refused; a larger `trainer.max_epochs` (`max_steps`, `max_time`) extends the run |
| a run without a checkpoint | starts from the beginning | starts from the beginning |

`--fresh` moves the run's files beside the folder (`FOLDER-1`, `FOLDER-2`, ...) and starts from nothing. They are
gathered within the folder first, so that a killed move is finished by the next `fit`. A job that its scheduler restarts
ignores `--fresh`, so that the same script continues.

An explicit `ckpt_path` is used as given, but for one case: the run in the folder has started from it by the same
command. It then continues like any other, from its newest checkpoint since.
"""

import os
import shlex
import shutil
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.checkpoints import check_hash, complete_hash, newest_whole
from lit_align.console import print_line, relative
from lit_align.errors import UserError
from lit_align.provenance import Table, differences, listed
from lit_align.reporting.run_folder import run_files, run_of
from lit_align.reporting.run_record import RunRecord

LENGTH = {"trainer.max_epochs", "trainer.max_steps", "trainer.max_time"}
"""Options by which a run is extended."""
FREE = LENGTH | {
    "fresh",
    "ckpt_path",
    "checkpoint",
    "data.batch_size",  # with the number of processes; checkpoints compare the examples of a step
    "data.wait_minutes",
    "fsdp_sharding",
    "model.accept_changes",
    "model.policy.path",  # checkpoints compare the weights
    "model.policy.revision",
    "model.lora.adapter",
    *(
        f"trainer.{name}"
        for name in (
            "accelerator",
            "default_root_dir",
            "detect_anomaly",
            "devices",
            "enable_checkpointing",
            "enable_model_summary",
            "enable_progress_bar",
            "log_every_n_steps",
            "logger",
            "num_nodes",
            "num_sanity_val_steps",
            "plugins",
            "profiler",
            "strategy",
        )
    ),
}
"""Options that may differ when a run is resumed: they change none of its numbers, or its checkpoints check them."""


GATHERED = ".set_aside"
"""Folder in a run's folder for the files that `--fresh` moves."""


def checkpoint_to_resume(trainer: Trainer, config: dict[str, Any], *, fresh: bool) -> str | Path | None:
    """The checkpoint from which a `fit` continues the run in its folder; None to start one.

    Args:
        config: The command's configuration, as plain values.
        fresh: Whether to set aside the run in the folder.

    Raises:
        UserError: the folder holds a finished run, or a run with another configuration, or another run's checkpoint is
            named.
    """
    folder, named = Path(trainer.default_root_dir), config.get("ckpt_path")
    if (fresh and not _is_started_again()) or (folder / GATHERED).exists():
        _refuse_to_move(named, folder)
        if trainer.is_global_zero:
            _set_aside(trainer)
        return named
    if trainer.is_global_zero:
        _delete_half_written(trainer)
    record = RunRecord.read(folder)
    since = _first_start_from(named, record, folder, config) if named else -1
    newest = None if since is None else newest_whole([folder, *checkpoint_folders(trainer)], since)
    if named and newest is None:
        _check_named(trainer, named, record)
        return named
    ended = record is not None and record.ended
    if newest is None and not ended:
        if record is not None:
            print_line(f"{relative(folder)} holds a run without a checkpoint; it starts from the beginning")
        return None
    then = _read(folder / "config.yaml", config)
    changed = differences(then, _flat(config))
    _refuse_changes(folder, newest, changed, then, config)
    if newest is None or (ended and not any(map(_extends, changed.items()))):
        raise _finished(folder, config, newest)
    if trainer.is_global_zero:
        complete_hash(newest)
    again = f"to start again from {named}, name another folder" if named else "--fresh starts from nothing"
    print_line(f"resumes {relative(folder)} from {newest.name}, its newest checkpoint ({again})")
    last = newest.with_name("last.ckpt")  # by this name, for Lightning never deletes the file that a run resumed from
    return last if last.is_symlink() and last.resolve() == newest.resolve() else newest


def seed_to_resume(folder: str | Path) -> int | None:
    """The seed of the run in a folder, which a command with `seed_everything: true` continues; None without one."""
    return _read(Path(folder, "config.yaml"), {}).get("seed_everything")


def check_config_is_ours(folder: Path) -> None:
    """Check that a run would overwrite no config.yaml but that of a run.

    Raises:
        UserError: it would.
    """
    path = folder / "config.yaml"
    if path.exists() and RunRecord.read(folder) is None and not path.read_bytes().startswith(b"# lit_align=="):
        raise UserError(
            f"{relative(path)} was not written by a run, and a run in this folder would overwrite it. Rename it, or "
            "name another folder (trainer.default_root_dir)."
        )


def check_ckpt_path(path: str, *, sharded: bool) -> None:
    """Check that `ckpt_path` names a checkpoint on this machine; what it holds is checked when it is loaded.

    Raises:
        UserError: it names none, a folder of several, or a folder of shards for a run that is not sharded.
    """
    if path == "best":
        raise UserError(
            "ckpt_path=best has no effect here: only the process that trained knows which is best. Name a checkpoint."
        )
    if path.startswith(("http://", "https://")):
        raise UserError(
            f"ckpt_path={path} must be a file: a checkpoint from the web may run code. Download it and check where it "
            "comes from."
        )
    if path in ("last", "hpc", "registry") or "://" in path:
        return
    if not Path(path).exists():
        raise UserError(f"ckpt_path={path} does not exist. Name a file in the run's checkpoints/ folder.")
    if Path(path).is_file() and not zipfile.is_zipfile(path):  # as torch.save writes it
        check_hash(path)
        raise UserError(
            f"ckpt_path={path} is not a valid checkpoint (truncated?). Checkpoints are in the run's checkpoints/ "
            "folder."
        )
    if Path(path).is_dir() and not (Path(path) / ".metadata").exists():
        newest = newest_whole([Path(path), Path(path, "checkpoints")])
        named = f"the newest one in it: {relative(newest)}" if newest else "a file in the run's checkpoints/ folder."
        raise UserError(f"ckpt_path={path} is a folder, not a checkpoint. Name {named}")
    if Path(path).is_dir() and not sharded:
        raise UserError(
            f"ckpt_path={relative(path)} is a folder of shards, which only a sharded run reads, on any number of "
            "processes. Add --config configs/overlays/fsdp.yaml. (A checkpoint in one file, the default, fits any run.)"
        )


def check_last(trainer: Trainer) -> None:
    """Check that the run has the checkpoint that `ckpt_path=last` names.

    Raises:
        UserError: it has none.
    """
    saving = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    if not any(each._find_last_checkpoints(trainer) for each in saving):
        folders = " or ".join(relative(each.dirpath) for each in saving) or "a run without checkpoints"
        raise UserError(
            f"ckpt_path=last: there is no last checkpoint in {folders}. Name one, or leave ckpt_path out to start over."
        )


def check_verdict_is_ours(path: str, folder: str) -> None:
    """Check that the verdict on a checkpoint replaces no other run's.

    A run that was moved or copied still has its former folder in its configuration.

    Raises:
        UserError: it would.
    """
    run = run_of(path) if Path(path).exists() else None
    if run is not None and Path(folder, "run.json").exists() and run.resolve() != Path(folder).resolve():
        raise UserError(
            f"test: ckpt_path={path} is of the run in {relative(run)}, and its verdict would replace that of the run "
            f"in {relative(folder)}. Add --trainer.default_root_dir={shlex.quote(relative(run))}"
        )


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where the run's checkpoints are."""
    saving = (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint))
    default = Path(trainer.default_root_dir, "checkpoints")
    return list(dict.fromkeys([default, *(Path(each.dirpath) for each in saving if each.dirpath)]))


def _first_start_from(named: str, record: RunRecord | None, folder: Path, config: dict[str, Any]) -> int | None:
    """The first start in the folder from a named checkpoint by this command; None if the last one was another."""
    if record is None or not Path(named).exists() or not record.starts or record.starts[-1].ckpt_path != named:
        return None
    if not differences(_read(folder / "config.yaml", config), _flat(config)).keys() <= FREE:
        return None
    return 1 + max((number for number, start in enumerate(record.starts, 1) if start.ckpt_path != named), default=0)


def _refuse_to_move(named: str | None, folder: Path) -> None:
    """Check that a named checkpoint is not in the folder whose run is moved.

    Raises:
        UserError: it is.
    """
    if named and (not Path(named).exists() or Path(named).resolve().is_relative_to(folder.resolve())):
        raise UserError(
            f"ckpt_path={named} is of the run in {relative(folder)}, which --fresh moves. Leave --fresh out, or name "
            "another folder (trainer.default_root_dir)."
        )


def _check_named(trainer: Trainer, path: str, record: RunRecord | None) -> None:
    """Check that a run that starts from a named checkpoint overwrites no other, finished run.

    Raises:
        UserError: the folder holds one, and the checkpoint is not its own.
    """
    folder = Path(trainer.default_root_dir)
    own = [each.resolve() for each in (folder, *checkpoint_folders(trainer))]
    if record and record.ended and Path(path).exists() and Path(path).absolute().parent.resolve() not in own:
        raise UserError(
            f"trainer.default_root_dir={relative(folder)} holds a finished run, and ckpt_path={path} belongs to "
            "another. Name another folder."
        )


def _delete_half_written(trainer: Trainer) -> None:
    """Delete the files of checkpoints that a killed run had begun to write."""
    for folder in checkpoint_folders(trainer):
        for path in folder.glob(".*.ckpt.*"):
            path.unlink(missing_ok=True)


def _refuse_changes(
    folder: Path, newest: Path | None, changed: dict[str, tuple[Any, Any]], then: Table, config: Any
) -> None:
    accepted: Collection[str] = config["model"].get("init_args", {}).get("accept_changes") or ()
    refused = {
        key: (then, now)
        for key, (then, now) in changed.items()
        if key not in FREE and key not in accepted and (then or now)  # an earlier version lacked options that are off
    }
    if refused:
        changes = listed(_by_group(refused, then, _flat(config)))
        resume = f" To resume it with these options, name its checkpoint: --ckpt_path={shlex.quote(relative(newest))}"
        raise UserError(
            f"trainer.default_root_dir={relative(folder)} holds a run with other options (then → now):\n"
            f"{changes}\nRestore its options, name another folder, or add --fresh, which moves it to "
            f"{relative(_aside(folder))}." + (resume if newest else "")
        )


def _by_group(changed: dict[str, tuple[Any, Any]], then: Table, now: Table) -> dict[str, tuple[Any, Any]]:
    """The changes, those of a group of options that one of the two lacks (`win_rate: null`) as one."""
    groups: dict[str, tuple[Any, Any]] = {}
    for key, change in changed.items():
        parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
        for table, whole in ((then, (None, "set")), (now, ("set", None))):
            if absent := [name for name in parents if table.get(name, "") is None]:
                key, change = absent[0], whole
        groups[key] = change
    return groups


def _finished(folder: Path, config: Any, newest: Path | None) -> UserError:
    trainer = config["trainer"]
    limits = [f"trainer.{name}={trainer[name]}" for name in ("max_epochs", "max_steps") if (trainer[name] or 0) > 0]
    extend = f"To extend it, raise {' or '.join(limits)}. " if newest and limits else ""
    return UserError(
        f"trainer.default_root_dir={relative(folder)} holds a finished run, which is not overwritten. {extend}To start "
        f"another, name another folder, or add --fresh, which moves it to {relative(_aside(folder))}."
    )


def _extends(change: tuple[str, tuple[Any, Any]]) -> bool:
    """Whether a changed option makes the run longer."""
    key, (then, now) = change
    if key not in LENGTH:
        return False
    if isinstance(then, int) and isinstance(now, int):
        return now > then >= 0 or (now < 0 <= then)
    return now is None or isinstance(now, str | dict)


def _is_started_again() -> bool:
    """Whether the scheduler has started this job before: its first start was the fresh one."""
    return any(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _set_aside(trainer: Trainer) -> None:
    """Move the files of the run in the folder beside it: into one folder, file by file, and then that folder at once.

    Raises:
        UserError: its checkpoints are elsewhere.
    """
    folder = Path(trainer.default_root_dir)
    for elsewhere in checkpoint_folders(trainer)[1:]:
        if newest_whole([elsewhere]):
            raise UserError(
                f"checkpoint.dirpath={relative(elsewhere)} holds checkpoints, which --fresh does not move. Name "
                "another folder."
            )
    files, gathered = run_files(folder), folder / GATHERED
    if not files and not gathered.exists():
        return
    gathered.mkdir(exist_ok=True)
    for path in files:
        shutil.move(path, gathered / path.name)
    aside = _aside(folder)
    shutil.move(gathered, aside)
    print_line(f"the run in {relative(folder)} is now in {relative(aside)}")


def _aside(folder: Path) -> Path:
    """The folder that a run is set aside in."""
    number = 1
    while (aside := folder.absolute().with_name(f"{folder.absolute().name}-{number}")).exists():
        number += 1
    return aside


def _read(path: Path, config: dict[str, Any]) -> Table:
    """The configuration of the run in a folder; without one, the given one."""
    try:
        return _flat(yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else config)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{relative(path)} is damaged. Delete it: checkpoints then check what they can.") from error


def _flat(config: dict[str, Any]) -> Table:
    """Options by their short names, as on the command line: model.beta."""
    return {key: value for key, value in _flattened(config, "") if key}


def _flattened(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or key in FREE:
        yield key, value
        return
    for name, inner in value.items():
        below = key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip(".")
        yield from _flattened(inner, below)
