"""Blocks that torch.compile compiles. What they gain on a GPU is measured by benchmarks/gpu.py."""

from collections.abc import Callable

import pytest
import torch
from architectures import build
from test_logprobs import random_examples
from torch import nn

from lit_align.compilation import compile_blocks, is_compiled
from lit_align.data.batches import collate
from lit_align.errors import UserError
from lit_align.policy import Policy
from lit_align.reference.copied import CopiedReference


@pytest.fixture
def policy() -> Callable[..., Policy]:
    return lambda dtype=torch.bfloat16: Policy(build("llama", dtype), None)  # type: ignore[arg-type]


def test_a_reference_beside_a_compiled_policy_is_compiled_too(policy):
    compiled = policy()
    assert not is_compiled(compiled.model)
    compile_blocks(compiled.model)
    assert is_compiled(compiled.model)
    assert is_compiled(CopiedReference(compiled).model)
    assert not is_compiled(CopiedReference(policy()).model)
    assert not is_compiled(CopiedReference(compiled, offload=True).model)
    assert not is_compiled(compiled.merged_copy()), "a copy to sample from, whose rows change with each token"


def test_a_model_without_known_blocks_is_refused(policy):
    model = policy().model
    model._no_split_modules = []
    with pytest.raises(UserError, match=r"model\.policy\.compile=true has no effect because"):
        compile_blocks(model)


@pytest.mark.slow
def test_a_compiled_model_has_one_form_and_the_plain_ones_numbers(policy):
    plain, compiled = policy(), policy()
    compile_blocks(compiled.model)
    forms = []
    for seed in range(3):
        batch = collate(random_examples(seed, count=4 + seed), range(4 + seed))
        expected, found = plain(batch), compiled(batch)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.2)
        with torch.no_grad():
            assert torch.equal(compiled(batch), found)
        for each in expected, found:
            each.sum().backward()
        forms.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    grads, others = (nn.utils.parameters_to_vector([p.grad for p in each.parameters()]) for each in (plain, compiled))
    assert (grads - others).norm() < 0.05 * grads.norm()
    assert forms[1] == forms[2] > 0
