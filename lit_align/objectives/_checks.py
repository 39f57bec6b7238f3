"""Checks of arguments and of checkpoints.

Shapes are checked where a tensor enters a loss, so that broadcasting never hides a mistake.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_align.errors import UserError


def check_shape(argument: str, tensor: Tensor | None, *needed: int | str) -> None:
    """Raise unless the tensor has the shape needed: `check_shape("labels", labels, logps.shape[0])`.

    A number must match exactly; a string stands for any size ("B"), or for any size from a minimum ("K>=2"). None
    passes, for an optional argument.
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
    """Check that a checkpoint holds exactly the weights of a module.

    Args:
        ours: The module's weights.
        theirs: The checkpoint's weights.

    Raises:
        UserError: a weight is missing, unknown, or has another shape.
    """
    if different := ours.keys() ^ theirs.keys():
        raise UserError(
            f"this checkpoint belongs to another model or configuration: {len(different)} weights have no counterpart, "
            f"such as {sorted(different)[0]!r}. Resume with the configuration that made it."
        )
    for name, value in theirs.items():
        if isinstance(value, Tensor) and value.shape != ours[name].shape:
            raise UserError(
                f"this checkpoint belongs to another model or configuration: {name} has the shape {tuple(value.shape)} "
                f"there and {tuple(ours[name].shape)} here. Resume with the configuration that made it."
            )
