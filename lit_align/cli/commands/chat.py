"""`lit-align chat MODEL [--against START]`: talk to a model."""

from lit_align.cli.arguments import Arguments


def run(args: list[str]) -> None:
    """Start the chat."""
    parser = Arguments("chat", "Talk to a model in the terminal, or to two at once.")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, an adapter or a run, or a hub name")
    parser.add_argument("--against", metavar="START", help="second model, which answers the same messages")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    given = parser.parse_args(args)
    from lit_align.cli.chat import Speaker, chat
    from lit_align.data.sampling import Sampling

    sampling = Sampling(given.max_new_tokens, given.temperature)
    chat([Speaker(path, sampling, given.seed) for path in (given.model, given.against) if path])
