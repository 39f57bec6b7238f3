"""Odds-ratio preference optimization (ORPO): −l̄_w − β log σ(log odds_w − log odds_l).

    l̄ = log π(y)/|y|,      log odds = l̄ − log(1 − exp l̄)

Hong et al. 2024 (arXiv 2403.07691); the preference term is equation 7, and the paper's λ is `beta`. ORPO combines
supervised fine-tuning on the chosen response and a preference loss in one stage, without a reference. Use it on a
base model, in place of SFT followed by DPO.

`log1mexp` computes log(1 − exp l̄), because the plain expression rounds to log 0 at l̄ → 0⁻ (a memorized response).

Where we differ: the likelihood covers the response only, averaged over its tokens and then over pairs. TRL takes it
over prompt *and* response and over all tokens of the batch at once, and computes the odds in float32.

Logged: the tables of `metrics.preference` and `objectives.base`, with the log odds as the reward r(y).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.errors import check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives._labels import label_mean
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import PolicyConfig


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp x) for x ≤ 0, accurate at both ends (Mächler 2012) and finite at 0."""
    # values closer to 0 are rounding, not signal; it also keeps exp(x) < 1, else `where` has the gradient 0 · ∞
    x = x.clamp(max=-4 * torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_odds(logps: Tensor) -> Tensor:
    """log p − log(1 − p) of log-probabilities, any shape."""
    return logps - log1mexp(logps)


def orpo_loss(logps: Tensor, lengths: Tensor, *, beta: float, labels: Tensor | None = None) -> Tensor:
    """ORPO's loss of each pair, [B].

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response, summed over tokens.
        lengths: [B, 2], their numbers of tokens.
        beta: The paper's λ, weight of the odds-ratio term; 0.1 to 0.25 in the paper.
        labels: [B], the probability that column 0 wins, used by the odds-ratio term only; None means 1.
    """
    check_shape("logps", logps, "B", 2)
    check_shape("lengths", lengths, *logps.shape)
    check_shape("labels", labels, logps.shape[0])
    mean_logps_B2 = logps / lengths
    log_odds_B2 = log_odds(mean_logps_B2)
    log_odds_ratios_B = log_odds_B2[:, 0] - log_odds_B2[:, 1]
    return beta * label_mean(lambda z: -F.logsigmoid(z), log_odds_ratios_B, labels) - mean_logps_B2[:, 0]


class ORPO(PreferenceObjective):
    """Odds-ratio preference optimization: fine-tuning and preference in one stage, without a reference.

    Args:
        policy: The language model to train.
        beta: The paper's λ, weight of the odds-ratio term; 0.1 to 0.25 in the paper.
    """

    formula = "−l̄_w − β·log σ(Δlog odds),  l̄ = log π / length"

    def __init__(self, policy: PolicyConfig, *, beta: float = 0.1, **kwargs: Any):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        check_number("model.beta", beta, above=0)
        self.beta = beta

    def data_needs(self) -> DataNeeds:
        return DataNeeds(takes_labels=True)

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        return orpo_loss(logps, batch.lengths.clamp(min=1), beta=self.beta, labels=batch.labels)

    def implicit_rewards(self, logps: Tensor, anchor_logps: None, beta: float, lengths: Tensor) -> Tensor:
        return log_odds(logps / lengths)
