"""Kahneman–Tversky optimization (KTO): single responses, each desirable or not.

    desirable      λ_D (1 − σ(β(a − z0)))        a = log π(y|x) − log anchor(y|x)
    undesirable    λ_U (1 − σ(β(z0 − a)))
    z0 = max(0, mean of log(π/anchor) over mismatched prompts and responses),  without gradient

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7. Use it when responses are labelled thumbs up or down rather
than compared in pairs, or when the two kinds are unbalanced: λ_D and λ_U weight one kind against the other.

z0 estimates KL(π‖anchor), the reference point for gains and losses. It is computed on responses to *other*
prompts, which are assigned when the data set or the round is built: each example has one as its last branch. In the
PR form, z0 uses the effective anchor too.

Where we differ: `KTO` takes z0 from the *last* optimizer step, as the mean over all examples of all its micro-batches
and all processes (0 at the start, where the policy equals its anchor). So z0 is one step late, and the loss does not
depend on how a step is split into micro-batches. The paper takes z0 from the current batch. TRL takes it from each
rank's micro-batch, which makes the loss depend on accumulation. Some paired implementations use the other half of the
pair and let the gradient through.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log(π/anchor)(y), of scale
β_eff in the PR form, and

| metric | formula |
|---|---|
| z0 | max(0, mean of log(π/anchor) over mismatched prompts and responses) of the step just taken, in nats; train only |
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_align.errors import UserError, check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives.accumulation import weighted_mean
from lit_align.objectives.anchored import AnchoredObjective
from lit_align.policy import PolicyConfig


def kto_z0(mismatched_log_ratios: Tensor, weights: Tensor | None = None) -> Tensor:
    """KTO's reference point max(0, mean log(π/anchor)), a scalar without gradient.

    Args:
        mismatched_log_ratios: [M], log π − log anchor of responses to other prompts. Average over ranks *before* the
            clamp: pass the ratios of all ranks, or their mean over ranks as [1].
        weights: [M], the weight of each in the mean; None is 1.
    """
    check_shape("mismatched_log_ratios", mismatched_log_ratios, "M>=1")
    return weighted_mean(mismatched_log_ratios.detach(), weights).clamp(min=0)


def kto_loss(
    logps: Tensor,
    anchor_logps: Tensor,
    labels: Tensor,
    *,
    beta: float,
    z0: Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's loss of each response, [N].

    Args:
        logps: [N], log π of each response.
        anchor_logps: [N], log-probabilities of the reference, or of the effective anchor.
        labels: [N], True (or 1, or a probability) for desirable.
        beta: Scale of the implicit reward; 0.1 in the paper.
        z0: The reference point (`kto_z0`).
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
    """
    check_shape("logps", logps, "N")
    check_shape("anchor_logps", anchor_logps, *logps.shape)
    check_shape("labels", labels, *logps.shape)
    labels = labels.to(logps.dtype)
    gains_N = beta * (logps - anchor_logps - z0)
    desirable_N = desirable_weight * torch.sigmoid(-gains_N)  # 1 − σ(x) = σ(−x), without cancellation
    undesirable_N = undesirable_weight * torch.sigmoid(gains_N)
    return labels * desirable_N + (1 - labels) * undesirable_N


class KTO(AnchoredObjective):
    """Kahneman–Tversky optimization; with `proximal` > 0, PR-KTO. Takes pairs or labelled single responses.

    Args:
        policy: The language model to train.
        desirable_weight: λ_D, weight of desirable responses.
        undesirable_weight: λ_U, weight of undesirable responses. The paper keeps (λ_D · number of desirable responses)
            / (λ_U · number of undesirable responses) between 1 and 4/3.
    """

    formula = "λ(1 − σ(±β·(log π/anchor − z0))), + if desirable"
    z0: Tensor

    def __init__(
        self, policy: PolicyConfig, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **kwargs: Any
    ):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        check_number("model.desirable_weight", desirable_weight, above=0)
        check_number("model.undesirable_weight", undesirable_weight, above=0)
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.register_buffer("z0", torch.zeros(()))
        self._mismatched: list[Tensor] = []  # log ratios and weights of this optimizer step so far, [2, B] each

    def data_needs(self) -> DataNeeds:
        return replace(super().data_needs(), data_kind="labelled", needs_mismatched=True)

    def loss(self, logps: Tensor, anchor_logps: Tensor, beta: float, batch: PreferenceBatch) -> Tensor:
        if not batch.mismatched or batch.labels is None:
            raise UserError(
                "KTO needs labels, and another prompt's response as the last branch of each example. Use lit_align's "
                "data modules, or set `labels` and `mismatched` in your batches."
            )
        losses_N = kto_loss(
            logps[:, :-1].flatten(),
            anchor_logps[:, :-1].flatten(),
            batch.labels.flatten(),
            beta=beta,
            z0=self.z0,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return losses_N.view(batch.size, -1).mean(1)

    def after_loss(self, logps: Tensor, anchor_logps: Tensor, batch: PreferenceBatch) -> None:
        ratios = (logps - anchor_logps)[:, -1].detach()
        weights = torch.ones_like(ratios) if batch.weights is None else batch.weights.to(ratios)
        self._mismatched.append(torch.stack([ratios, weights]))

    def on_train_start(self) -> None:
        super().on_train_start()
        self._mismatched.clear()  # of a step that an earlier fit did not finish

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gathered: Any = self.all_gather(torch.cat(self._mismatched, dim=1))  # [2, M], or [processes, 2, M]
        ratios, weights = gathered.movedim(-2, 0).flatten(1)
        self.z0 = kto_z0(ratios, weights)
        self._mismatched.clear()
        self.log("train/z0", self.z0)

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        """Half the mean weight of the batch's labels."""
        assert batch.labels is not None
        share = batch.labels.mean().item()
        return (share * self.desirable_weight + (1 - share) * self.undesirable_weight) / 2
