"""Maximum Preference Optimization (MPO): −σ(log π(y_w) − log π(y_l)).

Jiang et al. 2023 (arXiv 2312.16430). The preference is maximised directly: σ of the log-ratio is the
policy's own probability of choosing y_w over y_l, and its negative is the whole preference loss. MPO uses neither
a reference model nor a reward model. The policy is held by the likelihood of offline text, per token, from
`data.sft` and `data.pretraining`:

    −σ(Δ log π) − β log π(y_sft|x_sft) − γ log π(x_pretrain)

The likelihood terms are a *forward* KL to the reference that wrote the text. By Theorem 4.1, the gradient of the
expected preference can be computed on preference data from any sampler. Use it when labels are deterministic and
only one model fits in memory. The gradient with respect to Δ is bounded, in [−¼, 0]. It vanishes on pairs that are
clearly won (DPO's ratio keeps growing) and on pairs that are badly lost; the log form −log σ(Δ) keeps pushing on the
latter.

Other methods are also called MPO; this one is Maximum Preference Optimization. Where we differ: we know of no public
code, so the formula follows the abstract, Theorem 4.1 and the figures. The log form and length normalisation (divide
logps by lengths first) are therefore options.

Logged: the tables of `metrics.preference`, with the reward r(y) = log π(y) (per token with `length_normalize`), and of
`objectives.base`; loss is the preference term alone; nll_sft and nll_pretraining are logged beside it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives._labels import label_mean
from lit_align.objectives.base import PreferenceObjective
from lit_align.policy import PolicyConfig


def mpo_loss(logps: Tensor, *, labels: Tensor | None = None, log_form: bool = False) -> Tensor:
    """MPO's preference loss of each pair, [B]; `sft_loss` gives the likelihood terms.

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response.
        labels: [B], the probability that column 0 wins; None means 1.
        log_form: Use −log σ(Δ) in place of −σ(Δ).
    """
    check_shape("logps", logps, "B", 2)
    check_shape("labels", labels, logps.shape[0])
    margins_B = logps[:, 0] - logps[:, 1]
    return label_mean(lambda d: -(F.logsigmoid(d) if log_form else torch.sigmoid(d)), margins_B, labels)


class MPO(PreferenceObjective):
    """Maximum Preference Optimization: without reference or reward model; the likelihood of text holds the policy.

    Args:
        policy: The language model to train.
        beta: The paper's β, weight of the likelihood of the SFT texts (data.sft): the forward KL to their author. Use 0
            without such texts.
        gamma: The paper's γ, weight of the likelihood of the pre-training texts (data.pretraining). Use 0
            without them.
        log_form: Use −log σ(Δ) in place of −σ(Δ), which keeps pushing on pairs that are badly lost.
        length_normalize: Use log-probabilities per token.
    """

    formula = "−σ(Δlog π) − β·log π(y_sft) − γ·log π(x_pretrain)"
    text_options = {"sft": "beta", "pretraining": "gamma"}  # noqa: RUF012  # declared a ClassVar by the base

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        beta: float = 0.1,
        gamma: float = 0.0,
        log_form: bool = False,
        length_normalize: bool = False,
        **kwargs: Any,
    ):
        super().__init__(policy, sft_weight=beta, pretraining_weight=gamma, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        self.log_form = log_form
        self.length_normalize = length_normalize

    def data_needs(self) -> DataNeeds:
        return DataNeeds(takes_labels=True)

    def loss(self, logps: Tensor, anchor_logps: None, beta: float, batch: PreferenceBatch) -> Tensor:
        if self.length_normalize:
            logps = logps / batch.lengths.clamp(min=1)
        return mpo_loss(logps, labels=batch.labels, log_form=self.log_form)

    def implicit_rewards(self, logps: Tensor, anchor_logps: None, beta: float, lengths: Tensor) -> Tensor:
        return logps / lengths if self.length_normalize else logps
