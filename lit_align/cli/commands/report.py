"""`lit-align report RUN`: a run's report, written again."""

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line


def run(args: list[str]) -> None:
    """Write report.html and plots/."""
    parser = Arguments("report", "Write a run's report.html and plots/ again, from the files in its folder.")
    parser.add_argument("run", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    given = parser.parse_args(args)
    from lit_align.reporting.report import write_report

    print_line(f"report     {write_report(given.run)}")
