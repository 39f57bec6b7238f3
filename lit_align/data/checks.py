"""Checks that sources, pairing rule, objective and model fit each other."""

from collections.abc import Sequence

import numpy as np

from lit_align.data.examples import Source
from lit_align.data.pairing import PairingRule
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError
from lit_align.needs import DataNeeds


def check_joinable(sources: Sequence[Source], parts: Sequence[ExampleTable]) -> None:
    """Check that a batch can hold examples of all sources.

    Raises:
        UserError: they differ in the number of responses, or only some have rewards or labels.
    """

    def form(examples: ExampleTable) -> str:
        first = examples[0]
        given = [name for name in ("rewards", "labels") if getattr(first, name) is not None]
        return f"{len(first.response_ids)} responses with {' and '.join(given) or 'no rewards and no labels'}"

    forms = [form(examples) for examples in parts]
    for source, other in zip(sources, forms, strict=True):
        if other != forms[0]:
            raise UserError(
                f"data.train: examples of {source.path} have {other}, those of {sources[0].path} have {forms[0]}. "
                "Give sources of one form."
            )


def check_pairing(pairing: PairingRule, needs: DataNeeds, name: str, *, sampled: bool) -> None:
    """Check that an objective can train on a pairing rule's examples.

    Args:
        name: The objective's, in messages.
        sampled: The rule selects from a round's responses; rows of texts need no selection.

    Raises:
        UserError: it needs the other kind.
    """
    if needs.data_kind == "texts" and sampled and not pairing.gives_texts:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} imitates one response. Use data.pairing=Best, the best of "
            "each prompt's responses."
        )
    if pairing.gives_texts and needs.data_kind != "texts":
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name} compares responses, and this rule keeps one. Use "
            "BestWorst, or SFT, which imitates one response."
        )
    if pairing.gives_groups and not needs.takes_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}, as configured, compares two responses. Use "
            "BestWorst, or learn from rewards (model.reward_temperature of DPO and EXO)."
        )
    if pairing.gives_labels and not needs.takes_labels:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: soft labels (labels=soft, ties=half) have no effect on {name}, "
            "as configured. Leave them out, or use DPO, IPO, CPO, ORPO or MPO."
        )
    if needs.needs_whole_groups and not pairing.gives_groups:
        raise UserError(
            f"data.pairing={type(pairing).__name__}: {name}'s constant is estimated from all responses that were "
            "sampled. Take Listwise, or leave model.estimate_baseline out."
        )


def check_fits(table: ExampleTable, positions: int | None) -> None:
    """Check that the model reads all of each example. A GGUF file says how much it reads only once it is loaded.

    Args:
        positions: The model's maximum number of tokens, prompt and response together; None without a limit.

    Raises:
        UserError: an example is longer.
    """
    tokens = table.lengths.prompt + table.lengths.longest
    if positions is not None and (too_long := np.flatnonzero(tokens > positions)).size:
        first = int(too_long[0])
        raise UserError(
            f"{table[first].source}: prompt and response have {tokens[first]} tokens, but the model reads {positions}. "
            f"Lower data.max_prompt_length and data.max_response_length to at most {positions} together."
        )
