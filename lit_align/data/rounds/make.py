"""The life of a sample within a round: a prompt becomes responses, scores, a group, pairs and recorded examples.

sample   K responses to each prompt, with log π_s                     SampleRow, stored
score    a reward for each response, or their comparisons             ScoreRow, stored
group    the K responses with their rewards, all in one place         Example, `groups.py`
pair     which of the K responses are trained on                      `pairing.py`
record   labels, mismatched responses and log π_ref, if needed        Example, log-probabilities stored
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from lit_align.data.batches import Example
from lit_align.data.pairing import PairingRule, Pairs, with_mismatched
from lit_align.data.rounds.groups import groups_of
from lit_align.data.rounds.kept_weights import KeptWeights
from lit_align.data.rounds.numbers import RoundNumbers
from lit_align.data.rounds.record import Loaded, LogpsFn, Recorder
from lit_align.data.rounds.records import SampledTexts, SampleRow, ScoreRow
from lit_align.data.rounds.store import RoundStore
from lit_align.data.samplers.base import Sampler
from lit_align.data.sampling import Response, SampleRequest, Sampling, check_stop, sampling_batches
from lit_align.data.scorers.base import BaseScorer
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError
from lit_align.policy import Policy


@dataclass(frozen=True)
class CurrentRound:
    """The round that is trained on."""

    index: int  # from 0
    step: int  # the optimizer step at which its responses are sampled
    key: dict[str, Any]  # all that determines the samples
    trained_at: int  # the step at which its training begins
    groups: ExampleTable = ExampleTable([])  # noqa: RUF009  # every prompt with its K responses; empty until made
    examples: ExampleTable = ExampleTable([])  # noqa: RUF009  # the examples that are trained on; never written

    @classmethod
    def of(cls, step: int | None, key: dict[str, Any], trained_at: int | None = None) -> Self | None:
        """The round of a checkpoint; None without a step."""
        return None if step is None else cls(int(key["round"]), step, key, step if trained_at is None else trained_at)


@dataclass(frozen=True)
class RoundMaker:
    """Makes one round: reads the stored parts, and computes and stores the others."""

    round: CurrentRound
    store: RoundStore
    recorder: Recorder
    prompts: ExampleTable  # without responses
    sampler: Sampler
    sampling: Sampling
    sampling_dtype: torch.dtype
    longest: int  # most tokens of a prompt and its response, in all rounds
    end_ids: list[int]
    seed: int
    responses_per_prompt: int
    prompts_per_batch: int
    record_sampler: bool
    scorer: BaseScorer

    @property
    def policy(self) -> Policy:
        policy = self.recorder.module.policy
        assert policy is not None
        return policy

    @cached_property
    def batches(self) -> list[list[int]]:
        """Indices of the prompts that are sampled, scored and stored together."""
        return sampling_batches(self.prompts.lengths.prompt.tolist(), self.prompts_per_batch)

    # --- sample ---

    def sample(self) -> Loaded[SampleRow]:
        """K responses to each prompt, with log π_s."""
        return self.recorder.load_or_compute(
            "sample", self.store.samples, self.batches, self._open_sampler, self._sample_batch, self._sample_nothing
        )

    @contextmanager
    def _open_sampler(self) -> Iterator[Sampler | None]:
        self._check_policy()
        with ExitStack() as stack:
            if missing := self.missing():
                check_stop(self.sampling.stop, self.policy.tokenizer)
                stack.enter_context(self.sampler.ready(self.policy, self.sampling_dtype, self.longest))
            stack.enter_context(self.recorder.able_to_compute(self.policy))
            yield self.sampler if missing else None

    def _sample_batch(self, sampler: Sampler | None, number: int) -> list[SampleRow]:
        """The rows of one batch; without a sampler, all batches are drawn."""
        rows = self.store.drawn.read(number)
        if sampler is not None:
            sampled = sampler.sample_in_turn(self.policy, self._request(number) if rows is None else None)
            rows = self._rows(number, sampled) if rows is None else rows
        assert rows is not None
        if not self.record_sampler:
            return rows
        logps = self.recorder.logps(self.policy, [Example(r.prompt_ids, r.response_ids, r.source) for r in rows])
        return [replace(row, sampler_logps=each) for row, each in zip(rows, logps, strict=True)]

    def _sample_nothing(self, sampler: Sampler | None) -> None:
        """Take part in what other processes compute of their batches."""
        if self.sampler.streams_weights:
            if sampler is not None:
                sampler.sample_in_turn(self.policy, None)
            if self.record_sampler:
                self.recorder.logps(self.policy, [])

    def _request(self, number: int) -> SampleRequest:
        prompts = [self.prompts[place] for place in self.batches[number]]
        return SampleRequest(
            prompts=[prompt.prompt_ids for prompt in prompts],
            keys=[(self.seed, self.round.index, prompt.source) for prompt in prompts],
            count=self.responses_per_prompt,
            sampling=self.sampling,
            end_ids=self.end_ids,
        )

    def _rows(self, number: int, sampled: Sequence[Sequence[Response]]) -> list[SampleRow]:
        prompts = (self.prompts[place] for place in self.batches[number])
        return [_sample_row(*each) for each in zip(prompts, sampled, strict=True)]

    def _check_policy(self) -> None:
        """Check that the policy is the one that samples this round.

        Raises:
            UserError: it is not.
        """
        if self.recorder.module.global_step == self.round.step:
            return
        if self.policy.fingerprint() != self.round.key.get("policy"):
            raise UserError(
                f"the checkpoint needs the responses of round {self.round.index + 1}, sampled at step "
                f"{self.round.step}, which are no longer in {self.store.path.parent}. Restore that folder "
                "(data.store), or, without data.rounds_ahead, resume from a checkpoint at the end of an epoch."
            )

    # --- sample ahead ---

    def missing(self) -> list[int]:
        """The batches whose responses are not stored."""
        drawn, samples = self.store.drawn, self.store.samples
        numbers = range(len(self.batches))
        return [number for number in numbers if not drawn.is_stored(number) and not samples.is_stored(number)]

    def prepare_ahead(self) -> None:
        """Give the sampler the weights of this round, and keep them; every process must call it."""
        if self.recorder.module.global_step == self.round.step:
            self._kept.keep(self.policy)
        with self.sampling_policy():
            self._check_policy()
            check_stop(self.sampling.stop, self.policy.tokenizer)
            self.sampler.prepare(self.policy, self.sampling_dtype, self.longest)

    def draw(self, number: int) -> None:
        """Sample one batch with a prepared sampler, and store it without log π_s."""
        self.store.drawn.write(number, self._rows(number, self.sampler.sample(self.policy, self._request(number))))

    @contextmanager
    def sampling_policy(self) -> Iterator[None]:
        """Within this context, the policy has the weights that sample this round, if they are kept."""
        if self.recorder.module.global_step == self.round.step or not self._kept.exist:
            yield
        else:
            with self._kept.given_to(self.policy):
                yield

    def forget_ahead(self) -> None:
        """Remove what only sampling ahead needed; the round's samples are stored."""
        if self.recorder.module.trainer.is_global_zero:
            self._kept.remove()
            for number in range(len(self.batches)):
                self.store.drawn.file(number).unlink(missing_ok=True)

    @property
    def _kept(self) -> KeptWeights:
        return KeptWeights(self.store.path)

    # --- score ---

    def score(self, samples: Loaded[SampleRow]) -> Loaded[ScoreRow]:
        """The scorer's rewards of each prompt's responses."""

        def score_batch(scorer: BaseScorer, number: int) -> list[ScoreRow]:
            some = SampledTexts.from_arrow(samples.table(number))
            scored = scorer.score_groups([row.prompt for row in some], [row.responses for row in some])
            return [ScoreRow(row.source, scorer.identity, *group) for row, group in zip(some, scored, strict=True)]

        return self.recorder.load_or_compute(
            "score", self.store.scores(self.scorer.identity), self.batches, self._open_scorer, score_batch
        )

    @contextmanager
    def _open_scorer(self) -> Iterator[BaseScorer]:
        try:
            yield self.scorer
        finally:
            self.scorer.release()

    # --- group ---

    def group(self, samples: Loaded[SampleRow], scores: Loaded[ScoreRow]) -> tuple[ExampleTable, RoundNumbers]:
        """All groups, in the order of the prompts, and their numbers, which are kept beside the round's files."""
        groups, numbers = groups_of(samples, scores)
        if self.recorder.module.trainer.is_global_zero:
            numbers.keep_in(self.store.path)
        return groups, numbers

    # --- pair ---

    def pair(self, rule: PairingRule, groups: ExampleTable) -> Pairs[ExampleTable]:
        """The examples that a rule selects from the groups."""
        counts: Counter[str] = Counter()
        partial_drops: Counter[str] = Counter()
        selected = ExampleTable.temporary(rule.select(groups, counts, partial_drops))
        return Pairs(selected, counts, partial_drops)

    # --- record ---

    def record(self, examples: ExampleTable, mismatched: bool) -> ExampleTable:
        """The examples with everything that training reads.

        Args:
            mismatched: Add labels, and a response to another prompt as one more branch, with its log π_s.
        """
        table = ExampleTable.temporary(with_mismatched(examples)) if mismatched else examples
        if mismatched and self.record_sampler:
            table = self._with_sampler_logps(table)
        if self.recorder.module.ends_resumed_epoch:  # the reference may have moved at the last step
            return table
        return self.recorder.with_reference(self.store, table)

    def _with_sampler_logps(self, table: ExampleTable) -> ExampleTable:
        """Record log π_s of the mismatched responses, which were sampled for other prompts."""
        alone = ExampleTable.temporary(
            Example(example.prompt_ids, example.response_ids[-1:], example.source) for example in table
        )
        recorded = self.recorder.logps_column("mismatched", "", self.store, alone, self._open_policy)
        own = table.numbers("sampler_logps")
        assert own is not None
        return table.with_numbers("sampler_logps", np.hstack([own.reshape(len(table), -1), recorded]))

    @contextmanager
    def _open_policy(self) -> Iterator[LogpsFn]:
        self._check_policy()
        with self.recorder.able_to_compute(self.policy):
            yield self.policy


def _sample_row(prompt: Example, responses: Sequence[Response]) -> SampleRow:
    assert prompt.prompt is not None
    return SampleRow(
        source=prompt.source,
        prompt=prompt.prompt,
        prompt_ids=prompt.prompt_ids,
        responses=[response.text for response in responses],
        response_ids=[response.ids for response in responses],
        finished=[response.finished for response in responses],
        sampler_logps=None,
    )


def check_settings(begun: CurrentRound, settings: dict[str, Any]) -> None:
    """Check that a round that a checkpoint is in the middle of has the same prompts and settings now."""
    if different := [name for name, value in settings.items() if begun.key.get(name) != value]:
        options = [f"{'model' if name == 'policy.temperature' else 'data'}.{name}" for name in different]
        raise UserError(
            f"the checkpoint is from the middle of round {begun.index + 1}, whose responses were sampled with "
            f"another {' and '.join(options)}. (data.prompts, prompts_per_round, seed and, for chunks, "
            "trainer.max_epochs determine a round's prompts.) Resume with the settings that the round began with, "
            "or from a checkpoint at the end of a round."
        )
