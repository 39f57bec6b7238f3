"""`lit-align serve --config X.yaml`: start the vLLM server that samples for a run."""

from lit_align.cli.arguments import Arguments, without_flag
from lit_align.console import program


def run(args: list[str]) -> None:
    """Start the server; with --print, only print the command that starts it."""
    if not args or "--help" in args or "-h" in args:
        parser = Arguments("serve", "Start the vLLM server that samples for a run. Takes the options of fit.")
        parser.add_argument("--config", metavar="X.yaml", help=f"and any option of fit; see: {program()} fit --help")
        parser.add_argument("--print", action="store_true", help="print the command that starts it, and start nothing")
        parser.parse_args(args or ["--help"])
    options = without_flag(args, "--print")
    from lit_align.cli.serve import serve

    serve(options, only_print="--print" in args)
