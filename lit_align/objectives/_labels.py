"""Soft labels, shared by all pairwise losses: L_p(h) = p L(h) + (1 − p) L(−h)."""

from collections.abc import Callable

from torch import Tensor


def label_mean(loss: Callable[[Tensor], Tensor], margins: Tensor, labels: Tensor | float | None = None) -> Tensor:
    """The loss of each margin, averaged over which response wins.

    Args:
        loss: The loss of a margin (winner minus loser).
        margins: [B], column 0 minus column 1.
        labels: [B] or one number, the probability that column 0 wins; None means 1.
    """
    if labels is None:
        return loss(margins)
    if isinstance(labels, Tensor):
        labels = labels.to(margins.dtype)  # a bool cannot be subtracted from 1
    return labels * loss(margins) + (1 - labels) * loss(-margins)
