"""Values that no option takes, of our classes or of other packages'."""

import inspect
import math
from collections.abc import Iterator
from enum import Enum
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.accelerators import CPUAccelerator as CPU
from lightning.pytorch.accelerators import CUDAAccelerator as CUDA
from lightning.pytorch.accelerators import MPSAccelerator as MPS

from lit_align.cli.classes import NAMED_CALLBACKS, locate, options
from lit_align.errors import UserError, shown

OURS = ("model.", "data.", *(f"{key}." for key in NAMED_CALLBACKS if key != "checkpoint"))
"""Keys below which an empty text means nothing."""

DEVICES = {"gpu": [CUDA, MPS], "cuda": [CUDA], "mps": [MPS]}
"""Accelerators that a machine may lack; of several, one is enough."""


def check_values(config: Any) -> None:
    """Check the values of a configuration before anything is built.

    Raises:
        UserError: a class_path names a function, which building the configuration would call (`os.system` for one); a
            number is not finite; a text is empty; the accelerator is not in this machine.
    """
    for key, _, value in _entries(config):
        if key.endswith("class_path") and isinstance(value, str) and not inspect.isclass(locate(value)):
            raise UserError(f"{key}={value} must be a class. Name a class.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number. Change it.")
        if key == "trainer.accelerator" and not any(each.is_available() for each in DEVICES.get(str(value), [CPU])):
            raise UserError(f"{key}={value} needs a device that torch does not see here. Use auto or cpu.")
        if key == "seed_everything" and isinstance(value, int) and not 0 <= value < 1 << 32:
            raise UserError(f"{key}={value} must be at least 0 and below 2³². Change it.")
        if value == "" and key.startswith(OURS):
            raise UserError(f"{key} must not be empty. Give a value, or leave the option out.")


def write_out_enums(config: Namespace) -> None:
    """Replace enumerations, such as the default of `Timer`'s interval, by their values: no YAML can hold them."""
    for key, parent, value in _entries(config):
        if isinstance(value, Enum):
            parent[key.rpartition(".")[2]] = value.value


def check_groups(config: Any) -> None:
    """Check that options of a dataclass are not one value, which jsonargparse lets pass.

    Raises:
        UserError: names the key.
    """
    for key, _, value in _entries(config):
        above, _, name = key.partition("[")[0].rpartition(".init_args.")
        cls = locate(str(config.get(f"{above}.class_path"))) if above else None
        if cls is None or not any(option.startswith(f"{name}.") for option in options(cls)):
            continue
        if value is not None or not _takes_null(cls, name):
            raise UserError(f"{key}={shown(value)} must be options (key: value). Give them, or leave it out.")


def _takes_null(cls: type, option: str) -> bool:
    """Whether null is the default of an option, of a class or of its bases."""
    signatures = [inspect.signature(base.__init__) for base in cls.__mro__ if "__init__" in vars(base)]
    return any(each.parameters[option].default is None for each in signatures if option in each.parameters)


def _entries(config: Namespace, where: str = "") -> Iterator[tuple[str, Namespace, Any]]:
    """The key, the parent and the value of each option, entries of lists included."""
    for key, value in list(vars(config).items()):
        several = isinstance(value, list | tuple) and len(value) > 0
        for number, entry in enumerate(value if several else [value]):
            below = f"{where}{key}" + (f"[{number}]" if several else "")
            if isinstance(entry, Namespace):
                yield from _entries(entry, f"{below}.")
            else:
                yield below, config, entry
