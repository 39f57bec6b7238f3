"""The life of a sample within a round: a prompt becomes responses, scores, a group, pairs and recorded examples.

sample   K responses to each prompt, with log π_s                     SampleRow, stored; `sample.py`
score    a reward for each response, or their comparisons             ScoreRow, stored
group    the K responses with their rewards, all in one place         Example, `groups.py`
pair     which of the K responses are trained on                      `pairing.py`
record   labels, mismatched responses and log π_ref, if needed        Example, log-probabilities stored
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from lit_align.data.batches import Example
from lit_align.data.pairing import PairingRule, Pairs, with_mismatched
from lit_align.data.rounds.groups import groups_of
from lit_align.data.rounds.numbers import RoundNumbers
from lit_align.data.rounds.recorder import Computation, Loaded, LogpsFn
from lit_align.data.rounds.row_types import SampledTexts, SampleRow, ScoreRow
from lit_align.data.rounds.sample import RoundSamples
from lit_align.data.scorers.base import BaseScorer
from lit_align.data.table import ExampleTable


@dataclass(frozen=True)
class RoundMaker:
    """Makes one round: reads the stored parts, and computes and stores the others."""

    samples: RoundSamples
    scorer: BaseScorer

    def sample(self) -> Loaded[SampleRow]:
        """K responses to each prompt, with log π_s."""
        part, batches = self.samples.store.samples, self.samples.batches
        return self.samples.recorder.load_or_compute("sample", part, batches, self.samples)

    def score(self, samples: Loaded[SampleRow]) -> Loaded[ScoreRow]:
        """The scorer's rewards of each prompt's responses."""
        part = self.samples.store.scores(self.scorer.identity)
        return self.samples.recorder.load_or_compute("score", part, samples.batches, _Scoring(self.scorer, samples))

    def group(self, samples: Loaded[SampleRow], scores: Loaded[ScoreRow]) -> tuple[ExampleTable, RoundNumbers]:
        """All groups, in the order of the prompts, and their numbers, which are kept beside the round's files."""
        groups, numbers = groups_of(samples, scores)
        if self.samples.recorder.module.trainer.is_global_zero:
            numbers.keep_in(self.samples.store.path)
        return groups, numbers

    def pair(self, rule: PairingRule, groups: ExampleTable) -> Pairs[ExampleTable]:
        """The examples that a rule selects from the groups."""
        counts: Counter[str] = Counter()
        partial_drops: Counter[str] = Counter()
        selected = ExampleTable.temporary(rule.select(groups, counts, partial_drops))
        return Pairs(selected, counts, partial_drops)

    def record(self, examples: ExampleTable, mismatched: bool) -> ExampleTable:
        """The examples with everything that training reads.

        Args:
            mismatched: Add labels, and a response to another prompt as one more branch, with its log π_s.
        """
        recorder = self.samples.recorder
        table = ExampleTable.temporary(with_mismatched(examples)) if mismatched else examples
        if mismatched and self.samples.record_sampler:
            table = self._with_sampler_logps(table)
        if recorder.module.ends_resumed_epoch:  # the reference may have moved at the last step
            return table
        return recorder.with_reference(self.samples.store, table)

    def _with_sampler_logps(self, table: ExampleTable) -> ExampleTable:
        """Record log π_s of the mismatched responses, which were sampled for other prompts."""
        alone = ExampleTable.temporary(
            Example(example.prompt_ids, example.response_ids[-1:], example.source) for example in table
        )
        store = self.samples.store
        recorded = self.samples.recorder.logps_column("mismatched", "", store, alone, self._checked_policy())
        own = table.numbers("sampler_logps")
        assert own is not None
        return table.with_numbers("sampler_logps", np.hstack([own.reshape(len(table), -1), recorded]))

    @contextmanager
    def _checked_policy(self) -> Iterator[LogpsFn]:
        self.samples.check_policy()
        with self.samples.recorder.able_to_compute(self.samples.policy):
            yield self.samples.policy


@dataclass(frozen=True)
class _Scoring(Computation[ScoreRow]):
    """The scores of stored samples."""

    scorer: BaseScorer
    samples: Loaded[SampleRow]

    @contextmanager
    def ready(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.scorer.release()

    def compute(self, number: int) -> list[ScoreRow]:
        some = SampledTexts.from_arrow(self.samples.table(number))
        scored = self.scorer.score_groups([row.prompt for row in some], [row.responses for row in some])
        return [ScoreRow(row.source, self.scorer.identity, *group) for row, group in zip(some, scored, strict=True)]
