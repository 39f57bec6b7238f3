"""Objectives with an anchor: the reference, its refresh, the proximal weight and the step-0 check."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_align.console import print_field
from lit_align.dtypes import has_full_precision
from lit_align.errors import UserError, check_number, shown
from lit_align.logprobs import PreferenceBatch
from lit_align.model_options import from_fields
from lit_align.needs import DataNeeds
from lit_align.objectives.anchor import adapted_proximal, effective_anchor
from lit_align.objectives.base import PreferenceObjective
from lit_align.objectives.first_step import (
    EXACT,
    Bound,
    check_closed_form,
    check_margins,
    other_type_bound,
    rounding_bound,
)
from lit_align.policy import PolicyConfig
from lit_align.reference.base import Reference
from lit_align.reference.build import belongs_to_reference, make_reference, reference_weights
from lit_align.reference.config import ReferenceConfig, RefreshRule


class AnchoredObjective(PreferenceObjective):
    """An objective that holds the policy near an anchor: a reference, the sampler of the pairs, or both.

    Args:
        policy: The language model to train.
        beta: Weight of staying near the reference.
        proximal: λ, the weight of staying near the policy that sampled this round's responses. A value above 0 gives
            the proximal form (PR-DPO, PR-IPO, ...) and needs data that records the sampler (OnPolicyPairs).
        proximal_target: KL(policy‖sampler) that a round should reach, in nats per response. λ starts at `proximal` and
            is raised or lowered at the end of each round. None keeps λ fixed.
        reference: The model that the policy is held near.
    """

    anchored = True

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        beta: float = 0.1,
        proximal: float = 0.0,
        proximal_target: float | None = None,
        reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008  # read, never written
        **kwargs: Any,
    ):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        check_number("model.beta", beta, least=0)
        check_number("model.proximal", proximal, least=0)
        if beta == proximal == 0:
            raise UserError(f"model: beta={beta} and proximal={proximal} must not both be 0. Raise one of them.")
        if proximal_target is not None and not (proximal_target > 0 and proximal > 0):
            raise UserError(
                f"model.proximal_target={proximal_target} must be above 0, and so must proximal={proximal}, the "
                "initial λ: a λ of 0 stays 0. Raise them."
            )
        self.beta = beta
        self.proximal = proximal
        self.proximal_target = proximal_target
        self._adapted = False  # in this round
        self.reference_config = from_fields(ReferenceConfig, reference)
        self.refresh_rule: RefreshRule | None = None
        self._rule_is_new = self._follows_rule = False
        self._checked_first_step = False

    def data_needs(self) -> DataNeeds:
        recorded = self.reference_config.form == "recorded" and self.beta > 0
        return DataNeeds(reads_sampler=self.proximal > 0, reads_recorded_reference=recorded)

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        """Closed form of the batch's mean loss when the policy equals its anchor.

        Raises:
            UserError: the objective does not define it.
        """
        raise UserError(
            f"{type(self).__name__} must define loss_at_anchor(beta, batch): the mean loss where the policy equals its "
            "anchor, with which the step-0 check compares. Define it."
        )

    def implicit_rewards(self, logps: Tensor, anchor_logps: Tensor, beta: float, lengths: Tensor) -> Tensor:
        return beta * (logps - anchor_logps)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # an earlier Trainer's rule stays: the reference that moved by it is in checkpoints
            self._follows_rule, self._rule_is_new = self._rule_is_new, False

    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is None:
            assert self.policy is not None
            self.reference = make_reference(
                self.policy, self.policy_config, self.lora, self.reference_config, self.refresh_rule, self.beside
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.reference_config.form == "offload" and self.device.type == "cpu":
            raise UserError("model.reference.form=offload has no effect on CPUs. Use form=auto.")

    def anchor(self, batch: PreferenceBatch) -> tuple[Tensor | None, float]:
        reference_logps = batch.reference_logps
        if reference_logps is not None and self.refresh_rule is not None and self.refresh_rule.unit == "step":
            raise UserError(
                "reference_refresh has no effect, because the batches hold log π_ref. Leave `reference_logps` out of "
                "them, or leave the refresh out."
            )
        if reference_logps is None and self.beta > 0:
            assert self.reference is not None
            reference_logps = self.reference.logps(batch)
        return effective_anchor(reference_logps, batch.sampler_logps, self.beta, self.proximal)

    def adapt_proximal(self, kl: float) -> None:
        """Set λ of the next round if it has a target. To be called at the end of each round, on every process.

        Args:
            kl: This process's estimate of KL(policy‖sampler); it is averaged over processes.
        """
        if self.proximal_target is None:
            return
        mean: Any = self.trainer.strategy.reduce(torch.tensor(kl, device=self.device), reduce_op="mean")
        self.proximal = adapted_proximal(self.proximal, mean.item(), self.proximal_target)
        self._adapted = True

    def training_step(self, batch: PreferenceBatch | dict[str, PreferenceBatch], batch_idx: int) -> Tensor:
        if self.proximal_target is not None:
            self.log("train/proximal", self.proximal, batch_size=1)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.proximal_target is not None and not self._adapted:  # callbacks have had their turn
            raise UserError(
                f"model.proximal_target={self.proximal_target} had no effect in this round because no callback "
                "measures KL(policy‖sampler) and calls `adapt_proximal`. Add one, or leave proximal_target out."
            )
        self._adapted = False

    @property
    def recordable_reference(self) -> Reference | None:
        moves_in_round = self.refresh_rule is not None and self.refresh_rule.unit == "step"
        if self.reference is None or not self.reference.is_separate or self.beta == 0 or moves_in_round:
            return None
        return self.reference

    @property
    def reference_is_start(self) -> bool:
        """Whether the reference has the start's weights, in the same type, and keeps them."""
        return self.refresh_rule is None and self.reference_config.is_start

    @torch.no_grad()
    def _check_first_step(
        self, loss: Tensor, logps: Tensor, anchor_logps: Tensor | None, beta: float, batch: PreferenceBatch
    ) -> None:
        """The step-0 check (`first_step`)."""
        if self._checked_first_step or self.trainer.global_step > 0 or self.reference_config.path is not None:
            return
        self._checked_first_step = True
        assert anchor_logps is not None
        if self._dropout_is_active():
            print_field("step-0 check", "skipped: with dropout the policy in training differs from its anchor")
            return
        expected = self.loss_at_anchor(beta, batch)
        exact = replace(batch, sampler_logps=anchor_logps)  # the recorded log-probabilities are rounded
        check_closed_form(
            type(self).__name__, self.loss(anchor_logps, anchor_logps, beta, exact).mean().item(), expected
        )
        difference = (logps - anchor_logps).abs().max().item()
        bound = self._first_step_bound(logps, batch)
        print_field("step-0 check", check_margins(difference, bound, loss.item(), expected))

    def _first_step_bound(self, logps: Tensor, batch: PreferenceBatch) -> Bound:
        """The largest difference of policy and anchor that rounding explains in the first step."""
        assert self.policy is not None
        assert self.reference is not None
        recorded = batch.reference_logps is not None or self.proximal > 0
        if not recorded and self.reference.dtype != self.policy.dtype:
            return other_type_bound(batch)
        fresh = self.lora is None or self.lora.adapter is None  # a fresh adapter adds 0 in any form
        compiled = self.policy_config.compile
        if not recorded and not compiled and (fresh or self.reference.computes_as_policy):
            return EXACT
        return rounding_bound(
            self.policy,
            logps,
            batch,
            full_precision=has_full_precision(self.policy.dtype, self.trainer.precision),
            reason="recorded anchor" if recorded else "live reference that may sum in another order",
        )

    def _dropout_is_active(self) -> bool:
        """A fresh adapter's own dropout does not count: it acts on an update that is still 0."""
        fresh = self.lora is not None and self.lora.adapter is None
        active = (name for name, part in self.named_modules() if isinstance(part, torch.nn.Dropout) and part.p > 0)
        return self.policy_config.dropout or any(not (fresh and "lora_dropout" in name) for name in active)

    def set_refresh_rule(self, rule: RefreshRule | None) -> None:
        """Say how the reference will move; the model that is built next has a reference that can.

        Call it before the model is built.

        Raises:
            UserError: the model is built, and its reference cannot move so.
        """
        if rule is not None and self.reference is not None and not self.reference.can_follow(rule.alpha):
            raise UserError(
                f"reference_refresh: the module was built by an earlier Trainer, and its reference ({self.reference}) "
                f"cannot follow this rule ({rule}). Make a new module, or give the callback to the first Trainer, too."
            )
        self.refresh_rule = rule
        self._rule_is_new = True

    def _is_saved(self, name: str) -> bool:
        """A reference that never moves is built again from its path."""
        return super()._is_saved(name) and (self.refresh_rule is not None or not belongs_to_reference(name))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["refresh_rule"] = self.refresh_rule.state() if self.refresh_rule else None
        checkpoint["reference"] = self.reference.state() if self.reference else {}
        checkpoint["proximal"] = self.proximal
        checkpoint["adapted"] = self._adapted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "reference" not in checkpoint:
            raise UserError(
                "the checkpoint is not of an objective with a reference. Name one that a run of this objective wrote."
            )
        super().on_load_checkpoint(checkpoint)
        self._checked_first_step = not self._is_fitting  # a later fit begins with trained weights
        if self.proximal_target is not None:
            self.proximal, self._adapted = checkpoint.get("proximal", self.proximal), checkpoint.get("adapted", False)
            if type(self.proximal) not in (int, float) or not 0 < self.proximal < math.inf:
                raise TypeError(f"proximal is {shown(self.proximal)}")
            if not isinstance(self._adapted, bool):
                raise TypeError(f"adapted is {shown(self._adapted)}")
        saved = RefreshRule(**checkpoint["refresh_rule"]) if checkpoint.get("refresh_rule") else None
        if self._trainer is None and saved != self.refresh_rule:  # load_from_checkpoint, which has built the model
            self.policy, self.reference = None, None
            self.refresh_rule = saved
        self.configure_model()
        assert self.reference is not None
        if saved != self.refresh_rule:
            self._change_rule(saved, checkpoint.get("state_dict", {}))  # shards have been loaded by now
        self.reference.load_state(checkpoint["reference"])

    def _change_rule(self, saved: RefreshRule | None, weights: dict[str, Any]) -> None:
        """Convert the reference of a checkpoint made with another refresh rule to this run's form.

        Args:
            saved: The checkpoint's rule.
            weights: The checkpoint's weights, changed in place.

        Raises:
            UserError: the change is not accepted, or impossible.
        """
        assert self.reference is not None
        rule = self.refresh_rule
        ours = {name: weight for name, weight in self.state_dict().items() if belongs_to_reference(name)}
        theirs = {name: weights.pop(name) for name in [*weights] if belongs_to_reference(name)}
        adapted = self.reference.adapt_state(theirs, ours)
        if adapted is not None and rule and rule.accept_change:
            weights.update(adapted)
            return
        form = f" Its reference does not fit the form of {self.reference}." if rule and adapted is None else ""
        accept = (
            ", or set reference_refresh.accept_change=true to resume with the new rule" if rule and not form else ""
        )
        raise UserError(
            f"the checkpoint was made with the rule: reference {saved or 'no refresh'}; this run has: "
            f"{rule or 'no refresh'}.{form} Resume with the same reference_refresh{accept}."
        )

    def describe(self) -> Iterator[tuple[str, str]]:
        yield from super().describe()
        assert self.policy is not None
        kept = sum(weight.numel() for weight in reference_weights(self.policy, self.reference))
        of = f" of {self.reference_config.path}" if self.reference_config.path else ""
        yield "reference", f"{self.reference}{of}" + (f" ({kept / 1e6:.1f} M weights of its own)" if kept else "")
        rule = str(self.refresh_rule or "never: the reference stays at the start")
        if self.refresh_rule and not (self._follows_rule or self._rule_is_new):
            rule = f"none now: the reference stays where the rule of an earlier Trainer ({rule}) left it"
        yield "refresh", rule
        if self.proximal:
            held = f"λ={self.proximal:g}: held near the pairs' sampler, β_eff={self.beta + self.proximal:g}"
            target = f"; λ adapted to {self.proximal_target:g} nats of KL per round" if self.proximal_target else ""
            yield "proximal", held + target


def rewards_of(batch: PreferenceBatch) -> Tensor:
    """The rewards of a batch's responses, [B, K].

    Raises:
        UserError: the data has none.
    """
    if batch.rewards is None:
        raise UserError(
            "the objective learns from rewards, but the data has none. Use OnPolicyPairs, whose scorer gives them, or "
            "rows with `responses` and `rewards`."
        )
    return batch.rewards
