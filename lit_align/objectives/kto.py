"""Kahneman–Tversky optimization (KTO): each response alone, desirable or not.

    desirable      λ_D (1 − σ(β(a − z0)))        a = log π(y|x) − log anchor(y|x)
    undesirable    λ_U (1 − σ(β(z0 − a)))
    z0 = max(0, mean of log(π/anchor) over mismatched prompts and responses),  without gradient

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7. Use it when responses carry a thumb up or down rather
than a rival, or when the two are unbalanced: λ_D and λ_U weigh one kind against the other.

z0 estimates KL(π‖anchor), the point from which gains and losses are felt. Its responses belong to *other*
prompts, paired where the data set or the round is made. Where we differ: some paired implementations take
the other half of the pair for z0 and let gradient through, and TRL averages z0 over each rank's
micro-batch, so that the loss depends on accumulation. Here `z0` is an argument; `kto_z0` makes it from
whatever the module gathers over ranks. In the PR form the effective anchor enters z0 too.
"""

import torch
from torch import Tensor

from lit_align.objectives._shapes import check_shape


def kto_z0(mismatched_logps: Tensor, mismatched_anchor_logps: Tensor) -> Tensor:
    """KTO's reference point max(0, mean log(π/anchor)), a scalar without gradient.

    Args:
        mismatched_logps: [M], log π of responses to other prompts. Average over ranks *before* the clamp:
            pass the log-probabilities of all ranks, or their mean over ranks as [1].
        mismatched_anchor_logps: [M], their log-probabilities under the anchor.
    """
    check_shape("mismatched_logps", mismatched_logps, "M>=1")
    check_shape("mismatched_anchor_logps", mismatched_anchor_logps, *mismatched_logps.shape)
    return (mismatched_logps - mismatched_anchor_logps).detach().mean().clamp(min=0)


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
        z0: The reference point, see `kto_z0`.
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
