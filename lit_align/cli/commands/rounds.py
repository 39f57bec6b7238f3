"""`lit-align rounds show RUN --round 2`: the responses that a run sampled."""

from lit_align.cli.arguments import Arguments


def run(args: list[str]) -> None:
    """Print one line per round, or the responses of one round."""
    parser = Arguments("rounds", "Show the rounds of a run, or the best and the worst response to each prompt of one.")
    parser.add_argument("action", choices=["show"], metavar="show", help="the only action")
    parser.add_argument("run", metavar="RUN", help="folder of a run, of its rounds, or of one round")
    parser.add_argument(
        "--round", metavar="N", type=int, help="number of the round, from 1 (default: one line for each)"
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, default=10, help="prompts to show, widest margins first (default: %(default)s)"
    )
    parser.add_argument("--scorer", metavar="TEXT", help="part of the scorer's name, if several scored the round")
    given = parser.parse_args(args)
    from lit_align.cli.show_rounds import show

    show(given.run, given.round, given.rows, given.scorer)
