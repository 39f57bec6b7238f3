"""`lit-align chat MODEL [--against START]`: talk to a model."""

import argparse
import io
import sys
from typing import Any

import yaml

from lit_align.cli.arguments import Arguments
from lit_align.errors import check_number


def run(args: list[str]) -> None:
    """Start the chat."""
    parser = Arguments("chat", "Talk to a model in the terminal, or to two at once.")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, an adapter or a run, or a hub name")
    parser.add_argument("--against", metavar="START", help="second model, which answers the same messages")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--template-args",
        metavar="ARGS",
        type=_object,
        default={},
        help="arguments of the chat template, such as '{enable_thinking: false}' (default: those of the run)",
    )
    parser.add_argument(
        "--against-template-args",
        metavar="ARGS",
        type=_object,
        default={},
        help="those of the second model (default: those of its run)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="another chat template than the model's")
    parser.add_argument("--tokenizer", metavar="NAME", help="another tokenizer than the model's")
    parser.add_argument("--plain", action="store_true", help="continue what is typed, without the chat template")
    given = parser.parse_args(args)
    if given.plain and (given.template_args or given.against_template_args or given.chat_template):
        parser.error("a chat template and its arguments have no effect with --plain. Leave them out")
    if given.against_template_args and not given.against:
        parser.error("--against-template-args has no effect without --against. Leave it out")
    check_number("chat: --max-new-tokens", given.max_new_tokens, least=1)
    check_number("chat: --temperature", given.temperature, least=0)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not text end no chat
    from lit_align.cli.chat import Prompting, Speaker, chat
    from lit_align.data.sampling import Sampling

    sampling = Sampling(given.max_new_tokens, given.temperature)

    def speaker(path: str, template_args: dict[str, Any], *, is_second: bool = False) -> Speaker:
        prompting = Prompting(template_args, given.chat_template, given.tokenizer, given.plain, is_second)
        return Speaker(path, sampling, given.seed, prompting)

    speakers = [speaker(given.model, given.template_args)]
    if given.against:
        speakers.append(speaker(given.against, given.against_template_args, is_second=True))
    chat(speakers)


def _object(text: str) -> dict[str, Any]:
    """The object that a text spells out in YAML or JSON."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be an object such as '{{enable_thinking: false}}'")
    return value
