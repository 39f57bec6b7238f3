"""`lit-align doctor --config X.yaml [OPTIONS]`: try the start of a run; with --memory, compute its memory alone."""

from lit_align.cli.arguments import Arguments, without_flag
from lit_align.console import program

MEMORY = "--memory"


def run(args: list[str]) -> None:
    """Try it and print the estimate."""
    if not args or "--help" in args or "-h" in args:
        parser = Arguments("doctor", "Try the start of a run and estimate the whole. Takes the options of fit.")
        parser.add_argument("--config", metavar="X.yaml", help=f"and any option of fit; see: {program()} fit --help")
        parser.add_argument(
            MEMORY, action="store_true", help="compute the memory only; needs the model's config.json, not its weights"
        )
        parser.parse_args(args or ["--help"])
    options = without_flag(args, MEMORY)
    if MEMORY in args:
        from lit_align.cli.memory import show_memory

        show_memory(options)
        return
    from lit_align.cli.doctor import examine

    examine(args)
