"""Commands beside Trainer's: what is done with runs that are over, and before one begins."""

import argparse
from pathlib import Path
from typing import NoReturn

from lit_align.console import print_line
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
    if Path(given.out).is_dir():
        raise UserError(
            f"compare: --out is a file to write, and {given.out} is a folder. Such as: {given.out}/all.html"
        )
    from lit_align.reporting import report
    from lit_align.reporting.terminal import print_comparison

    runs = report.compared_runs(given.runs)
    print_comparison(runs)
    print_line(f"report     {report.compare(runs, given.out)}")


def report(args: list[str]) -> None:
    """Make a run's report again."""
    parser = Arguments("report", "Make a run's report.html and plots/ again from what lies in its folder.")
    parser.add_argument("run", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    from lit_align.reporting.report import write_report

    print_line(f"report     {write_report(parser.parse_args(args).run)}")


def export(args: list[str]) -> None:
    """Write a checkpoint as a folder of transformers or peft."""
    parser = Arguments("export", "Write a run's policy in transformers' format, with tokenizer and model card.")
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="folder of a run, or a checkpoint in one")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, for peft; else merged")
    given = parser.parse_args(args)
    if Path(given.out).is_file():
        raise UserError(f"export: --out is a folder to write, and {given.out} is a file. Name another.")
    from lit_align.export import export as write

    print_line(f"exported   {write(given.source, given.out, given.adapter)}")


def chat(args: list[str]) -> None:
    """Talk to a model."""
    parser = Arguments("chat", "Talk to a model in the terminal, or to two at once.")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, an adapter or a run, or a hub name")
    parser.add_argument("--against", metavar="START", help="a second model, which answers the same")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random streams (default: %(default)s)")
    given = parser.parse_args(args)
    from lit_align.cli.chat import Speaker
    from lit_align.cli.chat import chat as talk
    from lit_align.data.sampling import Sampling

    sampling = Sampling(given.max_new_tokens, given.temperature)
    talk([Speaker(path, sampling, given.seed) for path in (given.model, given.against) if path])


def rounds(args: list[str]) -> None:
    """Look at the responses that a run sampled."""
    parser = Arguments(
        "rounds", "Show what a run's rounds sampled, with the best and the worst response to each prompt."
    )
    parser.add_argument("action", choices=["show"], metavar="show", help="the one thing to do with rounds")
    parser.add_argument("run", metavar="RUN", help="folder of a run, of its rounds, or of one round")
    parser.add_argument("--round", type=int, help="which one, counted from 1; without it all are summed up")
    parser.add_argument("--rows", type=int, default=10, help="prompts, the widest margins first (default: %(default)s)")
    parser.add_argument("--scorer", help="a part of the scorer's name, where several scored the round")
    given = parser.parse_args(args)
    from lit_align.cli.show_rounds import show

    show(given.run, given.round, given.rows, given.scorer)


def doctor(args: list[str]) -> None:
    """Say what a run would do."""
    if not args or "--help" in args or "-h" in args:
        parser = Arguments("doctor", "Say what a run would do, from three batches of it; takes the options of fit.")
        parser.add_argument("--config", metavar="X.yaml", help="and any option of fit; see: lit-align fit --help")
        parser.parse_args(args or ["--help"])
    from lit_align.cli.doctor import examine

    examine(args)


COMMANDS = {
    "doctor": doctor,
    "rounds": rounds,
    "compare": compare,
    "report": report,
    "export": export,
    "chat": chat,
}
