"""Checks of arguments and of checkpoints.

Shapes are checked where a tensor enters a loss, so that broadcasting never hides a mistake.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_align.errors import UserError


def check_shape(argument: str, tensor: Tensor | None, *needed: int | str) -> None:
    """Raise unless the tensor has the shape needed: `check_shape("labels", labels, logps.shape[0])`.

    A number is that size; a string names any size ("B"), or any from a least one on ("K>=2"). An argument
    that is None is optional and passes.
    """

    def fits(size: int, need: int | str) -> bool:
        return size == need if isinstance(need, int) else size >= int(need.partition(">=")[2] or 0)

    if tensor is not None and not (tensor.ndim == len(needed) and all(map(fits, tensor.shape, needed))):
        shape = ", ".join(map(str, needed))
        raise ValueError(f"`{argument}` has shape {list(tensor.shape)}, but needs [{shape}].")


def check_positive(**options: float) -> None:
    """Raise unless each of a model's options is above 0.

    Raises:
        UserError: names the option and its value.
    """
    for name, value in options.items():
        if not value > 0:
            raise UserError(f"model.{name}={value} must be above 0.")


def check_state_dict(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint holds a module's weights, all of them and no others.

    Args:
        ours: The module's weights.
        theirs: The checkpoint's.

    Raises:
        UserError: a weight has no counterpart, or one of another shape.
    """
    if different := ours.keys() ^ theirs.keys():
        raise UserError(
            f"this checkpoint is of another model or configuration: {len(different)} weights have no counterpart, "
            f"such as {sorted(different)[0]!r}. Resume with the configuration that made it."
        )
    for name, value in theirs.items():
        if isinstance(value, Tensor) and value.shape != ours[name].shape:
            raise UserError(
                f"this checkpoint is of another model or configuration: {name} has the shape {tuple(value.shape)} "
                f"there and {tuple(ours[name].shape)} here. Resume with the configuration that made it."
            )
