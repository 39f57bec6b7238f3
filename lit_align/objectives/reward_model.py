"""Bradley–Terry reward model: −log σ(r_w − r_l − margin).

Bradley and Terry 1952; as the second stage of RLHF, Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the
margin, Touvron et al. 2023 (arXiv 2307.09288), equation 2. Rewards are defined up to a constant of the
prompt. Use it to score the rounds of on-policy training: fixed, on the same base model as the policy.
"""

import torch.nn.functional as F
from torch import Tensor

from lit_align.objectives._shapes import check_shape


def bradley_terry_loss(rewards: Tensor, *, margin: Tensor | float | None = None) -> Tensor:
    """The negative log-likelihood of each preference, [B].

    Args:
        rewards: [B, 2], reward of the chosen (column 0) and the rejected response.
        margin: [B] or one number, by how much the winner should win; None means 0.
    """
    check_shape("rewards", rewards, "B", 2)
    if isinstance(margin, Tensor):
        check_shape("margin", margin, rewards.shape[0])
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - (0 if margin is None else margin))
