"""How far the policy has gone from the one that sampled a round.

    KL(π‖π_s) = E_{y~π_s}[w log w − w + 1],      w = π(y|x)/π_s(y|x)

over *all* responses that π_s drew: of responses selected by their reward it is no estimate. Unbiased, each term ≥ 0,
and of little variance while π is near π_s, for 1 − w takes away the part that has mean 0; far from π_s a few large w
decide it.
"""

import torch
from torch import Tensor


def kl_from_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """KL(π‖π_s) in nats per response, a scalar.

    Args:
        logps: log π of every response that was sampled, any shape.
        sampler_logps: log π_s of them, the same shape.
    """
    log_w = (logps - sampler_logps).double()
    return (log_w.exp() * log_w - torch.expm1(log_w)).mean()
