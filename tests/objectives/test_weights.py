"""A weight of 2 is the example twice, a weight of 0 is none, and equal weights are no weights."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from processes import farthest, train
from tiny import Steps, give_weights, same, sgd, write_pairs
from torch.utils.data import DataLoader

from lit_align import objectives
from lit_align.data import OfflinePairs
from lit_align.data.batches import Example, collate
from lit_align.data.examples import digest_of_examples
from lit_align.data.table import ExampleTable
from lit_align.errors import UserError
from lit_align.objectives import CPO, DPO, EXO, IPO, KTO, MPO, ORPO, SFT, SPPO, RewardModel, SimPO
from lit_align.objectives.accumulation import weighted_mean
from lit_align.policy import PolicyConfig

PAIRS = [
    Example([60 + i, 61], [[70, 71 + i], [72 + i]], f"row {i}", rewards=[1.0 + i, 0.5], win_probabilities=[0.9, 0.2])
    for i in range(3)
]
MISMATCHED = [
    replace(each, response_ids=[*each.response_ids, [80, 81 + i]], labels=[1.0, 0.0], mismatched=True)
    for i, each in enumerate(PAIRS)
]
TEXTS = [replace(each, response_ids=each.response_ids[:1], rewards=None, win_probabilities=None) for each in PAIRS]


def trained(make: Any, model: str, examples: list[Example]) -> tuple[Any, list[dict[str, float]]]:
    """Three steps on a batch of the examples."""
    steps = Steps()
    module = make(PolicyConfig(model, dtype="float64"), optimizer=sgd(0.03), schedule="constant")
    batches: Any = [collate(examples, range(len(examples)))]
    return train(module, DataLoader(batches, batch_size=None), steps, max_epochs=3), steps.logged


CASES: dict[str, tuple[Any, list[Example]]] = {
    "CPO": (CPO, PAIRS),
    "DPO": (DPO, PAIRS),
    "EXO": (EXO, PAIRS),
    "IPO": (partial(IPO, beta=1.0), PAIRS),
    "KTO": (KTO, MISMATCHED),
    "MPO": (partial(MPO, beta=0.0), PAIRS),
    "ORPO": (ORPO, PAIRS),
    "RewardModel": (RewardModel, PAIRS),
    "SFT": (SFT, TEXTS),
    "SPPO": (partial(SPPO, beta=1.0), PAIRS),
    "SimPO": (SimPO, PAIRS),
}


def test_every_objective_has_a_case():
    exported = {name: getattr(objectives, name) for name in objectives.__all__}
    abstract = {"PreferenceObjective", "AnchoredObjective"}
    assert CASES.keys() == {name for name, each in exported.items() if hasattr(each, "training_step")} - abstract


@pytest.mark.parametrize(("make", "examples"), CASES.values(), ids=CASES)
def test_weight_2_is_the_example_twice_and_weight_0_is_none(tiny_model, make, examples):
    first, second, third = examples
    weighted = [replace(first, weight=2.0), second, replace(third, weight=0.0)]
    (ours, log), (theirs, other) = (trained(make, tiny_model, some) for some in (weighted, [first, first, second]))
    assert farthest(ours, theirs) < 1e-10
    for values, others in zip(log, other, strict=True):
        assert values == pytest.approx(others, rel=1e-6)


@pytest.mark.parametrize("make", [DPO, KTO])
def test_equal_weights_are_no_weights_to_the_bit(tiny_model, in_tmp, make):
    """Seven pairs by two, accumulated by two: batches and steps of different sizes."""
    path = write_pairs(in_tmp, 7)
    runs = []
    for weight in (None, 0.3):
        if weight is not None:
            give_weights(path, [weight] * 7)
        module, steps = make(PolicyConfig(tiny_model), optimizer=sgd(0.3)), Steps()
        weights = train(module, OfflinePairs(path, batch_size=2, seed=1), steps, accumulate_grad_batches=2)
        runs.append((weights, steps.logged))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_the_mean_of_equal_weights_is_the_plain_mean():
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for weight in (0.1, 3.0, 1e-30, 1e30):
        assert torch.equal(weighted_mean(values, torch.full((1001,), weight)), values.mean())
    assert weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])) == 2.0


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0.0, r"step 0: the weights of examples \[0, 1, 2\] of .* sum to 0"),
        (-1.0, "`weights` holds -1.0, but needs numbers of at least 0. Change it in the data module"),
        (float("nan"), "`weights` holds nan, but needs"),
    ],
)
def test_weights_that_sum_to_0_or_are_below_0_are_refused(tiny_model, weight, message):
    with pytest.raises(UserError, match=message):
        trained(DPO, tiny_model, [replace(each, weight=weight) for each in PAIRS])


def test_a_resume_with_other_weights_is_noticed():
    tables = [ExampleTable.of(replace(each, weight=weight) for each in PAIRS) for weight in (1.0, 0.5, 0.6)]
    assert len({digest_of_examples(table) for table in [*tables, ExampleTable.of(PAIRS)]}) == 3
