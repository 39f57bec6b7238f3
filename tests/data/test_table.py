"""Examples in Arrow memory: the same as in Python, and of no size there."""

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_align.data.batches import Example, collate
from lit_align.data.table import CHUNK, ExampleTable
from lit_align.errors import UserError


def examples(count: int, K: int = 2, **numbers: float) -> list[Example]:
    random = np.random.default_rng(0)

    def ids(least: int) -> list[int]:
        return random.integers(0, 300_000, random.integers(least, 9)).tolist()

    def each(number: float) -> list[float]:
        return (number + random.random(K)).tolist()

    return [
        Example(ids(1), [ids(0) for _ in range(K)], f"ü\udcff:{i}", **{name: each(n) for name, n in numbers.items()})
        for i in range(count)
    ]


def test_a_table_gives_back_its_examples(tmp_path):
    made = examples(2 * CHUNK + 3, K=3, rewards=0.5, sampler_logps=-9.0)
    table = ExampleTable.write(tmp_path / "examples.arrow", made)
    assert list(table) == list(ExampleTable.of(made)) == made
    assert (table[-1], table[5:9:2], len(table)) == (made[-1], made[5:9:2], len(made))
    assert table.lengths.total.tolist() == [example.tokens for example in made]
    assert table.lengths.longest.tolist() == [max(map(len, example.response_ids)) for example in made]
    with pytest.raises(IndexError):
        table[len(made)]


def test_a_label_of_the_example_and_a_mismatched_branch_are_kept():
    soft = [Example([1], [[2], [3]], "a", labels=0.75), Example([1], [[2], [3]], "b", labels=0.5)]
    assert list(ExampleTable.of(soft)) == soft
    mismatched = [Example([1], [[2], [3]], "a", labels=[1.0, 0.0], mismatched=True)]
    assert list(ExampleTable.of(mismatched)) == mismatched


def test_weights_are_kept_in_any_order():
    made = [replace(each, weight=w) for each, w in zip(examples(4), (0.1, 2.0, 0.0, 1.0), strict=True)]
    table = ExampleTable.of(made)
    assert list(table) == made
    assert table.reordered(np.array([3, 0])).weights.tolist() == [1.0, float(np.float32(0.1))]
    assert table.reordered(np.array([3, 3]))[1].weight == 1.0
    assert ExampleTable.of(examples(4)).weights is None


def test_a_batch_is_the_same_to_the_bit_as_one_of_lists():
    made = examples(CHUNK + 50, rewards=1 / 3, reference_logps=-7.1)
    places = [CHUNK + 3, 0, 17]
    ours = collate(ExampleTable.of(made).views(places), places)
    theirs = vars(collate([made[place] for place in places], places))
    for name, value in vars(ours).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name], name
    assert ours.prompt_ids.dtype == torch.int64


def test_tables_are_joined_and_get_numbers():
    first, second = examples(3, rewards=1.0), examples(CHUNK + 2, rewards=2.0)
    joined = ExampleTable.joined([ExampleTable.of(first), ExampleTable.of(second)])
    assert list(joined) == first + second
    numbers = np.arange(2.0 * len(joined)).reshape(-1, 2)
    numbered = joined.with_numbers("reference_logps", numbers)
    assert numbered[4].reference_logps == [8.0, 9.0]
    assert joined[4].reference_logps is None
    assert numbered.numbers("reference_logps").tolist() == numbers.reshape(-1).tolist()
    assert numbered.numbers("sampler_logps") is None
    assert joined.group_sizes == {2: len(joined)}


def test_a_table_can_be_written_from_the_one_in_its_place(tmp_path):
    made = examples(CHUNK + 5)
    path = tmp_path / "examples.arrow"
    first = ExampleTable.write(path, made)
    assert list(ExampleTable.write(path, (each for each in first if each.tokens % 2))) == [
        each for each in made if each.tokens % 2
    ]
    assert list(first) == made
    assert len(ExampleTable.write(path, [])) == 0


def test_a_full_disk_is_named(tmp_path):
    """A limit of the size of files fails like a full disk, in the middle of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"examples.arrow cannot be written: .*another folder \(data.cache_dir\)"):
            ExampleTable.write(Path(tmp_path, "examples.arrow"), examples(3 * CHUNK), "data.cache_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "examples.arrow").exists()
