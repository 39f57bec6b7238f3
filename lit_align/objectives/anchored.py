"""Objectives with an anchor: the reference, its refresh, the proximal weight and the step-0 check."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_align.console import print_field
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives.anchor import adapted_proximal, effective_anchor
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import PolicyConfig
from lit_align.reference.base import Reference
from lit_align.reference.build import make_reference
from lit_align.reference.config import ReferenceConfig, RefreshRule
from lit_align.reference.lora import AdapterReference, DeltaReference

torch.serialization.add_safe_globals([ReferenceConfig])  # a hyperparameter of a checkpoint


class AnchoredObjective(PreferenceObjective):
    """An objective that holds the policy near an anchor: a reference, the sampler of the pairs, or both.

    Args:
        policy: Which language model is trained.
        beta: Weight of staying near the reference.
        proximal: λ, the weight of staying near the policy that sampled this round's responses; above 0 it makes the
            objective its proximal form (PR-DPO, PR-IPO, ...) and needs data that records the sampler (OnPolicyPairs).
        proximal_target: KL(policy‖sampler) that a round should come to, in nats per response: λ starts as `proximal`
            and is raised or lowered at the end of each round. None keeps λ.
        reference: What the policy is held near.
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
        if not (beta >= 0 and proximal >= 0 and beta + proximal > 0):
            raise UserError(f"model: beta={beta} and proximal={proximal} must both be ≥ 0, and one of them > 0.")
        if proximal_target is not None and not (proximal_target > 0 and proximal > 0):
            raise UserError(
                f"model.proximal_target={proximal_target} must be above 0, and so must proximal={proximal}, where λ "
                "starts: a λ of 0 stays 0."
            )
        self.beta = beta
        self.proximal = proximal
        self.proximal_target = proximal_target
        self.reads_sampler = proximal > 0
        self._adapted = False  # in this round
        self.reference_config = reference
        self.reference: Reference | None = None
        self.refresh_rule: RefreshRule | None = None  # set by the ReferenceRefresh callback before the model is built
        self._checked_first_step = False

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        """Closed form of the batch's mean loss where the policy equals its anchor."""
        raise NotImplementedError

    def implicit_rewards(self, logps: Tensor, anchor_logps: Tensor, beta: float, lengths: Tensor) -> Tensor:
        return beta * (logps - anchor_logps)

    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is None:
            assert self.policy is not None
            self.reference = make_reference(
                self.policy, self.policy_config, self.lora, self.reference_config, self.refresh_rule
            )

    def on_fit_start(self) -> None:
        if self.reference_config.form == "offload" and self.device.type == "cpu":
            raise UserError("model.reference.form=offload has no effect on CPUs; take form=auto.")

    def anchor(self, batch: PreferenceBatch) -> tuple[Tensor | None, float]:
        reference_logps = batch.reference_logps
        if reference_logps is None and self.beta > 0:
            assert self.reference is not None
            reference_logps = self.reference.logps(batch)
        return effective_anchor(reference_logps, batch.sampler_logps, self.beta, self.proximal)

    def adapt_proximal(self, kl: float) -> None:
        """Set λ of the next round, where it has a target; to be called at each round's end, on every process.

        Args:
            kl: This process's estimate of KL(policy‖sampler); the mean over processes counts.
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
                f"model.proximal_target={self.proximal_target} has had no effect in this round: no callback measures "
                "KL(policy‖sampler) and calls `adapt_proximal`. Add one that does, or leave proximal_target out."
            )
        self._adapted = False

    @property
    def reference_moves_in_round(self) -> bool:
        """Whether recorded log π_ref would be out of date before the round ends."""
        return self.refresh_rule is not None and self.refresh_rule.unit == "step"

    @torch.no_grad()
    def _check_first_step(
        self, loss: Tensor, logps: Tensor, anchor_logps: Tensor | None, beta: float, batch: PreferenceBatch
    ) -> None:
        """The step-0 check: where the policy still is its anchor, margins vanish and the loss has its closed form."""
        if self._checked_first_step or self.trainer.global_step > 0 or self.reference_config.path is not None:
            return
        self._checked_first_step = True
        assert anchor_logps is not None
        assert self.policy is not None
        if self._dropout_is_active():
            print_field("step-0 check", "not made: with dropout the policy in training is not its anchor")
            return
        off = (logps - anchor_logps).abs().max().item()
        bound, why = self._first_step_bound(logps, batch)
        expected = self.loss_at_anchor(beta, batch)
        exact = replace(batch, sampler_logps=anchor_logps)  # what is recorded of it is rounded
        at_anchor = self.loss(anchor_logps, anchor_logps, beta, exact).mean().item()
        if not math.isclose(at_anchor, expected, rel_tol=1e-4, abs_tol=1e-6):
            raise RuntimeError(
                f"{type(self).__name__}.loss at the anchor is {at_anchor}; loss_at_anchor says {expected}."
            )
        if not off <= bound:
            raise UserError(
                f"step-0 check: the policy is its own anchor, but a log-probability differs by {off:.3g} nats (bound "
                f"{bound:.3g}, {why}) and the loss is {loss.item():.6f} instead of {expected:.6f}. The reference, the "
                "recorded log-probabilities or the data's tokens do not belong to this policy."
            )
        margins = "exactly 0" if off == 0 else f"{off:.2g} ≤ {bound:.2g} nats"
        print_field("step-0 check", f"loss {loss.item():.4f} = {expected:.4f} ✓ · margins {margins} ✓ · {why}")

    def _first_step_bound(self, logps: Tensor, batch: PreferenceBatch) -> tuple[float, str]:
        """How far, in nats of a response, policy and anchor may be apart by rounding alone, and why.

        In half precision a token's is rounded by about 0.05 nats, otherwise in another batch, and a response's by
        √length of that: four times as much is allowed, or four times what this batch shows, each example once more
        alone.
        """
        assert self.policy is not None
        recorded = batch.reference_logps is not None or self.proximal > 0
        started = self.lora is not None and self.lora.adapter is not None  # a fresh adapter adds 0 in any form
        as_policy = isinstance(self.reference, AdapterReference) and self.reference.blocks <= 1
        if not recorded and self.reference_config.dtype != "auto":  # weights rounded otherwise than the policy's
            return 0.05 * batch.lengths.max().item(), "reference of another type"
        if not recorded and (as_policy or not started):
            return 0.0, "live reference"
        why = "recorded anchor" if recorded else "live reference that sums otherwise"
        if self.policy.dtype.itemsize >= 4 and "16" not in str(self.trainer.precision):
            return 1e-3, why
        alone = torch.cat([self.policy(batch.select(slice(i, i + 1))) for i in range(batch.size)])
        return max(0.2 * batch.lengths.max().item() ** 0.5, 4 * (logps - alone).abs().max().item()), why

    def _dropout_is_active(self) -> bool:
        """A fresh adapter's own dropout does not count: it acts on an update that is still 0."""
        fresh = self.lora is not None and self.lora.adapter is None
        names = ((name, m) for name, m in self.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0)
        return self.policy_config.dropout or any(not (fresh and "lora_dropout" in name) for name, _ in names)

    def _is_saved(self, name: str) -> bool:
        return super()._is_saved(name) and (self.refresh_rule is not None or not name.startswith("reference."))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["refresh_rule"] = self.refresh_rule.state() if self.refresh_rule else None
        checkpoint["reference"] = self.reference.state() if self.reference else {}
        checkpoint["proximal"] = self.proximal
        checkpoint["adapted"] = self._adapted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.proximal_target is not None:
            self.proximal = checkpoint.get("proximal", self.proximal)
            self._adapted = checkpoint.get("adapted", False)
        saved = checkpoint.get("refresh_rule")
        if saved and self._trainer is None:  # load_from_checkpoint
            self.refresh_rule = RefreshRule(**saved)
        self.configure_model()
        assert self.reference is not None
        if saved != (self.refresh_rule.state() if self.refresh_rule else None):
            self._change_rule(checkpoint)
        self.reference.load_state(checkpoint["reference"])

    def _change_rule(self, checkpoint: dict[str, Any]) -> None:
        """Bring the reference of a checkpoint that was made with another rule into the form that it has in this run.

        Raises:
            UserError: that has not been asked for, or cannot be done.
        """
        now, saved = self.refresh_rule, checkpoint.get("refresh_rule")
        weights = checkpoint.get("state_dict", {})  # shards have been loaded by now
        marks = {"reference", DeltaReference.NAME}
        ours = {name: weight for name, weight in self.state_dict().items() if marks & {*name.split(".")}}
        theirs = {name: weights.pop(name) for name in [*weights] if marks & {*name.split(".")}}
        # an accumulator that is not there begins from the weights, one that is not needed is left out
        sums = {name.replace("reference.model.", "reference.accumulator."): weight for name, weight in theirs.items()}
        fitted = {name: w for name, w in (sums | theirs).items() if name in ours or ".accumulator." not in name}
        fitted = fitted or ours  # one that has never moved is as it starts
        fits = {n: w.shape for n, w in fitted.items()} == {n: w.shape for n, w in ours.items()}
        if fits and now and now.accept_change:
            weights.update(fitted)
            return
        was = RefreshRule(**saved) if saved else "no refresh"
        form = f" The reference in it cannot be brought into the form of {self.reference}." if now and not fits else ""
        accept = ", or set reference_refresh.accept_change=true to go on with the new one" if now and fits else ""
        raise UserError(
            f"the checkpoint was made with the rule: reference {was}; this run has: {now or 'no refresh'}.{form} "
            f"Resume with the same reference_refresh{accept}."
        )

    def describe(self) -> Iterator[tuple[str, str]]:
        yield from super().describe()
        yield (
            "reference",
            str(self.reference) + (f" of {self.reference_config.path}" if self.reference_config.path else ""),
        )
        yield "refresh", str(self.refresh_rule or "never: the reference stays as it starts")
        if self.proximal:
            held = f"λ={self.proximal:g}: held near the pairs' sampler, β_eff={self.beta + self.proximal:g}"
            target = f"; λ adapted to {self.proximal_target:g} nats of KL a round" if self.proximal_target else ""
            yield "proximal", held + target


def rewards_of(batch: PreferenceBatch) -> Tensor:
    """The rewards of a batch's responses, [B, K].

    Raises:
        UserError: the data has none.
    """
    if batch.rewards is None:
        raise UserError(
            "the objective learns from rewards, but the data has none: take OnPolicyPairs, whose scorer gives them, or "
            "rows with `responses` and `rewards`."
        )
    return batch.rewards
