"""The rows that a last block leaves out. That log-probabilities and gradients stay the same: test_logprobs.py."""

import pytest
import torch
from architectures import MODELS, build
from test_logprobs import CANNOT_SHARE, random_examples
from torch import nn

from lit_align.blocks import blocks_of
from lit_align.data.batches import collate
from lit_align.logprobs import enable_prefix_sharing, response_logps
from lit_align.policy import Policy
from lit_align.reference.copied import CopiedReference


def rows_of(layer: nn.Module) -> list[int]:
    """Filled with the number of rows that the layer computes in each pass."""
    rows: list[int] = []
    layer.register_forward_hook(lambda layer, args, output: rows.append(args[0].shape[1]))
    return rows


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*CANNOT_SHARE, "opt")])
def test_the_last_block_leaves_out_what_nothing_reads(name: str) -> None:
    model, examples = build(name), random_examples(branches=3)
    assert enable_prefix_sharing(model)
    first, last = (rows_of(block.mlp) for block in blocks_of(model))  # type: ignore[arg-type]
    response_logps(model, collate(examples, range(3))).sum().backward()
    responses = sum(len(ids) for example in examples for ids in example.response_ids)
    assert last == [3 + responses]
    assert first == [sum(len(example.prompt_ids) for example in examples) + responses]
    model(input_ids=torch.arange(1, 8)[None])
    assert last[1] == first[1] == 7, "a row that is not packed"


def test_a_block_without_a_known_feed_forward_layer_computes_all_rows() -> None:
    model, examples = build("opt"), random_examples()
    assert enable_prefix_sharing(model)
    first, last = (rows_of(block.final_layer_norm) for block in blocks_of(model))  # type: ignore[arg-type]
    response_logps(model, collate(examples, range(3)))
    assert first == last


def test_a_reference_beside_the_policy_leaves_out_the_same_rows() -> None:
    policy = Policy(build("llama", torch.bfloat16), None)  # type: ignore[arg-type]
    reference, batch = CopiedReference(policy), collate(random_examples(), range(3))
    ours, theirs = (rows_of(blocks_of(model)[-1].mlp) for model in (policy.model, reference.model))  # type: ignore[arg-type]
    assert torch.equal(policy(batch), reference.logps(batch))
    assert ours == theirs == [3 + int(batch.response_mask.sum())]
