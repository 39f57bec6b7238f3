"""The table of commands. To add one, write a module with `run(args)` and add its line here."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command of `lit-align`."""

    help: str
    """One line of `lit-align --help`."""
    module: str = ""
    """Module whose `run(args)` carries it out, imported only then; empty for the commands of Lightning's Trainer."""


COMMANDS = {
    "fit": Command("Train a model, or continue the run in its folder."),
    "validate": Command("Compute the loss and metrics on validation data."),
    "test": Command("Compare a checkpoint with the start on held-out prompts."),
    "predict": Command("Write a checkpoint's responses to given prompts."),
    "init": Command("Print a configuration for an objective, a model and data.", "lit_align.cli.commands.init"),
    "doctor": Command("Try the start of a run and estimate the whole.", "lit_align.cli.commands.doctor"),
    "serve": Command("Start the vLLM server that samples for a run.", "lit_align.cli.commands.serve"),
    "rounds": Command("Show the responses that a run sampled.", "lit_align.cli.commands.rounds"),
    "compare": Command("Put several runs into one report.", "lit_align.cli.commands.compare"),
    "report": Command("Write a run's report again.", "lit_align.cli.commands.report"),
    "export": Command("Write a checkpoint for transformers or peft.", "lit_align.cli.commands.export"),
    "cache": Command("List or clear tokenized data.", "lit_align.cli.commands.cache"),
    "chat": Command("Talk to one model, or to two at once.", "lit_align.cli.commands.chat"),
}
