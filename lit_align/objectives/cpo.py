"""Contrastive preference optimization (CPO): −log σ(β(log π(y_w) − log π(y_l))) − α log π(y_w).

Xu et al. 2024 (arXiv 2401.08417), equation 3 and the likelihood term. CPO is DPO with a uniform reference, which
cancels; imitating the chosen response takes the place of the KL term. Use it when only one model fits in memory
and the chosen responses are good enough to imitate (it was designed for translation).

Where we differ: the likelihood term is a sum over tokens, as in the paper. TRL averages it over all tokens
of the batch. With `length_normalize` it is the mean over each response's tokens, the nearest loss that is
defined per example.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log π(y).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lit_align.errors import UserError, check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives._labels import label_mean
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import PolicyConfig


def cpo_loss(
    logps: Tensor,
    *,
    beta: float,
    alpha: float = 1.0,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """CPO's loss of each pair, [B].

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response, summed over tokens.
        beta: Scale of the reward; 0.1 in the paper.
        alpha: Weight of the likelihood of the chosen response; 1 in the paper.
        lengths: [B, 2], numbers of tokens: the likelihood term becomes a mean over tokens. None means a sum.
        labels: [B], the probability that column 0 wins, used by the preference term only; None means 1.
    """
    check_shape("logps", logps, "B", 2)
    check_shape("lengths", lengths, *logps.shape)
    check_shape("labels", labels, logps.shape[0])
    preference_B = label_mean(lambda z: -F.logsigmoid(z), beta * (logps[:, 0] - logps[:, 1]), labels)
    chosen_logps_B = logps[:, 0] if lengths is None else logps[:, 0] / lengths[:, 0]
    return preference_B - alpha * chosen_logps_B


class CPO(PreferenceObjective):
    """Contrastive preference optimization: DPO with a uniform reference, plus the likelihood of the chosen response.

    Args:
        policy: The language model to train.
        beta: Scale of the reward; 0.1 in the paper.
        alpha: Weight of the likelihood of the chosen response; 1 in the paper.
        length_normalize: Average that likelihood over the response's tokens.
    """

    formula = "−log σ(β·Δlog π) − α·log π(y_w)"

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        beta: float = 0.1,
        alpha: float = 1.0,
        length_normalize: bool = False,
        **kwargs: Any,
    ):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        check_number("model.beta", beta, above=0)
        self.beta = beta
        check_number("model.alpha", alpha, least=0)
        self.alpha = alpha
        if length_normalize and not alpha:
            raise UserError(
                "model.length_normalize=true has no effect because alpha=0 leaves the likelihood out. Leave it out."
            )
        self.length_normalize = length_normalize

    def data_needs(self) -> DataNeeds:
        return DataNeeds(takes_labels=True)

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        return cpo_loss(
            logps,
            beta=self.beta,
            alpha=self.alpha,
            lengths=batch.lengths.clamp(min=1) if self.length_normalize else None,
            labels=batch.labels,
        )

    def implicit_rewards(self, logps: Tensor, anchor_logps: None, beta: float, lengths: Tensor) -> Tensor:
        return self.beta * logps
