"""The effective anchor, which turns a base objective into its proximal (PR) form.

    log anchor = log π_ref + λ/(β+λ) · (log π_s − log π_ref),      β_eff = β + λ

The policy is held near the reference (weight β) and near the sampler π_s that produced this round's responses
(weight λ, `proximal`). Up to a constant per prompt, this costs one KL of weight β + λ to the geometric mixture of
the two:

    β KL(π‖π_ref) + λ KL(π‖π_s) = (β+λ) [KL(π‖π̃) − log Σ_y π_ref^a π_s^(1−a)]
    π̃ ∝ π_ref^a π_s^(1−a),      a = β/(β+λ)

So every loss that depends on log-probabilities only through log π − log anchor gets its PR form here: PR-DPO,
PR-IPO, PR-SPPO, PR-EXO (Iterative PRPO, TMLR submission 7047), and also PR-KTO. The mixture is taken between the
log-probabilities of whole responses and is not normalised: the missing log Z̃(x) cancels in every pairwise or
listwise loss, and SPPO's baseline carries it. A mixture renormalised at each token would be a different quantity.

The quotient (β log π_ref + λ log π_s)/(β+λ) would round even if one weight is 0. With the form above, λ = 0 gives
the base objective bit for bit.

λ can be adapted to a target KL(π‖π_s) per round, in nats (`adapted_proximal`).
"""

import math

import torch
from torch import Tensor

from lit_align.errors import UserError
from lit_align.objectives._checks import check_shape


def effective_anchor(
    reference_logps: Tensor | None, sampler_logps: Tensor | None, beta: float, proximal: float
) -> tuple[Tensor, float]:
    """The anchor's log-probabilities and its weight.

    Args:
        reference_logps: log π_ref of each response, any shape; may be None if `beta` is 0.
        sampler_logps: log π_s of each response, the same shape; may be None if `proximal` is 0.
        beta: Weight of the KL to the reference, ≥ 0.
        proximal: λ, weight of the KL to the sampler, ≥ 0. 0 gives the base objective, bitwise.

    Returns:
        The anchor's log-probabilities, and β_eff = `beta` + `proximal`.

    Raises:
        UserError: a weight is below 0, both are 0, or one above 0 lacks its log-probabilities.
    """
    if not (beta >= 0 and proximal >= 0 and beta + proximal > 0):
        raise UserError(
            f"beta={beta} and proximal={proximal} must both be ≥ 0, and one > 0: otherwise nothing holds the policy. "
            "Raise one."
        )
    if proximal > 0 and sampler_logps is None:
        raise UserError(
            f"proximal={proximal} has no effect because the data has no log-probabilities of the sampler. "
            "Use data that records them (OnPolicyPairs), or set proximal=0."
        )
    if beta > 0 and reference_logps is None:
        raise UserError(
            f"beta={beta} has no effect because there are no log-probabilities of a reference. "
            "Give the objective a reference, use data that records them, or set beta=0."
        )
    if proximal == 0 or sampler_logps is None:
        assert reference_logps is not None
        return reference_logps, beta
    if beta == 0 or reference_logps is None:
        return sampler_logps, proximal
    check_shape("sampler_logps", sampler_logps, *reference_logps.shape)
    dtype = torch.promote_types(reference_logps.dtype, sampler_logps.dtype)  # recorded ones are float32
    return torch.lerp(reference_logps.to(dtype), sampler_logps.to(dtype), proximal / (beta + proximal)), beta + proximal


def adapted_proximal(proximal: float, kl: float, target: float) -> float:
    """λ of the next round: larger if the policy moved further from its sampler than the target, smaller if less far.

        λ ← λ·(1 + ½·clip(KL/target − 1, −1, 1))

    This is the proportional controller of Ziegler et al. 2019 (arXiv 1909.08593), applied per round instead of per
    batch, with a gain of ½ instead of 0.1 and errors clipped at ±1 instead of ±0.2. The KL of an exact step falls as
    (β+λ)⁻²: near the target, a gain of ½ corrects the error in one round, and a gain of 1 would oscillate.

    Args:
        proximal: λ of the round that has just ended.
        kl: KL(π‖π_s) at its end, in nats per response, estimated from all responses of the round, not from selected
            pairs (`metrics.kl_from_sampler`).
        target: The KL that a round should reach.

    Raises:
        UserError: the KL is NaN.
    """
    if math.isnan(kl):
        raise UserError(
            f"proximal_target={target:g} cannot be held: KL(policy‖sampler) of this round is NaN, so that the policy "
            "has diverged. Lower the learning rate, or clip gradients (trainer.gradient_clip_val)."
        )
    return proximal * (1 + min(max(kl / target - 1, -1.0), 1.0) / 2)
