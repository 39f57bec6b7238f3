"""Self-play preference optimization (SPPO): Σ_y (log π/anchor − (P(y≻π_t) − c)/β)².

Wu et al. 2024 (arXiv 2405.00675), equation 4.7, where β = 1/η and the anchor is π_t, the policy of the last
round. Each of the K responses is regressed on its own probability of beating π_t. The optimum,
π ∝ anchor · exp(P/β), is a step of multiplicative weights towards the Nash policy. Use it with a preference
model that is not transitive, or to raise the winner as well as lower the loser.

The constant is the log-normaliser: with c(x) = β log Σ_y anchor(y) exp(P(y≻π_t)/β) the optimum has loss 0.
The paper takes c = ½, the value for large β. `sppo_baseline` estimates c from K samples of π_s,

    c(x) = β log (1/K) Σ_k (anchor_k/π_s,k) exp(P_k/β)

In the PR form (β = β_eff, anchor the *unnormalised* mixture) this also carries log Z̃, which dividing by
Σ_k anchor_k/π_s,k would drop. The plain mean over K samples is unbiased for exp(c/β), not for c; it is noisy if K is
small, or if β is small against the spread of P. The K responses must be samples of π_s itself: those of another
temperature, or of top_p or top_k, make it biased.

Where we differ: the sum over K is the paper's, without a factor ½. The authors' code averages over the pair, which
halves loss and gradient. It estimates P with soft labels, each response against all K including itself
(`win_probabilities_from_pairwise`), and uses η = 1e3 (β = 1e-3). TRL's `sppo_hard` is win_probabilities [1, 0].

Logged: the tables of `metrics.preference` and `objectives.base`, with the reward r(y) = β log(π/anchor)(y), of scale
β_eff in the PR form; the loss pulls it to P(y≻π_t) − c.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.needs import DataNeeds
from lit_align.objectives._checks import check_shape
from lit_align.objectives.anchored import AnchoredObjective
from lit_align.policy import PolicyConfig


def win_probabilities_from_pairwise(pairwise: Tensor) -> Tensor:
    """P̂(y_i≻π_s), [B, K]: the mean over all K opponents, itself included at ½.

    Args:
        pairwise: [B, K, K], the probability that response i beats response j; the diagonal is not read.
    """
    check_shape("pairwise", pairwise, "B", pairwise.shape[-1], "K")
    itself = torch.eye(pairwise.shape[-1], dtype=torch.bool, device=pairwise.device)
    return torch.where(itself, 0.5, pairwise).mean(-1)


def win_probabilities_from_rewards(rewards: Tensor, reward_temperature: float = 1.0) -> Tensor:
    """P̂(y_i≻π_s), [B, K], with P_ij = σ((r_i − r_j)/β_r).

    Args:
        rewards: [B, K], scalar rewards.
        reward_temperature: β_r.
    """
    check_shape("rewards", rewards, "B", "K")
    differences_BKK = rewards[:, :, None] - rewards[:, None, :]
    return win_probabilities_from_pairwise(torch.sigmoid(differences_BKK / reward_temperature))


def sppo_baseline(anchor_logps: Tensor, sampler_logps: Tensor, *, win_probabilities: Tensor, beta: float) -> Tensor:
    """The constant c(x), [B], estimated as the plain mean over the K sampled responses.

    Args:
        anchor_logps: [B, K], log-probabilities of the (effective) anchor.
        sampler_logps: [B, K], log π_s; the same as `anchor_logps` if the anchor sampled the responses.
        win_probabilities: [B, K], P(y≻π_s).
        beta: 1/η, or β_eff.
    """
    check_shape("anchor_logps", anchor_logps, "B", "K>=1")
    check_shape("sampler_logps", sampler_logps, *anchor_logps.shape)
    check_shape("win_probabilities", win_probabilities, *anchor_logps.shape)
    log_weights_BK = anchor_logps - sampler_logps
    exponents_BK = log_weights_BK + win_probabilities.to(log_weights_BK.dtype) / beta
    return beta * (torch.logsumexp(exponents_BK, dim=-1) - math.log(anchor_logps.shape[-1]))


def sppo_loss(
    logps: Tensor,
    anchor_logps: Tensor,
    *,
    win_probabilities: Tensor,
    beta: float,
    baseline: Tensor | float = 0.5,
) -> Tensor:
    """SPPO's loss of each prompt, [B], summed over its responses.

    Args:
        logps: [B, K], log π of each response, K ≥ 1.
        anchor_logps: [B, K], log-probabilities of the last round's policy, or of the effective anchor.
        win_probabilities: [B, K], P(y≻π_t): soft (the helpers above) or hard ([1, 0]).
        beta: 1/η; 1e-3 in the authors' code.
        baseline: c, one number or [B] from `sppo_baseline`.
    """
    check_shape("logps", logps, "B", "K>=1")
    check_shape("anchor_logps", anchor_logps, *logps.shape)
    check_shape("win_probabilities", win_probabilities, *logps.shape)
    if isinstance(baseline, Tensor):
        check_shape("baseline", baseline, logps.shape[0])
        baseline = baseline[:, None]
    return (logps - anchor_logps - (win_probabilities.to(logps.dtype) - baseline) / beta).square().sum(-1)


class SPPO(AnchoredObjective):
    """Self-play preference optimization; with `proximal` > 0, PR-SPPO.

    Plain SPPO holds the policy near the policy that sampled the round: use it with
    `reference_refresh: {alpha: 1.0, unit: round}`.

    Args:
        policy: The language model to train.
        beta: 1/η; 1e-3 in the authors' code.
        hard_labels: Use 1 for the chosen and 0 for the rejected response of a pair, as TRL does, instead of the win
            probabilities against all K responses of the prompt.
        estimate_baseline: Estimate the constant c(x) from the K responses instead of ½; needs whole groups (Listwise).
    """

    formula = "Σ (log π/anchor − (P(y≻π_s) − c)/β)²"

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        beta: float = 1e-3,
        hard_labels: bool = False,
        estimate_baseline: bool = False,
        **kwargs: Any,
    ):
        super().__init__(policy, beta=beta, **kwargs)
        self.save_hyperparameters(ignore=["optimizer"])
        self.hard_labels = hard_labels
        self.estimate_baseline = estimate_baseline
        if hard_labels and estimate_baseline:
            raise UserError(
                "model.estimate_baseline=true needs win probabilities of K responses. Leave hard_labels out."
            )

    def data_needs(self) -> DataNeeds:
        needs = super().data_needs()
        return replace(
            needs,
            takes_groups=not self.hard_labels,
            reads_win_probabilities=not self.hard_labels,
            needs_whole_groups=self.estimate_baseline,
            reads_sampler=needs.reads_sampler or self.estimate_baseline,
        )

    def loss(self, logps: Tensor, anchor_logps: Tensor, beta: float, batch: PreferenceBatch) -> Tensor:
        wins = self._wins(logps, batch)
        baseline = self._baseline(anchor_logps, batch.sampler_logps, wins, beta)
        return sppo_loss(logps, anchor_logps, win_probabilities=wins, beta=beta, baseline=baseline)

    def loss_at_anchor(self, beta: float, batch: PreferenceBatch) -> float:
        """The mean over prompts of Σ ((P − c)/β)²."""
        wins = self._wins(batch.lengths, batch)
        zeros = torch.zeros_like(wins)
        baseline = self._baseline(zeros, zeros, wins, beta)
        return sppo_loss(zeros, zeros, win_probabilities=wins, beta=beta, baseline=baseline).mean().item()

    def _wins(self, like: Tensor, batch: PreferenceBatch) -> Tensor:
        """P(y≻π_s) of each response, [B, K]."""
        if self.hard_labels:
            check_shape("responses", like, "B", 2)
            return 1 - torch.arange(2, device=like.device).float().expand(like.shape)
        if batch.win_probabilities is None:
            raise UserError(
                "SPPO needs win probabilities. Use data with rewards of K responses (OnPolicyPairs), or set "
                "model.hard_labels=true."
            )
        return batch.win_probabilities

    def _baseline(
        self, anchor_logps: Tensor, sampler_logps: Tensor | None, wins: Tensor, beta: float
    ) -> Tensor | float:
        """The constant c, [B] if it is estimated."""
        if not self.estimate_baseline:
            return 0.5
        if sampler_logps is None:
            raise UserError(
                "model.estimate_baseline=true needs recorded log-probabilities of the sampler. Use OnPolicyPairs."
            )
        return sppo_baseline(anchor_logps, sampler_logps, win_probabilities=wins, beta=beta)
