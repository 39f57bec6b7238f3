"""Checks that sources fit each other, and examples the model."""

from collections.abc import Sequence

import numpy as np

from lit_align.data.examples import Source
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError, amount
from lit_align.objectives import PreferenceObjective


def check_joinable(sources: Sequence[Source], parts: Sequence[ExampleTable]) -> None:
    """Check that a batch can hold examples of all sources.

    Raises:
        UserError: they differ in the number of responses, or only some have rewards or labels.
    """

    def form(examples: ExampleTable) -> str:
        first = examples[0]
        given = [name for name in ("rewards", "labels") if getattr(first, name) is not None]
        return (
            f"{amount(len(first.response_ids), 'responses')} with {' and '.join(given) or 'no rewards and no labels'}"
        )

    forms = [form(examples) for examples in parts]
    for source, other in zip(sources, forms, strict=True):
        if other != forms[0]:
            raise UserError(
                f"data.train: examples of {source.path} have {other}, those of {sources[0].path} have {forms[0]}. "
                "Give sources of one form."
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


def check_can_sample(module: object) -> None:
    """Check that rounds can be sampled from what is trained.

    Raises:
        UserError: it has no policy, or does not learn from its own responses.
    """
    if not isinstance(module, PreferenceObjective):
        raise UserError("data.class_path=OnPolicyPairs samples from the policy of a lit_align objective. Train one.")
    if not module.data_needs().can_sample:
        raise UserError(
            f"data.class_path=OnPolicyPairs: {type(module).__name__} learns from a file, not from its own responses. "
            "Use OfflinePairs."
        )


def check_file_pairs(module: PreferenceObjective, option: str, source: Source, instead: str) -> None:
    """Check that the pairs of a file have what the objective reads; unlike a round's, they record no sampler.

    Args:
        option: Where the file is configured.
        instead: The option that measures the policy without such pairs.

    Raises:
        UserError: they have no log π_s, or no rewards, and the objective reads them.
    """
    name, needs = type(module).__name__, module.data_needs()
    key = option.partition("=")[0]
    why = f"{instead} compares the policy with its start on held-out prompts."
    if needs.reads_sampler:
        raise UserError(
            f"{option} must record log π_s, which {name} as configured reads, and pairs of a file do not. Leave "
            f"{key} out: {why}"
        )
    if needs.takes_groups and source.read(needs.data_kind)[0].rewards is None:
        raise UserError(
            f"{option} must have rewards, from which {name} as configured learns. Add them (columns score_chosen and "
            f"score_rejected, or responses and rewards), or leave {key} out: {why}"
        )
