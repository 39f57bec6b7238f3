"""Identity preference optimization (IPO): (h − 1/(2β))².

    h = [log π(y_w) − log anchor(y_w)] − [log π(y_l) − log anchor(y_l)]

Azar et al. 2023 (arXiv 2310.12036), equation 17. The paper's τ is `beta` here (`tau` is the trust region's
refresh period). Each pair has a finite target margin 1/(2β), or (2p−1)/(2β) if the first response wins with
probability p. The population optimum is π ∝ anchor · exp(P(y≻μ)/β), which uses preference probabilities and does
not assume a Bradley–Terry model. Use it when labels are nearly deterministic, which drives DPO's margin to infinity.

Where we differ: log-probabilities are *summed* over a response, as in the paper's formula, eric-mitchell's
code, OpenRLHF and turbo-alignment. TRL, HALOs and LLaMA-Factory take the mean per token (TRL reports that
the paper's experiments did): `length_normalize` does that (`objectives.per_token`). The two values of β are not
comparable: for responses of 100 tokens, the mean form requires a margin 100 times as large.

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log(π/anchor)(y), of scale
β_eff in the PR form, divided by the response's length with `length_normalize`.
"""

from dataclasses import replace

from torch import Tensor

from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives._labels import label_mean
from lit_align.objectives.per_token import PerTokenObjective


def ipo_loss(logps: Tensor, anchor_logps: Tensor, *, beta: float, labels: Tensor | None = None) -> Tensor:
    """IPO's loss of each pair, [B].

    Args:
        logps: [B, 2], log π of the chosen (column 0) and the rejected response.
        anchor_logps: [B, 2], log-probabilities of the reference, or of the effective anchor.
        beta: The paper's τ: the target margin is 1/(2β).
        labels: [B], the probability that column 0 wins; None means 1.
    """
    check_shape("logps", logps, "B", 2)
    check_shape("anchor_logps", anchor_logps, *logps.shape)
    check_shape("labels", labels, logps.shape[0])
    log_ratios_B2 = logps - anchor_logps
    margins_B = log_ratios_B2[:, 0] - log_ratios_B2[:, 1]
    return label_mean(lambda h: (h - 1 / (2 * beta)) ** 2, margins_B, labels)


class IPO(PerTokenObjective):
    """Identity preference optimization; with `proximal` > 0, PR-IPO."""

    formula = "(Δlog π/anchor − 1/(2β))²"

    def data_needs(self) -> DataNeeds:
        return replace(super().data_needs(), takes_labels=True)

    def loss(self, logps: Tensor, anchor_logps: Tensor, beta: float, batch: PreferenceBatch) -> Tensor:
        return ipo_loss(self.scaled(logps, batch), self.scaled(anchor_logps, batch), beta=beta, labels=batch.labels)

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        return 1 / (2 * beta) ** 2
