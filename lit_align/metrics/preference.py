"""What training and validation log about a batch of preferences.

With the implicit reward r(y) = β_eff·(log π(y|x) − log anchor(y|x)), and branches ordered best first:

| metric | formula |
|---|---|
| loss | mean of the objective's loss over examples |
| reward_accuracy | share of examples with r(chosen) > r(rejected); a tie counts 0 |
| reward_margin | mean of r(chosen) − r(rejected) |
| logp_chosen, logp_rejected | mean of log π(y|x), summed over tokens |
| log_ratio_chosen, log_ratio_rejected | mean of log π(y|x) − log anchor(y|x); no KL: the pairs were selected |
| length_chosen, length_rejected | mean number of response tokens |

"rejected" is the last branch, the worst of a group. Objectives without an anchor take r(y) = log π(y|x) and log no
log ratios.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class PreferenceMetrics(Metric):
    """Means over examples of the quantities above; `compute` returns them by name.

    Args:
        anchored: Whether there are log ratios.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, anchored: bool = True):
        super().__init__()
        self.anchored = anchored
        self.names = ["loss", "reward_accuracy", "reward_margin"]
        sides = ["logp", "log_ratio", "length"] if anchored else ["logp", "length"]
        self.names += [f"{what}_{side}" for what in sides for side in ("chosen", "rejected")]
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, losses: Tensor, logps: Tensor, anchor_logps: Tensor | None, lengths: Tensor, beta: float = 1.0
    ) -> None:
        """Add B examples.

        Args:
            losses: [B].
            logps: [B, K], log π, best branch first.
            anchor_logps: [B, K], or None for an objective without an anchor.
            lengths: [B, K], response tokens.
            beta: β_eff.
        """
        ratios = logps if anchor_logps is None else logps - anchor_logps
        margins = beta * (ratios[:, 0] - ratios[:, -1])
        columns = [losses, (margins > 0).float(), margins]
        for what in [logps, ratios, lengths] if self.anchored else [logps, lengths]:
            columns += [what[:, 0], what[:, -1]]
        self.total += torch.stack([column.detach().double().sum() for column in columns])
        self.count += len(losses)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.total / self.count).unbind(), strict=True))
