"""Groups from Arrow columns: the same as from rows in Python."""

import shutil
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lit_align.data.batches import Example
from lit_align.data.rounds.groups import groups_of
from lit_align.data.rounds.recorder import Loaded
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.rounds.store import Part, RoundStore

FIXTURE = Path(__file__).parents[2] / "fixtures" / "rounds_80641ec"
BATCHES = [[4, 0], [3, 1], [2]]


def sample(place: int, logps: bool = True) -> SampleRow:
    ids = [[place, 300_000], [], [7] * place]
    texts = [f"ü{place}", "", "\x00a"]
    recorded = [-1.5, 0.1 + 0.2, -float(place)] if logps else None
    return SampleRow(f"ü:{place}", f"p{place}", [1] * (place + 1), texts, ids, [True, False, True], recorded)


def scored(place: int, *, parts: bool = False, preferences: bool = False) -> ScoreRow:
    scores = [1 / 3, float(place), -0.0]
    matrix = [[0.5, 1 / 3, 1.0], [2 / 3, 0.5, 0.25], [0.0, 0.75, 0.5]]
    return ScoreRow(
        f"ü:{place}", "s", scores, {"wit": scores[::-1]} if parts else None, matrix if preferences else None
    )


def by_rows(samples: Loaded[SampleRow], scores: Loaded[ScoreRow]) -> list[Example]:
    """Groups as lists, in the order of the prompts."""
    made = {
        place: Example(
            row.prompt_ids,
            row.response_ids,
            row.source,
            rewards=given.scores,
            sampler_logps=row.sampler_logps,
            texts=row.responses,
            preferences=given.preferences,
        )
        for place, row, given in zip(chain.from_iterable(samples.batches), samples, scores, strict=True)
    }
    return [made[place] for place in sorted(made)]


@pytest.mark.parametrize("options", [{}, {"parts": True}, {"preferences": True}])
@pytest.mark.parametrize("logps", [True, False])
def test_groups_are_those_of_the_rows(tmp_path, logps, options):
    store = RoundStore(tmp_path, 0, {})
    for number, places in enumerate(BATCHES):
        store.samples.write(number, [sample(place, logps) for place in places])
        store.scores("s").write(number, [scored(place, **options) for place in places])
    samples, scores = Loaded(store.samples, BATCHES, 0.0, 0), Loaded(store.scores("s"), BATCHES, 0.0, 0)
    groups, numbers = groups_of(samples, scores)
    assert list(groups) == by_rows(samples, scores)
    assert [group.source for group in groups] == [f"ü:{place}" for place in range(5)]
    in_files = list(chain.from_iterable(BATCHES))
    assert numbers.batch.tolist() == [0, 0, 1, 1, 2]
    assert numbers.rewards.tolist() == [scored(place).scores for place in in_files]
    assert numbers.finished.tolist() == [[1.0, 0.0, 1.0]] * 5
    assert {name: part.tolist() for name, part in numbers.parts.items()} == (
        {"wit": [scored(place).scores[::-1] for place in in_files]} if "parts" in options else {}
    )


def test_groups_of_an_earlier_version_are_those_of_its_rows(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "rounds")
    (path,) = (tmp_path / "rounds").iterdir()
    store = RoundStore(tmp_path / "rounds", 0, {})
    store.path, store.id = path, path.name.rpartition("-")[2]
    identity = pq.read_table(next(path.glob("scores-*"))).column("scorer")[0].as_py()
    parts: list[Part] = [store.samples, store.scores(identity)]
    sizes = [len(store.samples.read(number) or []) for number in (0, 1)]
    batches = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    samples, scores = (Loaded(part, batches, 0.0, 0) for part in parts)
    groups, _ = groups_of(samples, scores)
    assert list(groups) == by_rows(samples, scores)
    assert len(groups) == sum(sizes) > 2
