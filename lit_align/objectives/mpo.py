"""Maximum Preference Optimization (MPO): −σ(log π(y_w) − log π(y_l)).

Jiang et al. 2023 (arXiv 2312.16430). The preference is maximised as it stands: σ of the log-ratio is the
policy's own probability of choosing y_w over y_l, and its negative is the whole preference loss. There is
no reference model and no reward model; what holds the policy is the likelihood of offline text, per token,
weighted by the module and fed by `data.sft` and `data.pretraining`:

    −σ(Δ log π) − β log π(y_sft|x_sft) − γ log π(x_pretrain)

which is a *forward* KL to the reference that wrote the SFT text. Theorem 4.1: the gradient of the expected
preference can be taken on preference data of any sampler. Use it where labels are deterministic and one
model must fit in memory: the gradient on Δ is bounded, in [−¼, 0], and vanishes on pairs long won (DPO's
ratio runs on) as on pairs badly lost; the log form −log σ(Δ) keeps pushing at the latter.

Other methods also go by MPO; this is Maximum Preference Optimization. Where we differ: no public code of it
is known to us, and the formula is read from the abstract, Theorem 4.1 and the figures; so the log form, and
length normalisation (divide logps by lengths first), are options.

Logged: the tables of `metrics.preference`, with the reward r(y) = log π(y) (per token, if so set), and of
`objectives.base`; loss is the preference term alone, beside nll_sft and nll_pretraining.
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


class MPO(PreferenceObjective):
    """Maximum Preference Optimization: no reference and no reward model; the likelihood of text holds the policy.

    Args:
        policy: Which language model is trained.
        beta: The paper's β, weight of the likelihood of the SFT texts (data.sft): the forward KL to their author.
        gamma: The paper's γ, weight of the likelihood of the pre-training texts (data.pretraining).
        log_form: −log σ(Δ) in place of −σ(Δ): keeps pushing at pairs that are badly lost.
        length_normalize: Take log-probabilities per token.
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
