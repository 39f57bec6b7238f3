"""Prompts of a file, and a model's responses to them with their rewards, by all processes together.

The batches depend on the prompts alone. Each process computes its share of them, and all get all results, so that the
numbers do not depend on how many processes there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lit_align.console import print_field
from lit_align.data.base import data_module_of
from lit_align.data.formats.rows import Row, Rows
from lit_align.data.formats.spool import Spool
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.rendering import continues_text
from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import sampling_copy
from lit_align.data.sampling import Response, SampleRequest, Sampling
from lit_align.data.scorers.base import GroupScores, Scorer
from lit_align.data.tokenization import PreferenceTokenizer, listing
from lit_align.errors import UserError, amount
from lit_align.evaluation.shares import Batches, Share, compute_share
from lit_align.objectives import PreferenceObjective
from lit_align.policy import Policy


@dataclass(frozen=True)
class TokenizedPrompts:
    """The prompts of a file with their tokens."""

    rows: Sequence[Row]
    ids: Sequence[list[int]]
    lengths: list[int]


def check_batches(option: str, responses_per_prompt: int, batch_size: int) -> None:
    """Check that a batch holds the responses to a prompt.

    Args:
        option: Key of the callback whose options these are.

    Raises:
        UserError: it does not, or there are none.
    """
    if responses_per_prompt < 1 or batch_size < responses_per_prompt:
        raise UserError(
            f"{option}: responses_per_prompt={responses_per_prompt} must be at least 1 and at most "
            f"batch_size={batch_size}. Change one of them."
        )


def tokenizer_of(module: PreferenceObjective) -> PreferenceTokenizer:
    """The tokenizer of the data module, if it is one of lit_align's; else one without limits of length."""
    data = data_module_of(module.trainer)
    return data.prompt_tokenizer if data else PreferenceTokenizer(module.tokenizer, model_ends=module.model_ends)


def sampling_of(trainer: Trainer) -> Sampling:
    """The sampling options of the data module, if it samples; else the defaults."""
    data = data_module_of(trainer)
    return data.sampling if isinstance(data, OnPolicyPairs) else Sampling()


def tokenize_prompts(rows: Rows, tokenizer: PreferenceTokenizer, path: str, name: str) -> TokenizedPrompts:
    """Tokenize the prompts; a printed line counts the dropped and the cut ones.

    Raises:
        UserError: no prompt is left.
    """
    tokenizer.counts.clear()
    kept = Spool(tokenizer.prompts(rows))
    counts = rows.skipped + tokenizer.counts
    if not kept:
        raise UserError(f"{path}: no prompt is left: {listing(counts)}. Give other prompts.")
    if counts:
        print_field(name, f"{amount(len(kept), 'prompts')} from {path}; {listing(counts)}")
    ids = Spool(ids for _, ids in kept)
    return TokenizedPrompts(Spool(row for row, _ in kept), ids, list(map(len, ids)))


@dataclass(frozen=True)
class Answering:
    """How prompts are answered.

    Args:
        module: Its trainer's processes share the prompts.
        stream: Begins the key of each prompt's random streams.
        count: n, the responses to each prompt.
    """

    module: PreferenceObjective
    stream: tuple[str, int]
    count: int
    sampling: Sampling

    def respond(self, policy: Policy, prompts: TokenizedPrompts, batches: Batches, name: str) -> Share[list[Response]]:
        """n of a policy's responses to each prompt of this process's batches, by the rounds' server or a copy of it."""
        data, longest = data_module_of(self.module.trainer), max(prompts.lengths) + self.sampling.max_new_tokens
        with data.sampling_with(policy, longest) if data else sampling_copy(policy) as sampler:
            return self.respond_with(sampler, policy, prompts, batches, name)

    def respond_with(
        self, sampler: Sampler, policy: Policy, prompts: TokenizedPrompts, batches: Batches, name: str
    ) -> Share[list[Response]]:
        """The same by a sampler that has the policy's weights."""
        tokenizer = tokenizer_of(self.module)

        def request(places: Sequence[int]) -> SampleRequest:
            rows = [prompts.rows[i] for i in places]
            keys = [(*self.stream, row.source) for row in rows]
            return SampleRequest(
                prompts=[prompts.ids[i] for i in places],
                keys=keys,
                count=self.count,
                sampling=self.sampling,
                end_ids=tokenizer.end_ids(),
                continued={key for key, row in zip(keys, rows, strict=True) if continues_text(tokenizer.as_chat(row))},
            )

        return compute_share(
            self.module.trainer,
            batches,
            name,
            lambda places: sampler.sample_in_turn(policy, request(places)),
            lambda: sampler.sample_in_turn(policy, None),
        )


def score_share(
    scorer: Scorer,
    prompts: TokenizedPrompts,
    batches: Batches,
    responses: Mapping[int, Sequence[list[Response]]],
) -> Share[GroupScores]:
    """The scorer's rewards of the responses to each prompt of this process's batches; then releases the scorer."""

    def scored() -> Iterator[list[GroupScores]]:
        for number, groups in responses.items():
            texts = [[response.text for response in group] for group in groups]
            yield scorer.score_groups([prompts.rows[i].prompt for i in batches[number]], texts)

    share = Share(list(responses), scored())
    scorer.release()
    return share
