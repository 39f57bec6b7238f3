"""Log-ratios per token: a response's log π/anchor divided by its number of tokens.

    h = [log π(y_w) − log anchor(y_w)]/|y_w| − [log π(y_l) − log anchor(y_l)]/|y_l|

A sum over tokens favours a change in long responses, so that a policy can win by length. The mean per token removes
that. Tülu 3 (arXiv 2411.15124, section 5) and OLMo 2 train DPO so, with β = 5; TRL calls it `sigmoid_norm`.

The anchor of a proximal form is a weighted mean of log-probabilities, so it divides by the same length: the PR and TR
forms need nothing else. With responses of equal length L, β per token is the β of sums times L: the two losses are
then equal for DPO, and equal up to the factor L² for IPO. Otherwise no β makes them equal.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.objectives.anchored import AnchoredObjective
from lit_align.policy import PolicyConfig


class PerTokenObjective(AnchoredObjective):
    """An anchored objective whose log-ratios may be means per token.

    Args:
        length_normalize: Divide each response's log-ratio by its number of tokens. β then has another scale: for
            responses of about L tokens, take L times the β of sums.
    """

    def __init__(self, policy: PolicyConfig, *, length_normalize: bool = False, **kwargs: Any):
        super().__init__(policy, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        self.length_normalize = length_normalize

    def scaled(self, logps: Tensor, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities as the loss takes them: sums, or means per token; [B, K]."""
        return logps / batch.lengths.clamp(min=1) if self.length_normalize else logps

    def implicit_rewards(self, logps: Tensor, anchor_logps: Tensor, beta: float, lengths: Tensor) -> Tensor:
        rewards = super().implicit_rewards(logps, anchor_logps, beta, lengths)
        return rewards / lengths if self.length_normalize else rewards

    def describe(self) -> Iterator[tuple[str, str]]:
        yield from super().describe()
        if self.length_normalize:
            yield "log-ratios", "means per token (length_normalize): β is not comparable to that of sums"
