"""The options of commands that are not Trainer's."""

import argparse
import re
from typing import NoReturn

from lit_align.cli.findings import PATTERNS
from lit_align.console import program
from lit_align.errors import UserError


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s.

    Args:
        command: Its name on the command line.
        description: First sentence of its help.
    """

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"{program()} {command}", description=description, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        if found := re.match(PATTERNS["flag"], message):
            message = no_value(found["flag"])
        raise UserError(f"{self.command}: {message}. See: {self.prog} --help")


def without_flag(args: list[str], flag: str) -> list[str]:
    """The arguments without a flag that a command has beside the options of fit.

    Raises:
        UserError: the flag has a value.
    """
    if any(arg.startswith(f"{flag}=") for arg in args):
        raise UserError(f"{no_value(flag)}.")
    return [arg for arg in args if arg != flag]


def no_value(flag: str) -> str:
    """The message for a flag that is given a value."""
    return f"{flag} takes no value. Write {flag} alone, or leave it out"
