"""Prompts of a file, and a model's responses to them with their rewards, by all processes together.

The batches depend on the prompts alone. Each process computes its share of them, and all get all results, so that the
numbers do not depend on how many processes there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from lit_align.console import phase, print_field
from lit_align.data.base import PairsDataModule
from lit_align.data.formats.rows import Row, Rows
from lit_align.data.generation import sample_responses
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.sampling import Response, Sampling, in_order
from lit_align.data.scorers.base import Scorer, score
from lit_align.data.tokenization import PreferenceTokenizer, listing
from lit_align.errors import UserError
from lit_align.objectives import PreferenceObjective

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizedPrompts:
    """The prompts of a file with their tokens."""

    name: str  # of the phase, on the terminal
    path: str
    rows: list[Row]
    ids: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(frozen=True)
class PromptScores:
    """The rewards of the responses to one prompt, and the parts that they are made of."""

    rewards: list[float]
    parts: dict[str, list[float]]


def tokenizer_of(module: PreferenceObjective) -> PreferenceTokenizer:
    """The tokenizer of the data module, if it is one of lit_align's; else one without limits of length."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PairsDataModule):
        return data.prompt_tokenizer
    return PreferenceTokenizer(module.tokenizer, max_prompt_length=1 << 20, max_response_length=1 << 20)


def sampling_of(trainer: Trainer) -> Sampling:
    """The sampling options of the data module, if it samples; else the defaults."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.sampling if isinstance(data, OnPolicyPairs) else Sampling()


def tokenize_prompts(rows: Rows, tokenizer: PreferenceTokenizer, path: str, name: str) -> TokenizedPrompts:
    """Tokenize the prompts; a printed line counts the dropped and the cut ones.

    Raises:
        UserError: no prompt is left.
    """
    kept, counts = tokenizer.prompts(rows)
    counts = rows.skipped + counts
    if not kept:
        raise UserError(f"{path}: no prompt is left: {listing(counts)}.")
    if counts:
        print_field(name, f"{len(kept)} prompts from {path}; {listing(counts)}")
    return TokenizedPrompts(name, path, [row for row, _ in kept], [ids for _, ids in kept])


def compute_share(
    trainer: Trainer, batches: Sequence[Sequence[int]], name: str, compute: Callable[[Sequence[int]], list[T]]
) -> dict[int, list[T]]:
    """`compute` of the places of each of this process's batches, by the batch's number."""
    computed = {}
    with phase(name, sum(map(len, batches)), "prompts") as bar:
        for number, places in enumerate(batches):
            if number % trainer.world_size == trainer.global_rank:
                computed[number] = compute(places)
            bar.advance(len(places))
    return computed


def gather_in_order(trainer: Trainer, batches: Sequence[Sequence[int]], share: dict[int, list[T]]) -> list[T]:
    """The results of all processes as one list, in the order of the prompts, on every process."""
    if trainer.world_size > 1:
        shares: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(shares, share)
        share = {number: batch for each in shares for number, batch in each.items()}
    return in_order(batches, share)


@dataclass(frozen=True)
class Answering:
    """How prompts are answered.

    Args:
        stream: Begins the key of each prompt's random streams.
        count: n, the responses to each prompt.
    """

    stream: tuple[str, int]
    count: int
    sampling: Sampling

    def respond(
        self,
        module: PreferenceObjective,
        model: PreTrainedModel,
        prompts: TokenizedPrompts,
        batches: Sequence[Sequence[int]],
        name: str,
    ) -> dict[int, list[list[Response]]]:
        """n responses to each prompt of this process's batches."""
        end_ids = tokenizer_of(module).end_ids()

        def sample(places: Sequence[int]) -> list[list[Response]]:
            keys = [(*self.stream, prompts.rows[i].source) for i in places]
            ids = [prompts.ids[i] for i in places]
            return sample_responses(model, module.tokenizer, ids, keys, self.count, self.sampling, end_ids)

        return compute_share(module.trainer, batches, name, sample)


def score_share(
    scorer: Scorer,
    prompts: TokenizedPrompts,
    batches: Sequence[Sequence[int]],
    responses: dict[int, list[list[Response]]],
) -> dict[int, list[PromptScores]]:
    """The scorer's rewards of the responses to each prompt of this process's batches; then releases the scorer."""
    scored = {}
    for number, groups in responses.items():
        texts = [prompts.rows[i].prompt for i, group in zip(batches[number], groups, strict=True) for _ in group]
        scores = score(scorer, texts, [response.text for group in groups for response in group])
        ends = [sum(map(len, groups[: k + 1])) for k in range(len(groups))]
        places = [slice(end - len(group), end) for end, group in zip(ends, groups, strict=True)]
        scored[number] = [
            PromptScores(scores[place], {name: values[place] for name, values in scores.parts.items()})
            for place in places
        ]
    scorer.release()
    return scored
