"""Direct preference optimization (DPO): −log σ(βh).

    h = [log π(y_w) − log anchor(y_w)] − [log π(y_l) − log anchor(y_l)]

Rafailov et al. 2023 (arXiv 2305.18290), equation 7. The implicit reward β log(π/anchor) fits a
Bradley–Terry model of the preferences; the optimum is that of reward maximisation with a KL penalty, π ∝
anchor · exp(r/β). Use it first: it is the baseline for every other objective here. Its curvature
β²σ(βh)σ(−βh) vanishes as the margin grows; a refresh of the reference sets h = 0 and restores it (TR-DPO).

Three ways to treat uncertain labels, each a weight w in  −w log σ(βh) − (1−w) log σ(−βh):
    conservative   w = 1 − ε          bounds the margin: optimum βh = logit(1−ε)
    robust         w = (1−ε)/(1−2ε)   unbiased if a share ε of the labels is flipped (arXiv 2403.00409)
    soft labels    w = p              the annotators' or the reward model's own probability
With rewards of K responses ("dpo-rw" in EXO's code, arXiv 2402.00856), the loss is the cross-entropy of two softmaxes:

    −Σ_k softmax(r/β_r)_k · log softmax(β log(π/anchor))_k

For K = 2 this is the soft label p = σ((r_w − r_l)/β_r); for β_r → 0 it is plain DPO on the best response. Its
optimum π ∝ anchor · exp(r/(β β_r)) has KL weight β β_r.

Where we differ: TRL's `sigmoid` ignores its `label_smoothing`; here it gives conservative DPO. Smoothing flips soft
labels with probability ε: w = p(1−ε) + (1−p)ε.

With `length_normalize`, h compares log-ratios per token, the recipe of Tülu 3 and OLMo 2 (`objectives.per_token`): β is
then about the β of sums times the length of a response, and 5 in these recipes.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log(π/anchor)(y), of scale
β_eff in the PR form, divided by the response's length with `length_normalize`.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.errors import UserError, check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives._labels import label_mean
from lit_align.objectives.anchored import rewards_of
from lit_align.objectives.per_token import PerTokenObjective
from lit_align.policy import PolicyConfig


def dpo_loss(
    logps: Tensor,
    anchor_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    labels: Tensor | None = None,
    robust: bool = False,
    rewards: Tensor | None = None,
    reward_temperature: float = 1.0,
) -> Tensor:
    """DPO's loss of each example, [B].

    Args:
        logps: [B, K], log π of each response: K = 2, chosen and rejected, or any K ≥ 2 with `rewards`.
        anchor_logps: [B, K], log-probabilities of the reference, or of the effective anchor.
        beta: Scale of the implicit reward β log(π/anchor); 0.1 in the paper.
        label_smoothing: ε in [0, ½), the assumed share of flipped labels.
        labels: [B], the probability that column 0 wins; None means 1.
        robust: Correct the bias of flipped labels instead of smoothing them.
        rewards: [B, K], scalar rewards in place of labels.
        reward_temperature: β_r, used with `rewards` only.

    Raises:
        ValueError: `label_smoothing` is out of its range, or is given together with `rewards`, as are `labels` or
            `robust`.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, ½): at ½ labels carry no information.")
    check_shape("logps", logps, "B", 2 if rewards is None else "K>=2")
    check_shape("anchor_logps", anchor_logps, *logps.shape)
    check_shape("labels", labels, logps.shape[0])
    check_shape("rewards", rewards, *logps.shape)
    implicit_rewards_BK = beta * (logps - anchor_logps)

    if rewards is not None:
        if labels is not None or label_smoothing or robust:
            raise ValueError("`rewards` replace labels, label_smoothing and robust: leave these out.")
        targets_BK = torch.softmax(rewards.to(logps.dtype) / reward_temperature, dim=-1)
        return -(targets_BK * torch.log_softmax(implicit_rewards_BK, dim=-1)).sum(-1)

    weights: Tensor | float = (1 - label_smoothing) / (1 - 2 * label_smoothing if robust else 1)
    if labels is not None:
        labels = labels.to(logps.dtype)
        weights = labels * weights + (1 - labels) * (1 - weights)
    margins_B = implicit_rewards_BK[:, 0] - implicit_rewards_BK[:, 1]
    return label_mean(lambda z: -F.logsigmoid(z), margins_B, weights)


class DPO(PerTokenObjective):
    """Direct preference optimization; with `proximal` > 0, PR-DPO.

    Args:
        policy: The language model to train.
        label_smoothing: ε in [0, ½), the share of labels believed to be flipped (conservative DPO).
        robust: Correct the bias of flipped labels instead of smoothing (robust DPO).
        reward_temperature: β_r: learn the softmax of the rewards of K responses instead of one choice; the smaller,
            the harder. The implicit reward's scale is then β_eff/β_r, so that `beta` stays the weight of the KL.
    """

    formula = "−log σ(β·Δlog π/anchor)"

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        label_smoothing: float = 0.0,
        robust: bool = False,
        reward_temperature: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        self.label_smoothing = label_smoothing
        self.robust = robust
        self.reward_temperature = reward_temperature
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"model.label_smoothing={label_smoothing} must be in [0, ½): at ½ labels carry no information. "
                "Change it."
            )
        if robust and not label_smoothing:
            raise UserError(
                "model.robust=true has no effect because label_smoothing=0. Set label_smoothing, or leave robust out."
            )
        if reward_temperature is not None:
            check_number("model.reward_temperature", reward_temperature, above=0)
            if label_smoothing:
                raise UserError(
                    f"model.reward_temperature={reward_temperature}: the rewards are the labels, so "
                    "label_smoothing and robust have no effect. Leave them out."
                )

    def data_needs(self) -> DataNeeds:
        from_rewards = self.reward_temperature is not None
        return replace(super().data_needs(), takes_groups=from_rewards, takes_labels=not from_rewards)

    def loss(self, logps: Tensor, anchor_logps: Tensor, beta: float, batch: PreferenceBatch) -> Tensor:
        logps, anchor_logps = self.scaled(logps, batch), self.scaled(anchor_logps, batch)
        if self.reward_temperature is not None:
            return dpo_loss(
                logps,
                anchor_logps,
                beta=beta / self.reward_temperature,
                rewards=rewards_of(batch),
                reward_temperature=self.reward_temperature,
            )
        return dpo_loss(
            logps,
            anchor_logps,
            beta=beta,
            label_smoothing=self.label_smoothing,
            labels=batch.labels,
            robust=self.robust,
        )

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        return math.log(batch.response_ids.shape[1])
