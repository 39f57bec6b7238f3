"""`lit-align doctor --config X.yaml [OPTIONS]`: try the start of a run."""

from lit_align.cli.arguments import Arguments
from lit_align.console import program


def run(args: list[str]) -> None:
    """Try it and print the estimate."""
    if not args or "--help" in args or "-h" in args:
        parser = Arguments("doctor", "Try the start of a run and estimate the whole. Takes the options of fit.")
        parser.add_argument("--config", metavar="X.yaml", help=f"and any option of fit; see: {program()} fit --help")
        parser.parse_args(args or ["--help"])
    from lit_align.cli.doctor import examine

    examine(args)
