"""Identity of a checkpoint's run: objective, data, scorer, seed, base model. A resumed run must have the same.

A checkpoint carries a flat table, option name → plain value, of all that determines the numbers of a run. Its
length (`trainer.max_epochs`, `max_steps`) and the number of processes are not in it: a run may be extended, and may
continue on other machines with the same number of examples per step.
"""

import inspect
import shlex
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer

from lit_align.errors import UserError
from lit_align.lightning_features import accumulation_schedules
from lit_align.sharding import of_all_processes, rank

KEY = "identity"
BASE_MODEL = "model.policy (its weights)"
DTYPE = "model.policy.dtype"
EVALUATION = "win_rate."
"""Begins the options of an evaluation. One that is added or left out changes none of the other numbers."""
VALIDATION = "data.validation"
"""The pairs of another evaluation."""
SHAPES = {"model.lora.r", "model.lora.targets"}
"""Options that decide which weights there are, so that no change of them can be accepted."""

Table = dict[str, Any]


def save(checkpoint: dict[str, Any], table: Table, accepted: Collection[str]) -> None:
    """Record what the run is in a checkpoint.

    Args:
        checkpoint: The checkpoint that is written.
        table: This run's table.
        accepted: Options whose change is accepted. Those that the run no longer has are recorded as None, so that the
            same command resumes this checkpoint, too.
    """
    checkpoint[KEY] = dict.fromkeys(accepted) | table


def check(then: Table, table: Table, accepted: Collection[str], defaults: Table, *, fits: bool = True) -> None:
    """Check that a checkpoint is of this run.

    Args:
        then: The checkpoint's table.
        table: This run's table.
        accepted: Options whose change is intended.
        defaults: Values of options that the checkpoint lacks because an earlier version wrote it.
        fits: Whether the checkpoint's weights are of this run's networks; if not, no other objective can be accepted.

    Raises:
        UserError: an option differs that is not accepted. Another base model under an adapter, and an adapter of
            another shape, is never accepted.
    """
    lacked = {
        key: defaults[key] for key in table.keys() & defaults.keys() if then.get(key.rpartition(".")[0], "") is not None
    }
    changed = differences(with_dtype(lacked | then), table)
    adapter = "model.lora.r" in table and "model.lora.r" in then
    if adapter and BASE_MODEL in changed and DTYPE not in changed:
        raise UserError(
            "the checkpoint's adapter was trained on a base model with other weights than model.policy.path has now. "
            "Give the base model that it was trained on."
        )
    if unknown := [key for key in accepted if key not in then and key not in table]:
        known = ", ".join(sorted(changed)) or "none"
        raise UserError(
            f"model.accept_changes={unknown}: the checkpoint has no such option. Changed: {known}. Name these, or "
            "leave it out."
        )
    fixed = SHAPES if fits else SHAPES | {"model"}
    refused = {
        key: values
        for key, values in changed.items()
        if key in fixed or (key not in accepted and not (key.startswith((EVALUATION, VALIDATION)) and None in values))
    }
    if shapes := sorted(refused.keys() & fixed):
        fix = f": with another {' or '.join(shapes)} its weights do not fit."
    else:
        accepting = shlex.quote(f"--model.accept_changes=[{','.join(sorted(refused))}]")
        fix = f", or accept the changes: {accepting}"
    if refused:
        raise UserError(
            f"the checkpoint is of another run (then → now):\n{listed(refused)}\nResume with what the run had{fix}"
        )


def with_dtype(table: Table) -> Table:
    """A checkpoint's table with the type of the weights that auto meant in earlier versions, on every machine."""
    if table.get(DTYPE) != "auto":
        return table
    return table | {DTYPE: "bfloat16" if "model.lora.r" in table else "float32"}


def check_processes(table: Table) -> None:
    """Check that all processes train the same; a collective.

    Raises:
        UserError: another process has other options or data; on rank 0, and the others exit.
    """
    tables = of_all_processes([table])
    for number, other in enumerate(tables):
        if changed := differences(tables[0], other):
            if rank() > 0:
                raise SystemExit(2)
            raise UserError(
                f"process {number} differs from process 0 (process 0 → process {number}):\n{listed(changed)}\n"
                "Give every process the same options and the same files."
            )


def differences(then: Table, now: Table) -> dict[str, tuple[Any, Any]]:
    """The options that differ, each with both values; None where a table lacks it."""
    return {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}


def listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Changed options, a line each."""
    return "\n".join(f"  {key}: {_brief(was)} → {_brief(now)}" for key, (was, now) in sorted(changed.items()))


def of_trainer(trainer: Trainer) -> Table:
    """The trainer's options that decide numbers."""
    accumulated = [str(each.scheduling) for each in accumulation_schedules(trainer)] or [
        trainer.accumulate_grad_batches
    ]
    return {
        "trainer.accumulate_grad_batches": accumulated[0],
        "trainer.limit_train_batches": str(trainer.limit_train_batches),  # 1 is a batch, 1.0 all of them
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
        "trainer.precision": str(trainer.precision),
    }


def of_options(prefix: str, options: Mapping[str, Any], leave_out: Collection[str] = ()) -> Table:
    """Options as flat plain values; those of dataclasses under dotted names."""
    table: Table = {}
    for name, value in options.items():
        if f"{prefix}.{name}" in leave_out or name.startswith("_"):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            table |= of_options(f"{prefix}.{name}", value, leave_out)
        else:
            table[f"{prefix}.{name}"] = _plain(value)
    return table


def default_options(prefix: str, cls: type) -> Table:
    """The defaults of a class's options and of their groups, with those that it passes on to its base classes."""
    table: Table = {}
    for each in reversed(cls.__mro__):
        parameters = inspect.signature(each.__init__).parameters.values()
        table |= of_options(prefix, {p.name: p.default for p in parameters if p.default is not p.empty})
        for p in parameters:
            for group in filter(is_dataclass, (p.annotation, *get_args(p.annotation))):  # policy, lora | None
                given = {field.name: field.default for field in fields(group) if field.default is not MISSING}
                table |= of_options(f"{prefix}.{p.name}", given)
    return table


def of_optimizer(make: Any) -> Table:
    """Class and options of an optimizer that is still to be made."""
    optimizer = make([torch.nn.Parameter(torch.zeros(1, 1))])  # some take matrices only
    options = {name: _plain(value) for name, value in optimizer.defaults.items()}
    return {"model.optimizer": type(optimizer).__name__} | {f"model.optimizer.{n}": v for n, v in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
