"""Simple preference optimization (SimPO): −log σ(β(l̄_w − l̄_l) − γ),  l̄ = log π(y)/|y|.

Meng et al. 2024 (arXiv 2405.14734), equation 6. The reward β·l̄ is the mean log-probability per token, the quantity
that generation ranks by. It needs no reference and gives long responses no advantage; γ is the target margin. Use it
as a strong reference-free baseline. Only the learning rate limits how far the policy moves.

Where we differ: γ is defined as in the paper and in TRL; the authors' code takes γ/β (`gamma_beta_ratio`).
TRL's trainer adds CPO's likelihood term unless `cpo_alpha=0`; this one does not.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log π(y)/|y|.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lit_align.errors import check_number
from lit_align.logprobs import PreferenceBatch
from lit_align.objectives._checks import check_shape
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import PolicyConfig


def simpo_loss(logps: Tensor, lengths: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO's loss of each pair, [B].

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response, summed over tokens.
        lengths: [B, 2], their numbers of tokens.
        beta: Scale of the reward; 2 to 2.5 in the paper.
        gamma: Target margin, 0.3 to 1.6 in the paper.
    """
    check_shape("logps", logps, "B", 2)
    check_shape("lengths", lengths, *logps.shape)
    mean_logps_B2 = logps / lengths
    return -F.logsigmoid(beta * (mean_logps_B2[:, 0] - mean_logps_B2[:, 1]) - gamma)


class SimPO(PreferenceObjective):
    """Simple preference optimization: rewards per token, without a reference.

    Args:
        policy: The language model to train.
        beta: Scale of the reward, which is the mean log-probability per token; 2 to 2.5 in the paper.
        gamma: Target margin; 0.3 to 1.6 in the paper.
    """

    formula = "−log σ(β·Δ(log π / length) − γ)"

    def __init__(self, policy: PolicyConfig, *, beta: float = 2.0, gamma: float = 1.0, **kwargs: Any):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        check_number("model.beta", beta, above=0)
        self.beta = beta
        check_number("model.gamma", gamma, least=0)
        self.gamma = gamma

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        return simpo_loss(logps, batch.lengths.clamp(min=1), beta=self.beta, gamma=self.gamma)

    def implicit_rewards(self, logps: Tensor, anchor_logps: None, beta: float, lengths: Tensor) -> Tensor:
        return self.beta * logps / lengths
