"""A loader serves every example once per epoch, in a reproducible order, and resumes within one."""

import pytest
import torch

from lit_align.data.batches import Example
from lit_align.data.loader import ExampleLoader, Mixture
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError


def examples(count: int) -> ExampleTable:
    return ExampleTable.of(Example([i + 1], [[1], [2]], "") for i in range(count))


def order(loader: ExampleLoader) -> list[int]:
    return [i for batch in loader for i in batch.index.tolist()]


def test_every_example_is_served_once_in_an_order_of_seed_and_epoch():
    first = order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 0))
    assert sorted(first) == list(range(10))
    assert first == order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 0))
    assert first != order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 1))
    assert first != order(ExampleLoader(examples(10), 3, seed=2, epoch=lambda: 0))


def test_processes_share_the_examples_equally_without_overlap():
    loaders = [ExampleLoader(examples(11), 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    served = [order(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert not set(served[0]) & set(served[1])
    assert [len(s) for s in served] == [4, 4]
    assert loaders[0].dropped == 3


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("length", [None, 9])
def test_batches_know_their_weights_in_advance(world_size, length):
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(11, generator=random).double().tolist()
    some = ExampleTable.of(Example([1] * (1 + i % 5), [[1], [2]], "", weight=w) for i, w in enumerate(weights))
    options = {"group_by_length": True, "epoch": lambda: 3, "world_size": world_size, "length": length}
    loaders = [ExampleLoader(some, 2, seed=1, rank=rank, **options) for rank in range(world_size)]
    served = [[batch.weights.double().sum().item() for batch in loader] for loader in loaders]
    for loader, sums in zip(loaders, served, strict=True):
        assert [loader.weight_of(number) for number in range(len(loader))] == pytest.approx(sums, rel=1e-14)
        means = [sum(each) / world_size for each in zip(*served, strict=True)]
        assert [loader.mean_weight_of(number) for number in range(len(loader))] == pytest.approx(means, rel=1e-14)


def test_length_batches_are_the_same_for_any_number_of_processes():
    lengths = torch.randint(1, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    some = ExampleTable.of(Example([1] * length, [[2], [3]], "") for length in lengths)

    def batches(size: int, epoch: int = 0, **kwargs: int) -> list[list[int]]:
        loader = ExampleLoader(some, size, seed=1, group_by_length=True, epoch=lambda: epoch, **kwargs)
        return [batch.index.tolist() for batch in loader]

    whole = batches(4)
    assert sorted(i for batch in whole for i in batch) == list(range(203))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in whole[:-1]]
    assert sum(spread) / len(spread) < 15  # of batches drawn at random it is about 120
    assert whole != batches(4, epoch=1)
    firsts = [lengths[batch[0]] for batch in whole]
    assert firsts != sorted(firsts)
    shares = [batches(2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [{*a, *b} for a, b in zip(*shares, strict=True)] == [set(batch) for batch in whole[:-1]]


def test_a_loader_resumes_after_the_batches_it_served():
    whole = ExampleLoader(examples(10), 3, seed=1)
    batches = [batch.index.tolist() for batch in whole]
    stopped = ExampleLoader(examples(10), 3, seed=1)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    resumed = ExampleLoader(examples(10), 3, seed=1)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.index.tolist() for batch in resumed] == batches[2:]
    assert [batch.index.tolist() for batch in resumed] == batches  # the next epoch is whole again


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_epoch_served_whole_starts_over_in_batches_of_any_size(batch_size):
    loader = ExampleLoader(examples(4), 2, seed=1)
    order(loader)
    resumed = ExampleLoader(examples(4), batch_size, seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert len(order(resumed)) == 4


def test_within_an_epoch_the_batches_keep_their_size_over_all_processes():
    stopped = ExampleLoader(examples(16), 4, seed=1)
    served = [next(iter(stopped)).index.tolist()]
    with pytest.raises(UserError, match=r"4 batches of 4 examples, and now there are 8 of 2 \(data.batch_size=2 × 1"):
        ExampleLoader(examples(16), 2, seed=1).load_state_dict(stopped.state_dict())
    halves = [ExampleLoader(examples(16), 2, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(stopped.state_dict())
    rest = [i for half in halves for i in order(half)]
    assert sorted(served[0] + rest) == list(range(16))


def test_more_processes_do_not_repeat_an_epoch_that_was_served_whole():
    """Two processes leave two of the ten examples out, and have no third batch."""
    stopped = ExampleLoader(examples(10), 4, seed=1)
    for _ in zip(range(2), stopped, strict=False):
        pass
    assert stopped.state_dict()["served"] == 2
    with pytest.raises(UserError, match=r"3 batches of 4 examples, and now there are 2 of 4 .*resume from the end"):
        ExampleLoader(examples(10), 2, seed=1, world_size=2).load_state_dict(stopped.state_dict())


def test_resuming_within_an_epoch_needs_the_same_data():
    stopped = ExampleLoader(examples(10), 4, seed=1)
    next(iter(stopped))
    changed = ExampleTable.of([*examples(10)[:-1], Example([1], [[1], [2, 3, 4, 5, 6]], "")])
    with pytest.raises(
        UserError, match=r"an epoch over \d+ tokens of data, and now there are \d+: the data have chang"
    ):
        ExampleLoader(changed, 4, seed=1).load_state_dict(stopped.state_dict())


def test_a_stream_cycles_through_its_examples_in_new_orders():
    served = order(ExampleLoader(examples(4), 2, seed=1, length=6))
    passages = [served[start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(passage) == [0, 1, 2, 3] for passage in passages)
    assert passages[0] != passages[1]
    assert order(ExampleLoader(examples(4), 2, seed=1, length=1)) == served[:2]


def test_a_stream_resumes_after_the_batches_it_served():
    stopped = ExampleLoader(examples(4), 2, seed=1, length=6)
    iterator = iter(stopped)
    before = [next(iterator).index.tolist() for _ in range(3)]
    resumed = ExampleLoader(examples(4), 2, seed=1, length=6)
    resumed.load_state_dict(stopped.state_dict())
    after = [batch.index.tolist() for batch in resumed]
    assert before + after == [batch.index.tolist() for batch in ExampleLoader(examples(4), 2, seed=1, length=6)]


MIXED = Mixture((6, 10), (2.0, 0.3))  # 12 + 3 examples


def test_weights_set_how_often_a_sources_examples_are_served():
    epochs = [order(ExampleLoader(examples(16), 4, seed=1, epoch=lambda e=e: e, mixture=MIXED)) for e in range(10)]
    for served in epochs:
        assert sorted(i for i in served if i < 6) == sorted([*range(6), *range(6)])
        assert len({i for i in served if i >= 6}) == 3
    rare = [i for served in epochs for i in served if i >= 6]
    assert all(rare.count(i) == 3 for i in range(6, 16))  # 10 epochs of 30 %


def test_a_mixture_is_the_same_for_any_number_of_processes_and_resumes():
    def batches(size: int, **options: int) -> list[list[int]]:
        loader = ExampleLoader(examples(16), size, seed=1, mixture=MIXED, **options)
        return [batch.index.tolist() for batch in loader]

    whole = batches(4)
    shares = [batches(2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted([*a, *b]) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole[:-1]]
    stopped = ExampleLoader(examples(16), 4, seed=1, mixture=MIXED)
    iterator = iter(stopped)
    next(iterator)
    resumed = ExampleLoader(examples(16), 4, seed=1, mixture=MIXED)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.index.tolist() for batch in resumed] == whole[1:]
    other = ExampleLoader(examples(16), 4, seed=1, mixture=Mixture((6, 10), (0.5, 1.2)))
    with pytest.raises(UserError, match=r"sources with the weights \[2.0, 0.3\], and now they are \[0.5, 1.2\]"):
        other.load_state_dict(stopped.state_dict())


def test_equal_weights_change_nothing():
    mixed = ExampleLoader(examples(16), 4, seed=1, mixture=Mixture((6, 10), (1.0, 1.0)))
    assert order(mixed) == order(ExampleLoader(examples(16), 4, seed=1))


def batches_of_lists(made: list[Example], size: int, rank: int, world: int, epoch: int) -> list[list[int]]:
    """The order as it is computed from lists: shuffled, grouped by length in stretches of 32 batches, dealt out."""
    generator = torch.Generator().manual_seed(1 * 1_000_003 + epoch)
    order = torch.randperm(len(made), generator=generator).tolist()
    whole = size * world
    full = len(order) // whole * whole
    batches: list[list[int]] = []
    for start in range(0, full, 32 * whole):
        some = sorted(order[start : min(start + 32 * whole, full)], key=lambda i: made[i].tokens)
        batches += [some[first : first + whole] for first in range(0, len(some), whole)]
    order = [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]] + order[full:]
    mine = order[rank::world]
    mine = mine[: len(made) // whole * size] if world > 1 else mine
    return [mine[start : start + size] for start in range(0, len(mine), size)]


@pytest.mark.parametrize(("size", "rank", "world", "epoch"), [(3, 0, 1, 0), (2, 1, 2, 1), (4, 2, 3, 5), (50, 0, 1, 2)])
def test_arrays_of_lengths_give_the_batches_that_lists_gave(size, rank, world, epoch):
    lengths = torch.randint(1, 30, (413,), generator=torch.Generator().manual_seed(epoch)).tolist()
    made = [Example([1] * length, [[2], [3]], "") for length in lengths]
    loader = ExampleLoader(
        ExampleTable.of(made), size, seed=1, group_by_length=True, epoch=lambda: epoch, rank=rank, world_size=world
    )
    assert [batch.index.tolist() for batch in loader] == batches_of_lists(made, size, rank, world, epoch)


def test_one_batch_is_made_ahead_and_counted_when_it_is_served(monkeypatch):
    loader = ExampleLoader(examples(10), 2, seed=1)
    made: list[int] = []
    collate_one = loader._collate
    monkeypatch.setattr(loader, "_collate", lambda indices: made.append(1) or collate_one(indices))
    iterator = iter(loader)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]  # waits for the batch that is being made
    assert (len(made), loader.state_dict()["served"]) == (2, 1)


def test_an_error_of_collation_reaches_the_caller(monkeypatch):
    loader = ExampleLoader(examples(4), 2, seed=1)
    monkeypatch.setattr(loader, "_collate", lambda indices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
