"""How far the policy has gone from the one that sampled a round.

    KL(π‖π_s) = E_{y~π_s}[w log w − w + 1],      w = π(y|x)/π_s(y|x)

over *all* responses that π_s drew: of responses selected by their reward it is no estimate. Each term is ≥ 0, and
varies little while π is near π_s. Far from it a few large w would decide the mean, and their absence as often: of 64
responses at a KL of 6 the plain estimate has median 1 and now and then 1,000. So the weights are divided by their
mean, which is 1 in expectation (self-normalised). That is consistent, grows with the distance, and of N responses is
never above log N: from a third of log N on, read it as a lower bound.
"""

import math

import torch
from torch import Tensor


def kl_from_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """KL(π‖π_s) in nats per response, a scalar.

    Args:
        logps: log π of every response that was sampled, any shape.
        sampler_logps: log π_s of them, the same shape.
    """
    log_w = (logps - sampler_logps).double().flatten()
    log_w = log_w - (log_w.logsumexp(0) - math.log(len(log_w)))
    return (log_w.exp() * log_w - torch.expm1(log_w)).mean()
