"""The step-0 check: while the policy still equals its anchor, margins are 0 and the loss has its closed form.

It runs on the first training batch, with the same packing, shards and mixed precision as training. A live reference
of the policy's dtype must agree exactly. Rounding is allowed for recorded log-probabilities, for a reference of another
dtype, and for a reference that may sum in another order: compiled, or a past adapter.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.errors import UserError, decimal
from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy

HALF_PRECISION_ERROR = 0.05
"""Approximate rounding of one token's log-probability in half precision, in nats."""


class Bound(NamedTuple):
    """The largest difference of policy and anchor that rounding explains."""

    nats: float  # per response
    reason: str


EXACT = Bound(0.0, "live reference")


def rounding_of_batches(longest: float, full_precision: bool) -> float:
    """The difference of a response's log-probabilities in two batches that rounding explains, in nats.

    In half precision each token's rounding differs, and for a response of n tokens the differences add up to about √n
    of one. The bound is four times that.

    Args:
        longest: Tokens of the longest response.
        full_precision: Whether weights and computation have at least 32 bits.
    """
    return 1e-3 if full_precision else 4 * HALF_PRECISION_ERROR * longest**0.5


def other_type_bound(batch: PreferenceBatch) -> Bound:
    """The bound for a reference whose weights have another dtype than the policy's."""
    return Bound(HALF_PRECISION_ERROR * batch.lengths.max().item(), "reference of another dtype")


def rounding_bound(
    policy: Policy, logps: Tensor, batch: PreferenceBatch, *, full_precision: bool, reason: str
) -> Bound:
    """The bound for the policy's own log-probabilities, computed in another batch or in another order.

    In half precision it is that of `rounding_of_batches`, or four times the difference measured on this batch when each
    of its examples is computed alone.

    Args:
        logps: [B, K], the policy's log-probabilities of the batch.
        full_precision: Whether weights and computation have at least 32 bits.
        reason: Why the anchor is not exact.
    """
    bound = rounding_of_batches(batch.lengths.max().item(), full_precision)
    if full_precision:
        return Bound(bound, reason)
    alone = torch.cat([policy(batch.select(slice(i, i + 1))) for i in range(batch.size)])
    measured = (logps - alone).abs().max().item()
    return Bound(max(bound, 4 * measured), reason)


def check_closed_form(objective: str, at_anchor: float, expected: float) -> None:
    """Check that an objective's `loss_at_anchor` equals its loss at the anchor.

    Raises:
        RuntimeError: they differ: the objective's code is wrong.
    """
    if not math.isclose(at_anchor, expected, rel_tol=1e-4, abs_tol=1e-6):
        raise RuntimeError(f"{objective}.loss at the anchor is {at_anchor}, but loss_at_anchor says {expected}.")


def check_margins(difference: float, bound: Bound, loss: float, expected: float) -> str:
    """Check that policy and anchor agree; returns the line that reports it.

    Args:
        difference: Largest difference of a response's log-probability, in nats.
        loss: The batch's loss.
        expected: Its closed form at the anchor.

    Raises:
        UserError: they differ by more than the bound.
    """
    if not difference <= bound.nats:
        raise UserError(
            "step-0 check: the policy is its own anchor, but a log-probability differs by "
            f"{difference:.3g} nats (bound {bound.nats:.3g}, {bound.reason}) and the loss is {loss:.6g} instead of "
            f"{expected:.6g}. The reference, the recorded log-probabilities or the data's tokens do not belong to "
            "this policy. Name another model.reference.path, or a new data.store."
        )
    margins = "exactly 0" if difference == 0 else f"{difference:.2g} ≤ {bound.nats:.2g} nats"
    return f"loss {decimal(loss, '.4f')} = {decimal(expected, '.4f')} ✓ · margins {margins} ✓ · {bound.reason}"
