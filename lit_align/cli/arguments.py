"""The options of commands that are not Trainer's."""

import argparse
from typing import NoReturn

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
        raise UserError(f"{self.command}: {message}. See: {self.prog} --help")
