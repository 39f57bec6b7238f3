"""Whether the state in a checkpoint has the form that a run writes.

Lightning and torch take over most of this state as it is: an entry of another type would fail later, somewhere in
training. A `TypeError` names the entry, and `restoring` adds the checkpoint.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer, WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lit_align.console import relative
from lit_align.errors import UserError, first_line, shown

STATEFUL = (ModelCheckpoint, EarlyStopping, Timer, WeightAveraging)
"""Lightning's callbacks that take over their state as it is."""

ADDED = "differentiable"
"""The option that torch adds to the defaults of every optimizer that loads a state."""

NOT_OF_A_CHECKPOINT = (MisconfigurationException, torch.OutOfMemoryError)


@contextmanager
def restoring(trainer: Trainer) -> Iterator[None]:
    """Name the trainer's checkpoint in an error of what takes over, or first uses, its state.

    Raises:
        UserError: in place of any other error, but for those that no checkpoint causes.
    """
    try:
        yield
    except NOT_OF_A_CHECKPOINT:
        raise
    except Exception as error:
        if not trainer.ckpt_path:
            raise
        path = relative(trainer.ckpt_path)
        if not isinstance(error, UserError):
            raise UserError(
                f"ckpt_path={path} cannot be resumed from ({type(error).__name__}: {first_line(error)}): an entry is "
                "missing or has another form than a run writes. Name a checkpoint that a run wrote."
            ) from error
        if path in str(error) or relative(Path(trainer.ckpt_path).resolve()) in str(error):  # last.ckpt is a link
            raise
        raise UserError(f"ckpt_path={path}: {error}") from error


def name_checkpoint_in_errors(trainer: Trainer) -> None:
    """Let errors of Lightning's functions that restore a checkpoint name it."""
    connector, loop = trainer._checkpoint_connector, trainer.fit_loop
    for owner, name in (
        (connector, "_restore_modules_and_callbacks"),
        (connector, "restore_training_state"),
        (loop, "_load_combined_loader_states"),
    ):
        setattr(owner, name, restoring(trainer)(getattr(owner, name)))


def check_like(found: Any, ours: Any, name: str) -> None:
    """Check that a saved value has the types of the value that this run has, its entries included.

    An entry that only one of them has passes, as does one that is None here: versions differ in them.

    Args:
        found: The saved value.
        ours: The value that this run has.
        name: The entry's name, for the message.

    Raises:
        TypeError: names the first entry of another type, or the first tensor of another shape.
    """
    if isinstance(ours, dict) and isinstance(found, dict):
        for key in ours.keys() & found.keys():
            check_like(found[key], ours[key], f"{name}.{key}")
    elif isinstance(ours, list | tuple) and isinstance(found, list | tuple) and len(found) == len(ours):
        for place, (theirs, own) in enumerate(zip(found, ours, strict=True)):
            check_like(theirs, own, f"{name}.{place}")
    elif ours is not None and not _fits(found, ours):
        raise TypeError(f"{name} is {shown(found)}")


def check_callbacks(callbacks: Iterable[Callback], states: Mapping[str, Any]) -> None:
    """Check the states of Lightning's callbacks in a checkpoint.

    Raises:
        TypeError: names the first entry of another type.
    """
    for callback in callbacks:
        if isinstance(callback, STATEFUL) and callback.state_key in states:
            name, state = type(callback).__name__, states[callback.state_key]
            check_like(state, callback.state_dict(), name)
            if isinstance(callback, ModelCheckpoint):
                _check_kept(name, state, callback.save_top_k)


