"""Efficient exact optimization (EXO): KL( softmax_k β log(π/anchor) ‖ softmax_k r/β_r ).

Ji et al. 2024 (arXiv 2402.00856), equation 16 for pairs and the K-response form above it. The *reverse* KL,
with the policy's distribution over the K responses on the left, is the direction of the RLHF objective
itself. DPO's cross-entropy must cover every response; EXO seeks the best mode that the policy can represent.
Use it with scalar rewards and any K ≥ 2, or on labelled pairs with the target (1−ε, ε):

    q = σ(βh):   q (log q − log(1−ε)) + (1−q) (log(1−q) − log ε)

The optimum of the pair form is βh = logit(1−ε). It needs ε > 0, because the reverse KL to a certain label is
infinite. Soft labels p move the target to (p, 1−p), which is not an average of two losses: pass `rewards` [B, 2] =
(logit p, 0).

With rewards, the option `beta` is β_π β_r, the KL's weight: the optimum is π ∝ anchor · exp(r/(β_π β_r)). The function
`exo_loss` takes β_π, in the PR form (β+λ)/β_r.

Where we differ: the authors train the *tempered* policy, with logits/0.8 for policy and reference alike; set
`policy.temperature` for that. Their pair form has ε = σ(−10). TRL supports K = 2 only, with ε = 1e-3, which is
the default here.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β_eff log(π/anchor)(y), where
β_eff = β_π β_r; "rejected" is the worst of the K responses.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import UserError, check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives.anchored import AnchoredObjective, rewards_of
from lit_align.policy import PolicyConfig


def exo_loss(
    logps: Tensor,
    anchor_logps: Tensor,
    *,
    beta: float,
    rewards: Tensor | None = None,
    reward_temperature: float = 1.0,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO's loss of each example, [B].

    Args:
        logps: [B, K], log π of each response: K = 2, chosen and rejected, or any K ≥ 2 with `rewards`.
        anchor_logps: [B, K], log-probabilities of the reference, or of the effective anchor.
        beta: β_π, the scale of the implicit reward; 0.5, with β_r = 0.1, in the HH script.
        rewards: [B, K], scalar rewards in place of the pair's order.
        reward_temperature: β_r, used with `rewards` only.
        label_smoothing: ε in (0, ½), used by the pair form only.

    Raises:
        ValueError: `label_smoothing` is out of its range.
    """
    check_shape("logps", logps, "B", 2 if rewards is None else "K>=2")
    check_shape("anchor_logps", anchor_logps, *logps.shape)
    check_shape("rewards", rewards, *logps.shape)
    if rewards is not None:
        target_logps = torch.log_softmax(rewards.to(logps.dtype) / reward_temperature, dim=-1)
    elif 0 < label_smoothing < 0.5:
        targets = math.log1p(-label_smoothing), math.log(label_smoothing)
        # a tensor made of a list would wait for the GPU
        target_logps = torch.cat([logps.new_full((1,), target) for target in targets])
    else:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in (0, ½): EXO's KL to a certain label is infinite."
        )
    policy_logps_BK = torch.log_softmax(beta * (logps - anchor_logps), dim=-1)
    return (policy_logps_BK.exp() * (policy_logps_BK - target_logps)).sum(-1)


class EXO(AnchoredObjective):
    """Efficient exact optimization; with `proximal` > 0, PR-EXO.

    Args:
        policy: The language model to train.
        label_smoothing: ε in (0, ½), used by the pair form: the probability that the rejected response is better.
        reward_temperature: β_r: match the softmax of the rewards of K ≥ 2 responses instead of a pair's order. The
            implicit reward's scale is then β_eff/β_r, so `beta` is the weight of the KL: the HH script's β_π = 0.5
            with β_r = 0.1 is beta = 0.05.
    """

    formula = "KL(softmax β·log π/anchor ‖ softmax r/β_r)"

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        label_smoothing: float = 1e-3,
        reward_temperature: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        if not 0 < label_smoothing < 0.5:
            raise UserError(
                f"model.label_smoothing={label_smoothing} must be in (0, ½): EXO's KL is infinite at 0. Change it."
            )
        if reward_temperature is not None:
            check_number("model.reward_temperature", reward_temperature, above=0)
            if label_smoothing != 1e-3:
                raise UserError(
                    f"model.reward_temperature={reward_temperature}: the rewards are the target, so "
                    f"label_smoothing={label_smoothing} has no effect. Leave it out."
                )
        self.label_smoothing = label_smoothing
        self.reward_temperature = reward_temperature

    def data_needs(self) -> DataNeeds:
        return replace(super().data_needs(), takes_groups=self.reward_temperature is not None)

    def loss(self, logps: Tensor, anchor_logps: Tensor, beta: float, batch: PreferenceBatch) -> Tensor:
        if self.reward_temperature is None:
            return exo_loss(logps, anchor_logps, beta=beta, label_smoothing=self.label_smoothing)
        return exo_loss(
            logps,
            anchor_logps,
            beta=beta / self.reward_temperature,
            rewards=rewards_of(batch),
            reward_temperature=self.reward_temperature,
        )

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        """The mean over branches of log(1/K) − log target."""
        if self.reward_temperature is None:
            return -math.log(2) - (math.log1p(-self.label_smoothing) + math.log(self.label_smoothing)) / 2
        targets = torch.log_softmax(rewards_of(batch) / self.reward_temperature, dim=-1)
        return -math.log(targets.shape[1]) - targets.mean().item()
