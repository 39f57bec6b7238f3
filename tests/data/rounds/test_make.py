"""A round in memory: its prompts' order, and no object for each response."""

import sys
from types import SimpleNamespace
from typing import Any

from lit_align.data import BestWorst
from lit_align.data.batches import Example
from lit_align.data.rounds.current import CurrentRound
from lit_align.data.rounds.groups import groups_of
from lit_align.data.rounds.make import RoundMaker
from lit_align.data.rounds.recorder import Loaded
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.rounds.sample import RoundSamples
from lit_align.data.rounds.store import RoundStore
from lit_align.data.sampling import Sampling
from lit_align.data.table import ExampleTable


def made(folder: Any, count: int) -> tuple[RoundMaker, Loaded[SampleRow], Loaded[ScoreRow]]:
    """A maker of a round whose samples and scores are stored; prompts of different lengths in batches of 8."""
    prompts = [Example([7] * (1 + i * 5 % 11), [], f"p:{i}", prompt=f"p{i}") for i in range(count)]
    nothing: Any = SimpleNamespace()
    its = RoundSamples(
        round=CurrentRound(0, 0, {}, 0),
        store=RoundStore(folder, 0, {"count": count}),
        recorder=nothing,
        prompts=ExampleTable.of(prompts),
        sampler=nothing,
        sampling=Sampling(),
        sampling_dtype=nothing,
        longest=75,
        end_ids=[],
        seed=0,
        responses_per_prompt=2,
        prompts_per_batch=8,
        record_sampler=True,
    )
    samples, scores = its.store.samples, its.store.scores("s")
    for number, places in enumerate(its.batches):
        rows = [
            SampleRow(
                f"p:{i}", f"p{i}", prompts[i].prompt_ids, [f"a{i}", f"b{i}"], [[i], [i, 1]], [True] * 2, [-1.0, -2.0]
            )
            for i in places
        ]
        samples.write(number, rows)
        scores.write(number, [ScoreRow(row.source, "s", [0.0, 1.0]) for row in rows])
    return RoundMaker(its, nothing), Loaded(samples, its.batches, 0.0, 0), Loaded(scores, its.batches, 0.0, 0)


def test_groups_are_in_the_order_of_the_prompts(tmp_path):
    maker, samples, scores = made(tmp_path, 30)
    assert [place for places in maker.samples.batches for place in places] != list(range(30))
    groups, _ = groups_of(samples, scores)
    assert [group.source for group in groups] == [f"p:{i}" for i in range(30)]
    assert groups[17].prompt_ids == maker.samples.prompts[17].prompt_ids
    assert (groups[17].texts, groups[17].response_ids) == (["a17", "b17"], [[17], [17, 1]])
    pairs = maker.pair(BestWorst(), groups)
    assert list(pairs.examples)[17].response_ids == [[17, 1], [17]]
    assert pairs.examples[17].texts is None


def test_a_round_takes_no_objects_for_its_responses(tmp_path):
    def blocks(count: int) -> int:
        maker, samples, scores = made(tmp_path / str(count), count)
        before = sys.getallocatedblocks()
        groups, _ = groups_of(samples, scores)
        pairs = maker.pair(BestWorst(), groups)
        assert len(pairs.examples) == count
        return sys.getallocatedblocks() - before

    blocks(8)
    assert blocks(400) < blocks(16) + 1000  # lists of the groups and pairs would take 40 for each prompt
