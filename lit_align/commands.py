"""Commands beside Trainer's: what is done with runs that are over, and before one begins."""

import argparse
from typing import NoReturn

from lit_align.console import say
from lit_align.errors import UserError


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"lit-align {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.partition(' ')[2]}: {message}. See: {self.prog} --help")


def compare(args: list[str]) -> None:
    """Put several runs into one report."""
    parser = Arguments("compare", "Put several runs in one report: frontier curves, intervals, paired tests by prompt.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    parser.add_argument("--out", default="comparison.html", help="file to write (default: %(default)s)")
    given = parser.parse_args(args)
    from lit_align import report

    say(f"report     {report.compare(given.runs, given.out)}")


def report(args: list[str]) -> None:
    """Make a run's report again."""
    parser = Arguments("report", "Make a run's report.html and plots/ again from what lies in its folder.")
    parser.add_argument("run", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    from lit_align.report import write_report

    say(f"report     {write_report(parser.parse_args(args).run)}")
