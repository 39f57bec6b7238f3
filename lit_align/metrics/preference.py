"""Metrics of a batch of preferences, logged in training and validation.

| metric | formula |
|---|---|
| loss | mean of the objective's loss over examples |
| reward_accuracy | share of examples with r(chosen) > r(rejected); a tie counts 0 |
| reward_margin | mean of r(chosen) − r(rejected) |
| logp_chosen, logp_rejected | mean of log π(y|x), summed over tokens |
| log_ratio_chosen, log_ratio_rejected | mean of log π(y|x) − log anchor(y|x); not a KL: the pairs were selected |
| length_chosen, length_rejected | mean number of response tokens |

r(y) is the implicit reward as the loss sees it: β_eff·(log π(y|x) − log anchor(y|x)), unless the objective's page
gives another. "rejected" is the last response, the worst of a group. Means and shares weigh each example by its weight,
if rows have one (column `weight`). Objectives without an anchor log no log ratios. A reward model's r(y) is its output,
which it logs in place of log π:

| metric | formula |
|---|---|
| reward_chosen, reward_rejected | mean of r(y) |

For labelled single responses (KTO), desirable ones count as chosen and the others as rejected, and

| metric | formula |
|---|---|
| reward_accuracy | share of responses with r(y) > 0 if desirable, r(y) < 0 if not |
| reward_margin | mean of r(y) over desirable and of −r(y) over undesirable responses |

For texts to imitate (SFT), which have no rejected side, the metrics are the loss and

| metric | formula |
|---|---|
| logp | mean of log π(y|x), summed over tokens |
| length | mean number of response tokens |
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lit_align.dtypes import exact_dtype


class PreferenceMetrics(Metric):
    """Means over examples of the quantities above; `compute` returns them by name.

    Args:
        anchored: Whether the objective has an anchor, and so log ratios.
        output_name: Name of the values passed as `logps`.
        preferences: Whether the data has better and worse responses.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, anchored: bool = True, output_name: str = "logp", preferences: bool = True):
        super().__init__()
        self.anchored = anchored
        self.preferences = preferences
        sides = [output_name, "log_ratio", "length"] if anchored else [output_name, "length"]
        self.names = ["loss", *sides]
        if preferences:
            self.names = ["loss", "reward_accuracy", "reward_margin"]
            self.names += [f"{what}_{side}" for what in sides for side in ("chosen", "rejected")]
        exact = exact_dtype(torch.get_default_device())
        self.add_state("total", torch.zeros(len(self.names), dtype=exact), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.names), dtype=exact), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Move the sums; to a device without float64 they go as float32."""
        if exact_dtype(fn(torch.zeros(1, device=self.device)).device) == torch.float32:
            self.total, self.count = self.total.float(), self.count.float()
            self._defaults |= {"total": torch.zeros_like(self.total), "count": torch.zeros_like(self.count)}
        return super()._apply(fn, exclude_state)

    def update(
        self,
        losses: Tensor,
        logps: Tensor,
        anchor_logps: Tensor | None,
        lengths: Tensor,
        rewards: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add B examples.

        Args:
            losses: [B].
            logps: [B, K], log π, best branch first.
            anchor_logps: [B, K], or None for an objective without an anchor.
            lengths: [B, K], response tokens.
            rewards: [B, K], implicit rewards.
            labels: [B, 1], 1 for desirable; used for single responses only.
            weights: [B], the weight of each example in the means; None is 1.
        """
        whats = [logps, lengths] if anchor_logps is None else [logps, logps - anchor_logps, lengths]
        every = torch.ones_like(losses) if weights is None else weights
        if not self.preferences:
            columns, counted = [losses, *(what[:, 0] for what in whats)], [every] * (1 + len(whats))
        else:
            if logps.shape[1] > 1:
                margins, desirable, undesirable = rewards[:, 0] - rewards[:, -1], every, every
            else:
                label = torch.ones_like(losses) if labels is None else labels[:, 0].to(losses)
                margins = rewards[:, 0] * (2 * label - 1)
                desirable, undesirable = every * label, every * (1 - label)
            columns, counted = [losses, (margins > 0).float(), margins], [every] * 3
            for what in whats:
                columns += [what[:, 0], what[:, -1]]
                counted += [desirable, undesirable]
        exact = exact_dtype(losses.device)
        weight = torch.stack([each.to(exact) for each in counted])
        total = (torch.stack([column.detach().to(exact) for column in columns]) * weight).sum(1)
        # not in place, which fails in `fit` after `validate` has reset them in inference mode
        self.total, self.count = self.total + total, self.count + weight.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Means by name; NaN if no example has a value, such as the length of undesirable responses without any."""
        return dict(zip(self.names, (self.total / self.count).unbind(), strict=True))
