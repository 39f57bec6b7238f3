"""The outcome of a pairing rule in a round, checked and printed."""

from typing import Any

from lit_align.console import print_field
from lit_align.data.base import describe_example
from lit_align.data.pairing import Pairs
from lit_align.data.table import ExampleTable
from lit_align.data.tokenization import listing
from lit_align.errors import UserError, amount


def check_pairs(pairs: Pairs[ExampleTable], prompts: int, index: int) -> None:
    """Check that a round gives something to train on.

    Raises:
        UserError: it does not.
    """
    if not pairs.examples:
        raise UserError(
            f"round {index + 1} gives no pair to train on: of {amount(prompts, 'prompts')}, {_dropped(pairs)}. Sample "
            "other or more responses (data.sampling, data.responses_per_prompt), or change data.scorer or data.pairing."
        )


def print_pairs(pairs: Pairs[ExampleTable], prompts: int, unused: int, example_of: Any) -> None:
    """Print what the pairing rule gave.

    Args:
        unused: Pairs that fill no batch for every process.
        example_of: The tokenizer that decodes the first pair; None prints no example.
    """
    if example_of is not None:
        for name, text in describe_example(example_of, pairs.examples[0]):
            print_field(name, text)
    line = f"{amount(len(pairs.examples), 'pairs')} from {amount(prompts, 'prompts')}"
    line += f", {unused} of them in no full batch" if unused else ""
    print_field("pair", line + (f"; {_dropped(pairs)}" if pairs.counts or pairs.partial_drops else ""))


def _dropped(pairs: Pairs[ExampleTable]) -> str:
    return listing(pairs.counts) + (f"; taken out: {listing(pairs.partial_drops)}" if pairs.partial_drops else "")
