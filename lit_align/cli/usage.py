"""The help of the top level, without the imports that a command needs."""

from jsonargparse import ArgumentParser

from lit_align.cli.commands import COMMANDS
from lit_align.console import program

DESCRIPTION = "Preference optimization of language models, with moving references."


def top_level_help() -> str:
    """The text that AlignCLI's own parser prints for --help."""
    usage = f"{program()} COMMAND [OPTIONS]"
    parser = ArgumentParser(prog=program(), usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in json or yaml format.")
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, ArgumentParser(), help=command.help)
    return parser.format_help()
