"""Supervised fine-tuning (SFT): −log π(y|x)/|y|.

The stage before every pipeline here, the start and reference of the preference stage, and the likelihood
terms of Maximum Preference Optimization.

Where we differ: the mean is per response, then over responses, so that an example's loss does not depend on
its batch. Most trainers average over all tokens of a batch, which weights long responses more: Σ logps / Σ
lengths.
"""

from torch import Tensor

from lit_align.objectives._shapes import check_shape


def sft_loss(logps: Tensor, lengths: Tensor) -> Tensor:
    """The negative log-likelihood of each response per token, [N].

    Args:
        logps: [N], log π of each response, summed over tokens.
        lengths: [N], their numbers of tokens.
    """
    check_shape("logps", logps, "N")
    check_shape("lengths", lengths, *logps.shape)
    return -logps / lengths
