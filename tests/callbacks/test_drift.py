"""When the drift is measured, over what, and what a checkpoint has of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_in
from tiny import adamw, byte_tokenizer, fit, llama_config, on_policy, write_pairs
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lit_align.callbacks import Drift
from lit_align.data import AllPairs, OfflinePairs
from lit_align.data.sampling import Sampling
from lit_align.errors import UserError
from lit_align.objectives import DPO, SimPO
from lit_align.policy import PolicyConfig
from lit_align.reference.config import ReferenceConfig
from lit_align.reporting.metrics_csv import MetricsCSV, read_metrics


def adaptive(tiny_model: str) -> DPO:
    return DPO(PolicyConfig(tiny_model), proximal=0.1, proximal_target=0.05, optimizer=adamw(3e-3))


def test_the_checkpoint_of_a_rounds_last_step_has_the_lambda_of_the_next(tiny_model, in_tmp):
    """Three rounds of three steps."""

    def run(*callbacks: Callback, ckpt_path: str | None = None) -> DPO:
        module = adaptive(tiny_model)
        options = {"enable_checkpointing": bool(callbacks), "max_epochs": 3, "ckpt_path": ckpt_path}
        fit(module, on_policy(in_tmp), *callbacks, Drift(), **options)
        return module

    whole = run(ModelCheckpoint("checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    assert whole.proximal not in (0.1, 0.1 * 1.5, 0.1 * 1.5**2), "three rounds move λ three times"
    for step in (2, 3, 6):
        resumed = run(ckpt_path=f"checkpoints/step={step}.ckpt")
        assert resumed.proximal == whole.proximal
        for name, weight in whole.named_parameters():
            assert torch.equal(resumed.get_parameter(name), weight), (step, name)


def test_a_round_that_ends_before_its_last_batch_moves_lambda_too(tiny_model, in_tmp):
    module = adaptive(tiny_model)
    fit(module, on_policy(in_tmp), Drift(), max_steps=2)
    assert module.proximal != 0.1


def write_gpt2(positions: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = GPT2Config(**sizes, n_positions=positions, bos_token_id=None, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained("gpt2")
    byte_tokenizer().save_pretrained("gpt2")


def test_a_policy_with_dropout_that_has_not_moved_has_not_drifted(in_tmp):
    """GPT-2 has dropout by default; both the start and the policy are evaluated without it."""
    write_gpt2(positions=256)
    module = DPO(PolicyConfig("gpt2", dropout=True), optimizer=adamw(0.0))
    fit(module, on_policy(in_tmp), Drift(), logger=MetricsCSV("."))
    (row,) = [row for row in read_metrics("metrics.csv") if "drift/kl_policy_start" in row]
    assert row["drift/kl_policy_start"] == pytest.approx(0, abs=1e-4)
    assert row["drift/kl_policy_reference"] == pytest.approx(0, abs=1e-4)


def test_offline_pairs_are_measured_once_per_prompt(tiny_model, in_tmp, capsys):
    """Samples that are not of π are named as such."""
    sampled = []

    class Asked(Drift):
        def _sample_fresh(self, module, data, examples):
            sampled.append([example.source for example in examples])
            return super()._sample_fresh(module, data, examples)

    row = {"responses": ["a", "bb", "ccc", "dddd"], "rewards": [1.0, 2.0, 3.0, 4.0]}
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", **row}) + "\n" for i in range(8)))
    fit(DPO(PolicyConfig(tiny_model)), OfflinePairs("rows.jsonl", pairing=AllPairs()), Asked(prompts=6))
    assert " nats\n" in capsys.readouterr().out
    filtered = Asked(prompts=6, sampling=Sampling(temperature=0.7, top_p=0.9))
    fit(DPO(PolicyConfig(tiny_model)), OfflinePairs("rows.jsonl", pairing=AllPairs()), filtered)
    assert " nats, at temperature 0.7, top_p 0.9\n" in capsys.readouterr().out
    assert sampled == 2 * [[f"rows.jsonl:{line}" for line in range(1, 7)]]


def test_a_drift_of_long_prompts_stays_within_the_models_positions(in_tmp):
    prompts = [{"prompt": "p" * 24, "chosen": " yes", "rejected": f" {i}"} for i in range(4)]
    (in_tmp / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    write_gpt2(positions=32)
    module = DPO(PolicyConfig("gpt2"), optimizer=adamw(1e-2))
    fit(module, OfflinePairs("long.jsonl", batch_size=2), Drift(prompts=2), max_steps=1)


def test_drift_is_not_measured_before_the_first_step(tiny_model, in_tmp):
    data = OfflinePairs(write_pairs(in_tmp, 16), batch_size=2)
    options = {"accumulate_grad_batches": 2, "logger": MetricsCSV("."), "max_epochs": 1}
    fit(DPO(PolicyConfig(tiny_model)), data, Drift(every_n_steps=2), **options)
    rows = [row["step"] for row in read_metrics("metrics.csv") if "drift/kl_policy_start" in row]
    assert rows
    assert min(rows) > 0


def test_on_other_data_the_screen_says_that_drift_is_not_measured(tiny_model, in_tmp, capsys):
    pairs = OfflinePairs(write_pairs(in_tmp), batch_size=4)
    fit(DPO(PolicyConfig(tiny_model)), pairs, max_steps=1)
    loader: Any = DataLoader([next(iter(pairs.train_dataloader()))], batch_size=None)
    fit(DPO(PolicyConfig(tiny_model)), loader, Drift())
    assert " not measured: the data are neither OnPolicyPairs nor OfflinePairs\n" in capsys.readouterr().out


def test_without_an_anchor_no_drift_and_no_sampler_is_recorded(tiny_model, in_tmp):
    fit(SimPO(PolicyConfig(tiny_model)), on_policy(in_tmp, record_sampler=False), Drift())


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (16, {}, r"at most log 32 = 3.5 nats: 32 responses .* or raise the 8 prompts of a round or data.resp"),
        (4, {}, r"at most log 16 = 2.8 nats: .* Lower it, or raise drift.prompts=4 or data.responses_per_"),
        (16, {"prompts_per_round": "chunk"}, r"at most log 48 = .* or raise the 12 prompts of a round"),
    ],
)
def test_a_target_that_no_round_can_show_is_refused(tiny_model, in_tmp, prompts, options, said):
    module = DPO(PolicyConfig(tiny_model), proximal=0.1, proximal_target=4.0)
    with pytest.raises(UserError, match=rf"proximal_target=4 must be {said}"):
        fit(module, on_policy(in_tmp, **options), Drift(prompts), max_epochs=2)


def test_the_screen_and_the_metric_are_of_all_processes_prompts(tiny_model, in_tmp, capfd):
    """Three prompts in two processes: shares of two and one, whose means do not weigh the same."""
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained("other")
    byte_tokenizer().save_pretrained("other")

    def measure(devices: int, strategy: str) -> None:
        module = DPO(PolicyConfig(tiny_model), reference=ReferenceConfig(path="other"), optimizer=adamw(0.0))
        folder = in_tmp / str(devices)
        folder.mkdir(exist_ok=True)
        options = {"logger": MetricsCSV(folder), "devices": devices, "strategy": strategy}
        fit(module, on_policy(folder), Drift(prompts=3), **options)

    measure(1, "auto")
    run_in(2, lambda: measure(2, "ddp"), timeout=60)
    name = "drift/kl_policy_reference"
    one, two = ([row[name] for row in read_metrics(f"{n}/metrics.csv") if name in row] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    assert re.findall(r"KL from reference (\S+), start", capfd.readouterr().out) == 2 * [f"{one[0]:.2f}"]
