"""KL divergence of the policy from the sampler of a round.

    KL(π‖π_s) = E_{y~π_s}[w log w − w + 1],      w = π(y|x)/π_s(y|x)

The mean is over *all* responses that were sampled from π_s; responses selected by their reward give no valid estimate.
Each term is ≥ 0 and varies little while π is near π_s. Far from π_s, a few large w dominate the mean when they are
sampled, and often they are not: for 64 responses at a KL of 6, the plain estimate has median 1 and is occasionally
1,000. So the weights are divided by their mean, which is 1 in expectation (self-normalised). This estimate is
consistent, grows with the distance, and never exceeds log N for N responses: above a third of log N, read it as a lower
bound.
"""

import math

import torch
from torch import Tensor

from lit_align.dtypes import exact_dtype


def kl_from_sampler(logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """KL(π‖π_s) in nats per response, a scalar.

    Args:
        logps: log π of all sampled responses, any shape.
        sampler_logps: log π_s of the same responses, the same shape.
    """
    log_w = (logps - sampler_logps).to(exact_dtype(logps.device)).flatten()
    log_w = log_w - (log_w.logsumexp(0) - math.log(len(log_w)))
    return (log_w.exp() * log_w - torch.expm1(log_w)).mean()
