"""`lit-align compare RUN RUN --out FILE`: several runs in one report."""

from pathlib import Path

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line
from lit_align.errors import UserError


def run(args: list[str]) -> None:
    """Write the comparison."""
    parser = Arguments(
        "compare", "Put several runs into one report: frontier curves, intervals, and paired tests by prompt."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    parser.add_argument("--out", metavar="FILE", default="comparison.html", help="file to write (default: %(default)s)")
    given = parser.parse_args(args)
    if Path(given.out).is_dir():
        raise UserError(f"compare: --out={given.out} must be a file, not a folder. Try --out={given.out}/all.html.")
    from lit_align.reporting import report
    from lit_align.reporting.terminal import print_comparison

    runs = report.compared_runs(given.runs)
    print_comparison(runs)
    print_line(f"report     {report.compare(runs, given.out)}")
