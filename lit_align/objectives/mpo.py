"""Maximum Preference Optimization (MPO): −σ(log π(y_w) − log π(y_l)).

Jiang et al. 2023 (arXiv 2312.16430). The preference is maximised as it stands: σ of the log-ratio is the
policy's own probability of choosing y_w over y_l, and its negative is the whole preference loss. There is
no reference model and no reward model; what holds the policy is the likelihood of offline text, weighted
and fed by the module:

    −σ(Δ log π) − β log π(y_sft|x_sft) − γ log π(x_pretrain)

which is a *forward* KL to the reference that wrote the SFT text. Theorem 4.1: the gradient of the expected
preference can be taken on preference data of any sampler. Use it where labels are deterministic and one
model must fit in memory: the gradient on Δ is bounded, in [−¼, 0], and vanishes on pairs long won (DPO's
ratio runs on) as on pairs badly lost; the log form −log σ(Δ) keeps pushing at the latter.

Other methods also go by MPO; this is Maximum Preference Optimization. The formula is read from the
abstract, Theorem 4.1 and the figures; so the log form, and length normalisation (divide logps by lengths
first), are options.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.objectives._labels import label_mean
from lit_align.objectives._shapes import check_shape


def mpo_loss(logps: Tensor, *, labels: Tensor | None = None, log_form: bool = False) -> Tensor:
    """MPO's preference loss of each pair, [B]; the likelihood terms are `sft_loss`.

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response.
        labels: [B], the probability that column 0 wins; None means 1.
        log_form: −log σ(Δ) in place of −σ(Δ).
    """
    check_shape("logps", logps, "B", 2)
    check_shape("labels", labels, logps.shape[0])
    margins_B = logps[:, 0] - logps[:, 1]
    return label_mean(lambda d: -(F.logsigmoid(d) if log_form else torch.sigmoid(d)), margins_B, labels)
