"""The negative log-likelihood of texts, per token."""

from torch import Tensor

from lit_align.objectives._checks import check_shape


def sft_loss(logps: Tensor, lengths: Tensor) -> Tensor:
    """The negative log-likelihood of each response per token, [N].

    Args:
        logps: [N], log π of each response, summed over tokens.
        lengths: [N], their numbers of tokens.
    """
    check_shape("logps", logps, "N")
    check_shape("lengths", lengths, *logps.shape)
    return -logps / lengths
