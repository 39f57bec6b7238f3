"""An optimizer step of several micro-batches is that of one batch of all their examples, and is logged as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import farthest, run_in, train
from tiny import Steps, fit, give_weights, sgd, write_pairs
from torch.utils.data import DataLoader

from lit_align.data import OfflinePairs
from lit_align.data.batches import collate
from lit_align.objectives import DPO, KTO, MPO
from lit_align.objectives.accumulation import MicroBatch, StepMeans
from lit_align.policy import LoRAConfig, PolicyConfig


def write_texts(folder: Path, count: int) -> str:
    rows = [{"prompt": f"t{i}:", "response": " text" * (1 + i % 4)} for i in range(count)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "texts.jsonl")


@pytest.mark.parametrize(
    ("lora", "weighted"), [(None, False), (LoRAConfig(r=4), True)], ids=["full", "LoRA and weights"]
)
@pytest.mark.parametrize("accumulate", [3, 4, 16])
@pytest.mark.parametrize("make", [DPO, KTO, MPO])
def test_accumulated_batches_are_one_batch_of_their_examples(tiny_model, in_tmp, make, accumulate, lora, weighted):
    """Eleven pairs, two at a time: the last step has fewer micro-batches, and its last one fewer examples."""
    pairs, texts = write_pairs(in_tmp, 11), write_texts(in_tmp, 11)
    if weighted:
        give_weights(pairs)
        give_weights(texts)
    runs = []
    for size, times in ((2, accumulate), (2 * accumulate, 1)):
        policy = PolicyConfig(tiny_model, dtype="float64")
        module = make(policy, lora=lora, optimizer=sgd(0.3), beta=0.5, schedule="constant")
        data = OfflinePairs(pairs, batch_size=size, seed=1, sft=texts if make is MPO else None)
        steps = Steps()
        runs.append((train(module, data, steps, accumulate_grad_batches=times, max_epochs=3), steps.logged))
    (cut, cut_log), (whole, whole_log) = runs
    assert farthest(cut, whole) < 1e-10
    assert len(cut_log) == len(whole_log) == 3 * -(-11 // (2 * accumulate))
    for ours, theirs in zip(cut_log, whole_log, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_a_foreign_loaders_last_micro_batches_have_equal_weight(tiny_model, in_tmp):
    """Three batches of two, accumulated by two: the third is a step of its own, as large as without accumulation."""
    source = OfflinePairs(write_pairs(in_tmp, 6), batch_size=2, seed=1)
    fit(DPO(PolicyConfig(tiny_model)), source, max_steps=1)
    loader: Any = source.train_dataloader()
    examples = loader.examples
    weights = []
    for batches, times in (([range(4), range(4, 6)], 1), ([range(2), range(2, 4), range(4, 6)], 2)):
        made: Any = [collate([examples[i] for i in some], [*some]) for some in batches]
        loader = DataLoader(made, batch_size=None)
        module = DPO(PolicyConfig(tiny_model, dtype="float64"), optimizer=sgd(0.3), schedule="constant")
        weights.append(train(module, loader, accumulate_grad_batches=times))
    assert farthest(*weights) < 1e-10


class Sized:
    def weight_of(self, batch: int) -> float:
        return [4, 4, 4, 4, 1][batch]

    mean_weight_of = weight_of


@pytest.mark.parametrize(
    ("number", "weight"), [(0, 1.0), (2, 1.0), (3, 3 * 4 / 5), (4, 3 * 1 / 5)]
)  # three accumulated: 4 + 4 + 4, then 4 + 1
def test_a_micro_batch_weighs_by_its_share_of_the_steps_examples(number, weight):
    first = number // 3 * 3
    place = MicroBatch(number, first, min(first + 3, 5), 3, Sized())
    assert place.weight() == pytest.approx(weight, rel=1e-15)
    assert MicroBatch(number, first, min(first + 3, 5), 3, [None] * 5).weight() == 3 / min(3, 5 - first)


def test_means_weigh_by_examples():
    class Alone:
        class strategy:
            @staticmethod
            def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
                return tensor

    means: Any = StepMeans()
    for mean, examples in ((1.0, 4), (6.0, 1)):
        means.add("nll", torch.tensor(mean), examples)
    assert means.compute(Alone) == {"nll": torch.tensor(2.0, dtype=torch.float64)}
    means.reset()
    assert means.compute(Alone) == {}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_two_processes_accumulate_as_one_does(tiny_model, in_tmp, weighted):
    """Five batches of four in all, accumulated by three: a step of three and one of two."""
    pairs = write_pairs(in_tmp, 20)
    if weighted:
        give_weights(pairs)

    def run(size: int, **options: Any) -> tuple[Any, list[dict[str, float]]]:
        steps = Steps()
        module = DPO(PolicyConfig(tiny_model, dtype="float64"), optimizer=sgd(0.3), schedule="constant")
        data = OfflinePairs(pairs, batch_size=size, seed=1)
        return train(module, data, steps, accumulate_grad_batches=3, max_epochs=2, **options), steps.logged

    (alone, log), (each, other) = run(4), run_in(2, lambda: run(2, strategy="ddp"))
    for weights, logged in (each, other):
        assert farthest(alone, weights) < 1e-10
        for ours, theirs in zip(logged, log, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
