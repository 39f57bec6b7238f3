"""Results of the processes' batches, in temporary files."""

from types import SimpleNamespace
from typing import Any

from lit_align.evaluation.shares import Share, compute_share, gather_in_order


def test_results_are_in_the_order_of_the_prompts():
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0)
    batches = [[3, 1], [0, 4], [2]]
    share = compute_share(trainer, batches, "squares", lambda places: [place * place for place in places])
    assert dict(share) == {0: [9, 1], 1: [0, 16], 2: [4]}
    gathered = gather_in_order(trainer, batches, share)
    assert list(gathered) == [0, 1, 4, 9, 16]
    assert (gathered[3], gathered[1:3], len(gathered)) == (9, [1, 4], 5)


def test_a_process_computes_every_other_batch():
    trainer: Any = SimpleNamespace(world_size=2, global_rank=1)
    share: Share[int] = compute_share(trainer, [[0], [1], [2], [3]], "places", list)
    assert dict(share) == {1: [1], 3: [3]}
