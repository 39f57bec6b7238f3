"""The base class of objectives on a real model: the step, the log, the header, and what is refused."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from tiny import Watch, adamw, byte_tokenizer, fit, llama_config, write_pairs
from tiny_tokenizers import llama_legacy
from torch.utils.data import DataLoader
from transformers import BartConfig, BertConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import OfflinePairs
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives import DPO
from lit_align.objectives.memory import memory_line
from lit_align.policy import LoRAConfig, PolicyConfig
from lit_align.reference import ReferenceConfig

LORA = LoRAConfig(r=4)


class Counting(DPO):
    """Counts the calls of `after_loss`."""

    calls = 0

    def after_loss(self, logps: Any, anchor_logps: Any, batch: Any) -> None:
        assert logps.requires_grad
        assert not anchor_logps.requires_grad
        assert logps.shape == anchor_logps.shape == batch.response_ids.shape[:2]
        self.calls += 1


def test_after_loss_is_called_once_per_training_step(tiny_model, in_tmp):
    path = write_pairs(in_tmp)
    module = Counting(PolicyConfig(tiny_model), sft_weight=0.1)
    data = OfflinePairs(path, batch_size=4, validation=path, sft=path)
    fit(module, data, max_epochs=2, accumulate_grad_batches=2)
    assert module.calls == 4  # batches: neither the step-0 check, nor gradient_scale, nor validation counts


def test_logged_metrics_match_their_definitions(tiny_model, pairs):
    module, watch = DPO(PolicyConfig(tiny_model), beta=0.2), Watch()
    fit(module, pairs, watch, ReferenceRefresh(1.0, 1000))
    batch, step = watch.batches[0], watch.steps[0]
    assert step["train/length_chosen"] == batch.lengths[:, 0].double().mean()
    assert step["train/length_rejected"] == batch.lengths[:, 1].double().mean()
    assert step["train/logp_chosen"] < 0
    assert step["train/log_ratio_chosen"] == 0
    later = watch.steps[1]
    margin = 0.2 * (later["train/log_ratio_chosen"] - later["train/log_ratio_rejected"])
    assert later["train/reward_margin"] == pytest.approx(margin, abs=1e-7)


def test_validation_logs_the_same_metrics_over_the_whole_set(tiny_model, in_tmp):
    path = write_pairs(in_tmp, 7)
    data = OfflinePairs(path, validation=path, batch_size=3)
    trainer = fit(DPO(PolicyConfig(tiny_model)), data, limit_train_batches=1)
    values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    assert {"val/loss", "val/reward_accuracy", "val/reward_margin", "val/logp_chosen"} <= values.keys()
    loader = data.val_dataloader()
    assert [len(batch.index) for batch in loader] == [3, 3, 1]
    with torch.no_grad():
        logps = torch.cat([trainer.lightning_module.policy(batch) for batch in loader])
    assert values["val/logp_chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-5)


def test_a_module_that_was_validated_trains(tiny_model, in_tmp):
    """Lightning validates in inference mode, whose tensors cannot be changed in place afterwards."""
    path = write_pairs(in_tmp)
    module, data = DPO(PolicyConfig(tiny_model)), OfflinePairs(path, validation=path, batch_size=4)
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    before = L.Trainer(accelerator="cpu", **options).validate(module, data, verbose=False)
    trainer = fit(module, data, limit_train_batches=1)
    assert before[0]["val/loss"] != float(trainer.callback_metrics["val/loss"])


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tiny_model, pairs):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch.labels = torch.tensor([1.0, float("nan"), 1.0, 1.0])
            self.row = batch.index[1].item()

    spoil = Spoil()
    with pytest.raises(UserError, match=r"the loss of step 0 is nan, from examples \[\d+\]") as caught:
        fit(DPO(PolicyConfig(tiny_model)), pairs, spoil)
    assert f"[{spoil.row}]" in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"beta": 0.0}, "model: beta=0.0 and proximal=0.0 must not both be 0"),
        ({"beta": -0.1}, "model.beta=-0.1 must be at least 0. Raise it"),
        ({"beta": math.inf}, "model.beta=inf must be at least 0 and finite. Lower it"),
        ({"proximal": -1}, "model.proximal=-1 must be at least 0. Raise it"),
        ({"proximal": math.nan}, "model.proximal=nan must be at least 0 and finite. Change it"),
    ],
)
def test_weights_of_the_anchor_are_checked_at_once(tiny_model, weights: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        DPO(PolicyConfig(tiny_model), **weights)


def test_a_model_folder_that_does_not_exist_is_named(pairs):
    with pytest.raises(UserError, match=r"model.policy.path: there is no folder './no/such/model'"):
        fit(DPO(PolicyConfig("./no/such/model")), pairs)


def test_a_name_neither_here_nor_on_the_hub_is_an_error(pairs):
    with pytest.raises(UserError, match=r"no tokenizer for 'nope': this folder does not exist, and as a hub name"):
        fit(DPO(PolicyConfig("nope")), pairs)


def test_a_reference_that_does_not_exist_is_named(tiny_model, pairs):
    with pytest.raises(UserError, match=r"model.reference.path: there is no folder './no/such/model'"):
        fit(DPO(PolicyConfig(tiny_model), reference=ReferenceConfig(path="./no/such/model")), pairs)


@pytest.mark.parametrize("form", ["copy", "recorded"])
def test_a_reference_of_other_tokens_is_refused_at_the_start(tiny_model, pairs, tmp_path, form):
    def refused(path: Path, problem: str) -> None:
        with pytest.raises(UserError, match=f"model.reference.path: .* {problem}. Give a model with the policy's"):
            fit(DPO(PolicyConfig(tiny_model), reference=ReferenceConfig(form, path=str(path))), pairs)

    small, other = tmp_path / "small", tmp_path / "other"
    LlamaForCausalLM(llama_config(vocab_size=200)).save_pretrained(small)
    refused(small, "has 200 embeddings for the policy's 259 tokens")
    LlamaForCausalLM(llama_config(vocab_size=1000)).save_pretrained(other)
    llama_legacy().save_pretrained(other)
    refused(other, "has other tokens than the policy")


def test_a_reference_may_lack_the_few_tokens_that_the_policy_added(tiny_model, pairs, tmp_path):
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    fit(DPO(PolicyConfig(tiny_model), reference=ReferenceConfig(path=str(tmp_path))), pairs)


def test_a_reward_model_is_not_a_policy(pairs, tmp_path):
    folder = str(tmp_path / "rewards")
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"is a classifier or reward model, which gives no responses"):
        fit(DPO(PolicyConfig(folder)), pairs)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BartConfig(architectures=["BartForConditionalGeneration"]), "encoder-decoder"),
        (BertConfig(architectures=["BertForMaskedLM"]), "encoder"),
    ],
    ids=["BART", "BERT"],
)
def test_a_model_with_an_encoder_is_not_a_policy(pairs, tmp_path, config, kind):
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is an {kind} model. Name a causal language model"):
        fit(DPO(PolicyConfig(str(tmp_path))), pairs)


def test_a_moving_reference_that_the_batches_replace_is_refused(tiny_model, pairs):
    def with_reference(batch: PreferenceBatch) -> PreferenceBatch:
        return dataclasses.replace(batch, reference_logps=torch.zeros(batch.response_ids.shape[:2]))

    fit(DPO(PolicyConfig(tiny_model)), pairs, max_steps=1)
    loader: Any = DataLoader([with_reference(next(iter(pairs.train_dataloader())))], batch_size=None)
    with pytest.raises(UserError, match="reference_refresh has no effect, because the batches hold log π_ref"):
        fit(DPO(PolicyConfig(tiny_model)), loader, ReferenceRefresh(0.5, 1))


def test_an_optimizer_that_cannot_be_is_named(tiny_model, pairs):
    with pytest.raises(UserError, match=r"model.optimizer: Invalid learning rate: -1"):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw(-1.0)), pairs)


def test_an_objective_that_passes_on_another_policy_is_refused(tiny_model):
    class Bare(DPO):
        def __init__(self, model, **kwargs):
            super().__init__(model, **kwargs)

    assert Bare({"path": tiny_model}).policy_config == PolicyConfig(tiny_model)
    with pytest.raises(UserError, match=r"Bare must pass a PolicyConfig to its base class, which got str. Write `def"):
        Bare(tiny_model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda batch: vars(batch),
            r"must be a lit_align.data.PreferenceBatch, and is of type dict. Make a PreferenceBatch",
        ),
        (
            lambda batch: {"preferences": vars(batch)},
            r"batch of 'preferences' must be a lit_align.data.PreferenceBatch.* dict",
        ),
        (
            lambda batch: dataclasses.replace(batch, response_ids=batch.response_ids[:, 0]),
            r"`response_ids` has shape \[4, \d+\], but needs \[B>=1, K>=1, R\]",
        ),
        (
            lambda batch: dataclasses.replace(batch, prompt_mask=batch.prompt_mask[:, 1:]),
            r"`prompt_mask` has shape .* needs \[4, \d+\]\. Change it in the data module",
        ),
        (
            lambda batch: dataclasses.replace(batch, response_mask=batch.response_mask.long()),
            "`response_mask` is of type torch.int64, but needs torch.bool",
        ),
        (
            lambda batch: dataclasses.replace(batch, rewards=torch.zeros(4)),
            r"`rewards` has shape .4., but needs .4, 2",
        ),
    ],
    ids=["dict", "named dict", "2-D responses", "prompt mask", "type of mask", "rewards"],
)
def test_a_batch_of_other_type_or_shape_is_named(tiny_model, pairs, spoil, message):
    fit(DPO(PolicyConfig(tiny_model)), pairs, max_steps=1)
    loader: Any = DataLoader([spoil(next(iter(pairs.train_dataloader())))], batch_size=None)
    with pytest.raises(UserError, match=message):
        fit(DPO(PolicyConfig(tiny_model)), loader)


def test_the_header_counts_the_weights_of_policy_and_reference_apart(tiny_model, pairs):
    def lines(*callbacks: Callback) -> dict[str, str]:
        module = DPO(PolicyConfig(tiny_model), lora=LORA)
        fit(module, pairs, *callbacks, max_steps=1)
        return dict(module.describe()) | {"memory": memory_line(module)}

    still, moving = lines(), lines(ReferenceRefresh(0.9, 1))
    assert still["policy"] == moving["policy"]
    assert "weights of its own" not in still["reference"]
    assert re.search(r" MB \(0\.\d M weights of its own\)", moving["reference"])
    assert still["memory"].partition(" = ")[2].partition(";")[0] in moving["memory"]
    assert "reference" in moving["memory"]
    assert "reference" not in still["memory"]
