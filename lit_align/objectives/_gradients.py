"""How strongly a loss pulls at the log-probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_scale(loss: Callable[[Tensor], Tensor], logps: Tensor) -> Tensor:
    """|∂loss/∂log π(y)| of each example's first response, [B].

    A pair's loss flattens as the policy moves away from the anchor. A refresh that moves the anchor to the policy
    restores the scale of the first step (DPO: β/2).

    Args:
        loss: Gives the loss of each example, [B], from log π, [B, K].
        logps: [B, K], log π of each response.
    """
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return gradient[:, 0].abs()
