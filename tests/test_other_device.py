"""Training on an accelerator that is not NVIDIA's, by a stand-in without float64 (`other_device`)."""

import math
from pathlib import Path
from typing import Any

import pytest
from processes import Weights, farthest, run_in, train
from tiny import Steps, give_weights, on_policy, sgd, write_pairs

from lit_align.callbacks import Drift, ReferenceRefresh, RunReport, WinRate
from lit_align.data import FunctionScorer, OfflinePairs
from lit_align.evaluation.summary import Summary
from lit_align.objectives import DPO, KTO
from lit_align.policy import LoRAConfig, PolicyConfig


def offline(model: str, folder: Path, **options: Any) -> tuple[Weights, list[dict[str, float]]]:
    pairs = write_pairs(folder, 6)
    give_weights(pairs)
    steps = Steps()
    lora = LoRAConfig(r=4) if options.pop("lora") else None
    objective = options.pop("objective")
    module = objective(PolicyConfig(model, dtype="float32"), lora=lora, optimizer=sgd(0.1))
    data = OfflinePairs(pairs, validation=pairs, batch_size=2, seed=1)
    return train(module, data, steps, ReferenceRefresh(alpha=0.5, tau=1), max_epochs=2, **options), steps.logged


def elsewhere(function: Any, *args: Any, **options: Any) -> Any:
    import other_device

    weights, logged = function(*args, strategy=other_device.strategy(), accelerator="auto", **options)
    return {name: weight.cpu() for name, weight in weights.items()}, logged


def rounds(model: str, folder: Path, **options: Any) -> tuple[Weights, list[dict[str, float]]]:
    data, steps = on_policy(folder), Steps()
    scorer = FunctionScorer(f"{folder / 'rewards.py'}:reward")
    verdict = WinRate(prompts=data.prompts, scorer=scorer, responses_per_prompt=2)
    callbacks = [steps, RunReport(), Drift(), verdict]
    module = DPO(PolicyConfig(model), proximal=0.1, optimizer=sgd(0.1))
    folder = folder / ("there" if "strategy" in options else "here")
    return train(module, data, *callbacks, max_epochs=2, default_root_dir=folder, **options), steps.logged


@pytest.mark.parametrize(("objective", "lora"), [(DPO, False), (KTO, True)])
def test_offline_training_there_is_that_of_a_cpu(tiny_model, in_tmp, objective, lora):
    options = {"objective": objective, "lora": lora}
    ((there, there_log),) = run_in(1, lambda: elsewhere(offline, tiny_model, in_tmp, **options))
    here, here_log = offline(tiny_model, in_tmp, **options)
    assert there.keys() == here.keys()
    assert farthest(there, here) < 1e-6
    assert there_log == [pytest.approx(step, rel=1e-4, abs=1e-6) for step in here_log]


def test_rounds_drift_and_the_verdict_there(tiny_model, in_tmp):
    ((there, there_log),) = run_in(1, lambda: elsewhere(rounds, tiny_model, in_tmp))
    assert all(weight.isfinite().all() for weight in there.values())
    assert all(math.isfinite(value) for step in there_log for value in step.values())
    assert Summary.read(in_tmp / "there") is not None
