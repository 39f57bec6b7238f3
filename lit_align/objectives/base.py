"""The base class of all objectives: the policy, one step, and the metrics.

`PreferenceObjective` trains a policy on preference batches. `AnchoredObjective` adds the reference, its refresh, the
proximal weight and the step-0 check. An objective overrides `loss` and states its `formula`; an anchored one also gives
the closed form of its loss where the policy equals its anchor.

In training, every objective also logs, in addition to the metrics of `lit_align.metrics.preference`, means over the
examples of each optimizer step:

| metric | formula |
|---|---|
| learning_rate | learning rate of the first parameter group |
| gradient_scale | with an anchor: mean of |∂loss/∂log π(y)| over examples' first responses |
| nll_sft, nll_pretraining | mean of −log π/length over data.sft, data.pretraining; unweighted, not in loss |
| proximal | λ, where `proximal_target` moves it (`anchor.adapted_proximal`) |
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_align import provenance
from lit_align.dtypes import dtype_name, warn_if_slow
from lit_align.errors import UserError, check_number, check_types
from lit_align.loading import resolve_dtype
from lit_align.logprobs import PreferenceBatch
from lit_align.metrics import PreferenceMetrics
from lit_align.model_files import load_positions, load_tokenizer, read_template
from lit_align.model_options import from_fields
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import FIXES, check_batch, check_losses, checked_policy
from lit_align.objectives._gradients import gradient_scale
from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.accumulation import MicroBatch, StepMeans, total_weight, weighted_mean
from lit_align.objectives.resumable import ResumableModule
from lit_align.objectives.saved import SavedObjective
from lit_align.objectives.schedule import Completed, LearningRate, Schedule, reset_optimization
from lit_align.policy import LoRAConfig, Policy, PolicyConfig, PolicyWithoutAdapter
from lit_align.quantization import size_of
from lit_align.reference.base import Reference
from lit_align.reference.build import own_weights
from lit_align.sharding import Beside


class PreferenceObjective(ResumableModule):
    """A policy trained on preference batches.

    Args:
        policy: The language model to train.
        lora: Train a low-rank adapter instead of all weights.
        optimizer: Any torch optimizer; 1e-6 is the papers' learning rate for full fine-tuning; LoRA needs 10 to 100
            times more.
        schedule: Shape of the learning rate after warm-up, over the rest of the run; linear and cosine fall from the
            full value to 0.
        warmup_steps: Optimizer steps in which the learning rate rises to its value; 100 in the TR paper. Below 1, a
            share of the run.
        reset_optimizer_each_round: Start each round (epoch) with a new optimizer and a new schedule over the round, as
            PRPO's experiments do.
        sft_weight: Weight of the negative log-likelihood per token of the texts in data.sft, added to the loss.
        pretraining_weight: The same for the texts in data.pretraining.
        accept_changes: Options in which a resumed run may differ from its checkpoint, such as model.beta or
            data.scorer. A run with other differences does not resume.
    """

    formula: ClassVar[str]
    anchored: ClassVar[bool] = False
    argument_fixes = FIXES
    # The option with the weight of each stream of texts.
    text_options: ClassVar[dict[str, str]] = {"sft": "sft_weight", "pretraining": "pretraining_weight"}

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        schedule: Schedule = "linear",
        warmup_steps: int | float = 0,
        reset_optimizer_each_round: bool = False,
        sft_weight: float = 0.0,
        pretraining_weight: float = 0.0,
        accept_changes: Sequence[str] = (),
    ):
        super().__init__()
        # a subclass with an `__init__` may give the weights other names, and saves what it is given
        given_by_subclass = type(self).__init__ is not PreferenceObjective.__init__
        weights = ("sft_weight", "pretraining_weight") if given_by_subclass else ()
        self.save_hyperparameters(ignore=["optimizer", "accept_changes", *weights])
        self.policy_config = checked_policy(type(self).__name__, policy)
        self.lora = None if lora is None else from_fields(LoRAConfig, lora)
        self.optimizer = optimizer
        self.learning_rate = LearningRate(schedule, warmup_steps, reset_optimizer_each_round)
        self.reset_optimizer_each_round = reset_optimizer_each_round
        self.text_weights = {"sft": sft_weight, "pretraining": pretraining_weight}
        for name, weight in self.text_weights.items():
            check_number(f"model.{self.text_options[name]}", weight, least=0)
        self.policy: Policy | None = None
        self.beside = Beside()
        self.reference: Reference | None = None
        self.metrics = torch.nn.ModuleDict()  # filled when the model is built, when all options are known
        self._step_means = StepMeans()
        self._checked_batch = False
        self._tokenizer = None
        self.accept_changes = accept_changes

    # --- what an objective states ---

    def data_needs(self) -> DataNeeds:
        """The needs of the objective, as configured, from its data."""
        return DataNeeds()

    def loss(self, logps: Tensor, anchor_logps: Any, beta: float, batch: PreferenceBatch) -> Tensor:
        """Loss per example, [B], from log π [B, K], log anchor [B, K] (None without an anchor) and β_eff."""
        raise NotImplementedError

    def implicit_rewards(self, logps: Tensor, anchor_logps: Any, beta: float, lengths: Tensor) -> Tensor:
        """Reward of each response as the loss sees it, [B, K], for the metrics."""
        return logps

    def after_loss(self, logps: Tensor, anchor_logps: Any, batch: PreferenceBatch) -> None:
        """Hook that is called once per training step, after the loss, with the loss's `logps` and `anchor_logps`."""

    @property
    def recordable_reference(self) -> Reference | None:
        """The reference, if the loss reads it and the data may record log π_ref: a separate model, fixed in a round."""
        return None

    # --- the model ---

    @property
    def tokenizer(self):
        """The policy's tokenizer, available before the model is built."""
        if self._tokenizer is None:
            self._tokenizer = self.policy.tokenizer if self.policy else load_tokenizer(self.policy_config)
        return self._tokenizer

    def use_tokenizer(self, path: str | None = None, chat_template: str | None = None) -> None:
        """Replace the model's tokenizer or chat template, in training and in the saved model.

        Args:
            path: Hub name or folder.
            chat_template: A file, or the template's text.
        """
        changes = {"tokenizer": path, "chat_template": chat_template and read_template(chat_template)}
        given = {name: value for name, value in changes.items() if value is not None}
        self.policy_config = replace(self.policy_config, **given)
        self.hparams["policy"] = self.policy_config
        self._tokenizer = load_tokenizer(self.policy_config)
        if self.policy is not None:
            self.policy.tokenizer = self._tokenizer

    @property
    def positions(self) -> int | None:
        """The policy's maximum number of tokens, known before it is loaded if its files say so."""
        return self.policy.positions if self.policy else load_positions(self.policy_config)

    def model_ends(self) -> list[int]:
        """The tokens that end a text by the model's generation config; none before the policy is loaded."""
        return self.policy.ends if self.policy else []

    def load_policy(self) -> Policy:
        """The policy at the start."""
        return Policy.load(self.policy_config, self.lora, self._tokenizer)

    def start(self) -> AbstractContextManager[Policy]:
        """Within its context, the policy that training started from, to compute beside the policy."""
        assert self.policy is not None
        if self.lora is not None and self.lora.adapter is None:
            return nullcontext(PolicyWithoutAdapter(self.policy))
        return self.beside.loaded(lambda: self.load_policy().eval(), self.policy.device)

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = self.load_policy()
            self.base_fingerprint = self.policy.base_fingerprint()
        if not self.metrics:
            needs = self.data_needs()
            preferences = needs.data_kind != "texts"
            for stage in ("train_", "val_", "test_"):
                self.metrics[stage] = PreferenceMetrics(self.anchored, needs.output_name, preferences=preferences)

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        try:
            optimizer = self.optimizer([weight for _, weight in self.policy.trainable_weights()])
        except ValueError as error:  # for example a learning rate below 0
            raise UserError(f"model.optimizer: {error}") from error
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        return self.learning_rate.factor(self.trainer, step)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.learning_rate.start(self.trainer)

    # --- a step ---

    def anchor(self, batch: PreferenceBatch) -> tuple[Tensor | None, float]:
        """The anchor's log-probabilities, [B, K], and β_eff; None and 1 without an anchor."""
        return None, 1.0

    def training_step(self, batch: PreferenceBatch | dict[str, PreferenceBatch], batch_idx: int) -> Tensor:
        """A step on preferences, or on preferences and texts together: {"preferences": ..., "sft": ...}."""
        if not self._checked_batch:
            check_batch(batch)
            self._checked_batch = True
        streams = {"preferences": batch} if isinstance(batch, PreferenceBatch) else {**batch}
        preferences = streams.pop("preferences")
        self.check_texts(streams.keys())
        place = MicroBatch.of(self.trainer, batch_idx)
        if place.is_first:
            self.metrics["train_"].reset()  # type: ignore[operator]
            self._step_means.reset()
        loss = self._step(preferences, "train") * place.weight()
        for name, text in streams.items():
            loss = loss + self.text_weights[name] * place.weight(name) * self._text_loss(name, text)
        if not self.trainer.fit_loop._should_accumulate():
            self._log_step()
        return loss

    def _log_step(self) -> None:
        """Log the means over all examples of the optimizer step."""
        metrics: Any = self.metrics["train_"]
        values = metrics.compute() | self._step_means.compute(self.trainer)
        values["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def check_texts(self, given: Collection[str]) -> None:
        """Check that each stream of texts in the data has a weight, and each weight a stream.

        Raises:
            UserError: a weight without its stream, or a stream without a weight.
        """
        for name, weight in self.text_weights.items():
            option = f"model.{self.text_options[name]}"
            if weight and name not in given:
                raise UserError(f"{option}={weight} has no effect: data.{name} is not set. Set it, or use {option}=0.")
            if name in given and not weight:
                raise UserError(f"data.{name} has no effect: its weight is 0. Set {option}, or leave data.{name} out.")

    def _text_loss(self, name: str, batch: PreferenceBatch) -> Tensor:
        assert self.policy is not None
        losses = sft_loss(self.policy(batch)[:, 0], batch.lengths[:, 0].clamp(min=1))
        loss = weighted_mean(losses, batch.weights)
        check_losses(losses, batch, self.trainer.global_step, f"data.{name}")
        self._step_means.add(f"nll_{name}", loss, total_weight(batch))
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._step(batch, "val")

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """log π(y|x) of every response, [B, K]."""
        assert self.policy is not None
        return self.policy(batch)

    def test_step(self, batch: PreferenceBatch | int, batch_idx: int) -> None:
        if isinstance(batch, PreferenceBatch):  # without test pairs, only callbacks act
            self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the `Predictions` callback answers the prompts."""

    def _step(self, batch: PreferenceBatch, stage: Literal["train", "val", "test"]) -> Tensor:
        assert self.policy is not None
        logps = self.policy(batch)
        anchor_logps, beta = self.anchor(batch)
        losses = self.loss(logps, anchor_logps, beta, batch)
        loss = weighted_mean(losses, batch.weights)
        if stage == "train":
            check_losses(losses, batch, self.trainer.global_step)
            self._check_first_step(losses.mean(), logps, anchor_logps, beta, batch)
            self.after_loss(logps, anchor_logps, batch)
        metrics: Any = self.metrics[f"{stage}_"]
        scale = None
        if stage == "train" and anchor_logps is not None:
            scale = gradient_scale(lambda leaf: self.loss(leaf, anchor_logps, beta, batch), logps)
        K = logps.shape[1] - batch.mismatched  # that branch belongs to no preference
        logps, lengths = logps[:, :K], batch.lengths[:, :K]
        anchor_logps = None if anchor_logps is None else anchor_logps[:, :K]
        rewards = self.implicit_rewards(logps, anchor_logps, beta, lengths.clamp(min=1))
        metrics.update(losses, logps, anchor_logps, lengths, rewards, batch.labels, batch.weights)
        if scale is not None:
            self._step_means.add("gradient_scale", weighted_mean(scale, batch.weights), total_weight(batch))
        return loss

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: Literal["val", "test"]) -> None:
        metrics: Any = self.metrics[f"{stage}_"]
        if metrics.update_called:
            self.log_dict({f"{stage}/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def _check_first_step(
        self, loss: Tensor, logps: Tensor, anchor_logps: Tensor | None, beta: float, batch: PreferenceBatch
    ) -> None:
        """Do nothing: there is nothing to check without an anchor."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed each step's random generator, which dropout uses, because checkpoints do not hold generator states."""
        if batch_idx == 0 and self.reset_optimizer_each_round:  # not when a run resumes within a round
            reset_optimization(self.trainer, self._own_options[0])
        seed, step = int(os.environ.get("PL_GLOBAL_SEED", 0)), self.trainer.global_step
        key = (seed, step, batch_idx, self.trainer.global_rank)
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little"))

    def identity(self) -> provenance.Table:
        """Everything that determines the numbers of the run; a resumed run must have the same."""
        own: provenance.Table = {f"model.{self.text_options[name]}": each for name, each in self.text_weights.items()}
        own[provenance.DTYPE] = dtype_name(resolve_dtype(self.policy_config, self.lora))  # auto differs by machine
        return super().identity() | own

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        SavedObjective.save(checkpoint, type(self).__name__, self.formula, self.data_needs().output_name)
        checkpoint["warmed_up_at"] = [*self.learning_rate.warmed_up_at]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("warmed_up_at", self.learning_rate.warmed_up_at)
        self.learning_rate.warmed_up_at = check_types(Completed(*saved))

    # --- the run's header ---

    def describe(self) -> Iterator[tuple[str, str]]:
        """Lines of the run's header: label and value."""
        assert self.policy is not None
        yield "objective", f"{type(self).__name__}: {self.formula}"
        yield from _describe_policy(self.policy, self.policy_config, adapts=self.lora is not None)
        if self.reset_optimizer_each_round:
            yield "optimizer", "restarts each round, with its schedule"
        if self._trainer is not None and str(self.trainer.precision).startswith("bf16"):
            yield from warn_if_slow(torch.bfloat16, "trainer.precision=32-true")
        else:
            yield from warn_if_slow(self.policy.dtype, "model.policy.dtype=float32")


def _describe_policy(policy: Policy, config: PolicyConfig, *, adapts: bool) -> Iterator[tuple[str, str]]:
    trained = sum(weight.numel() for _, weight in policy.trainable_weights())
    total = sum(map(size_of, own_weights(policy)))
    how = f"LoRA, {trained / 1e6:.1f} of {total / 1e6:.0f} M weights" if adapts else f"{total / 1e6:.0f} M weights"
    yield "policy", f"{config.path} ({how}, {dtype_name(policy.dtype)})"
    if config.quantize is not None:
        yield "", f"frozen weights in 4 bits ({config.quantize}); sampling and export unpack them"
    if not policy.shares_prefix:
        why = policy.model.config._attn_implementation
        yield "", f"each prompt is computed once per response: this model cannot share prefixes under {why}"
    if not adapts and policy.dtype.itemsize < 4:
        yield "", "half-precision weights are trained directly: updates below 0.4 % of a weight are lost"
