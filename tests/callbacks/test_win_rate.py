"""The verdict on held-out prompts, and the report of a run, on a real fit."""

import json

import lightning as L
import pytest
import torch
from tiny import adamw, fit, on_policy, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.callbacks import RunReport, WinRate
from lit_align.data import FunctionScorer, OfflinePairs
from lit_align.errors import UserError
from lit_align.loggers import read_metrics
from lit_align.objectives import DPO
from lit_align.policy import LoRAConfig, PolicyConfig


def scorer() -> FunctionScorer:
    return FunctionScorer("rewards.py:reward")


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4)], ids=["full", "LoRA"])
def test_a_policy_that_has_not_moved_ties_with_itself(tiny_model, in_tmp, lora):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), judges={"other": scorer()})
    fit(
        DPO(PolicyConfig(tiny_model, dtype="float32"), lora=lora, optimizer=adamw(0.0)),
        data,
        verdict,
        default_root_dir="run",
    )
    summary = json.loads((in_tmp / "run" / "summary.json").read_text())
    assert summary["win_rate"] == summary["win_rate_low"] == summary["win_rate_high"] == 0.5
    assert summary["reward_start"] == summary["reward_end"]
    assert summary["kl_from_start"] == 0
    assert summary["other"] == {name: summary[name] for name in summary["other"]}


def test_a_run_leaves_its_verdict_its_curves_and_a_model_that_reloads(tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer(), validation="prompts.jsonl", responses_per_prompt=2)
    module = DPO(PolicyConfig(tiny_model), lora=LoRAConfig(r=4), optimizer=adamw(3e-2))
    fit(module, data, verdict, RunReport(), max_epochs=2, default_root_dir="run", log_every_n_steps=1)

    summary = json.loads((in_tmp / "run" / "summary.json").read_text())
    assert {
        "reward_start",
        "reward_end",
        "win_rate",
        "win_rate_low",
        "win_rate_high",
        "kl_from_start",
    } <= summary.keys()
    assert summary["kl_from_start"] > 0.1
    assert summary["win_rate_low"] <= summary["win_rate"] <= summary["win_rate_high"]

    rows = read_metrics(in_tmp / "run" / "metrics.csv")
    rounds = [row["round"] for row in rows if "round/pairs" in row]
    assert rounds == [0, 1]
    assert len([row for row in rows if "val/win_rate" in row]) == 2
    assert (in_tmp / "run" / "curves.png").stat().st_size > 10_000

    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert AutoTokenizer.from_pretrained("run/model").chat_template
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.float(), module.policy.merged_copy()(ids).logits.float())

    said = capsys.readouterr().out
    for piece in (
        "objective",
        "DPO: −log σ",
        "reference",
        "step-0 check",
        "round 2 of 2",
        "before",
        "after",
        "run/model",
    ):
        assert piece in said


def test_missing_held_out_prompts_are_found_before_training(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    with pytest.raises(UserError, match=r"no_such.jsonl"):
        fit(DPO(PolicyConfig(tiny_model)), data, WinRate("no_such.jsonl", scorer()))


def test_testing_a_checkpoint_gives_the_verdict_of_the_run_that_made_it(tiny_model, in_tmp):
    data = on_policy(in_tmp)
    verdict = WinRate("prompts.jsonl", scorer())
    trainer = fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(3e-2)), data, verdict, default_root_dir="run")
    trainer.save_checkpoint("run.ckpt")
    first = (in_tmp / "run" / "summary.json").read_text()
    again = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir="test", enable_model_summary=False,
        callbacks=[WinRate("prompts.jsonl", scorer())],
    )  # fmt: skip
    again.test(DPO(PolicyConfig(tiny_model)), on_policy(in_tmp), ckpt_path="run.ckpt")
    assert json.loads((in_tmp / "test" / "summary.json").read_text()) == json.loads(first)


def test_test_pairs_are_reported(tiny_model, in_tmp):
    path = write_pairs(in_tmp, 7)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (values,) = trainer.test(DPO(PolicyConfig(tiny_model)), OfflinePairs(path, test=path, batch_size=3), verbose=False)
    assert values["test/loss"] == pytest.approx(0.6931472)
    assert "test/reward_margin" in values