def continue_saving(callbacks: Iterable[Callback], states: Mapping[str, Any], ckpt_path: str | Path, step: int) -> None:
    """Let each ModelCheckpoint that wrote a checkpoint continue in its folder, also if the folder has another name now.

    Lightning compares the names alone, and forgets which checkpoints it keeps where they differ. It never restores
    which checkpoint `last.ckpt` links to, and at which step it was saved, and so would save that step again.

    Args:
        callbacks: Those of this run.
        states: Their states in the checkpoint; those of moved folders are changed.
        ckpt_path: The checkpoint.
        step: The optimizer step at which it was saved.
    """
    written = Path(ckpt_path).resolve()  # last.ckpt is a link
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.state_key not in states or callback.dirpath is None:
            continue
        state, folder = states[callback.state_key], str(callback.dirpath)
        if Path(folder).resolve() != written.parent:
            continue
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = _moved(state[name], state["dirpath"], folder)
        kept = state["best_k_models"]
        state["best_k_models"] = {_moved(path, state["dirpath"], folder): score for path, score in kept.items()}
        state["dirpath"] = folder
        own = {Path(path).name for path in (state["best_model_path"], *state["best_k_models"])}
        last = Path(state["last_model_path"])
        if written.name in own:
            callback._last_checkpoint_saved = os.path.join(folder, written.name)
            callback._last_global_step_saved = step
        elif last.is_symlink():  # the run was interrupted after it
            callback._last_checkpoint_saved = os.path.join(folder, last.resolve().name)


def check_weight_numbers(saved: Mapping[str, Any]) -> None:
    """Check that a saved optimizer numbers its weights in their order, and has no state of any other.

    torch gives states to weights by the places of these numbers, and leaves states out whose number it does not find.

    Raises:
        TypeError: names the group or the number.
    """
    if not saved["state"]:  # of plain SGD; FSDP2 then leaves names in place of numbers
        return
    known: set[Any] = set()
    for place, group in enumerate(saved["param_groups"]):
        numbers = group["params"]
        if not all(type(number) is int for number in numbers) or numbers != sorted(set(numbers) - known):
            raise TypeError(f"param_groups.{place}.params is {shown(numbers)}")
        known.update(numbers)
    if others := [number for number in saved["state"] if number not in known]:
        raise TypeError(f"state has a weight {shown(others[0])}, which is not in param_groups")


def check_optimizer(optimizer: Optimizer) -> None:
    """Check the options and the kind of state that an optimizer has taken from a checkpoint.

    Its first step shows whether the state itself fits.

    Raises:
        KeyError, TypeError: names the first option that is missing, or is of another type.
    """
    for group in optimizer.param_groups:
        for option, default in optimizer.defaults.items():
            if option in group or option != ADDED:
                check_like(group[option], default, option)
        for weight in group["params"]:
            if not isinstance(state := optimizer.state.get(weight, {}), dict):
                raise TypeError(f"the state of a weight is {shown(state)}")


def _fits(found: Any, ours: Any) -> bool:
    if isinstance(ours, Tensor):
        return isinstance(found, Tensor) and found.shape == ours.shape
    if type(ours) in (int, float):
        return type(found) in (int, float) and found == found  # not NaN
    if type(ours) in (bool, str):
        return type(found) is type(ours)
    return not isinstance(ours, dict | list | tuple)  # those of one kind and length are compared by their entries


def _moved(path: str, before: str, now: str) -> str:
    """The present name of a file whose folder had another name before; empty if it is."""
    return path and os.path.join(now, os.path.relpath(path, before))


def _check_kept(name: str, state: Mapping[str, Any], most: int) -> None:
    """Check the checkpoints that ModelCheckpoint keeps, each with its score."""
    kept: dict[Any, Any] = state.get("best_k_models", {})
    for path, score in kept.items():
        if not isinstance(path, str) or not isinstance(score, Tensor) or score.numel() != 1:
            raise TypeError(f"{name}.best_k_models has the entry {shown(path)}: {shown(score)}")
    worst = state.get("kth_best_model_path", "")
    if worst not in kept and (worst or len(kept) == most > 0):
        raise TypeError(f"{name}.kth_best_model_path is {shown(worst)}, which is not in best_k_models")
