"""Examples of equal K become a padded batch."""

import torch

from lit_align.data.batches import Example, collate


def test_a_batch_holds_each_prompt_once_with_padding_on_the_right():
    batch = collate(
        [
            Example([5, 6, 7], [[8], [9, 10]], "", rewards=[1.0, 0.0]),
            Example([4], [[3, 2, 1], [6]], "", rewards=[2.0, 1.0]),
        ],
        [40, 41],
    )
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [4, 0, 0]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.response_ids.tolist() == [[[8, 0, 0], [9, 10, 0]], [[3, 2, 1], [6, 0, 0]]]
    assert batch.lengths.tolist() == [[1, 2], [3, 1]]
    assert (batch.index.tolist(), batch.rewards.tolist()) == ([40, 41], [[1.0, 0.0], [2.0, 1.0]])
    assert batch.sampler_logps is None


def test_recorded_numbers_travel_with_their_example():
    one = Example([1], [[1], [2]], "", sampler_logps=[-1.0, -2.0], reference_logps=[-3.0, -4.0])
    batch = collate([one], [0])
    assert torch.equal(batch.sampler_logps, torch.tensor([[-1.0, -2.0]]))
    assert torch.equal(batch.reference_logps, torch.tensor([[-3.0, -4.0]]))
