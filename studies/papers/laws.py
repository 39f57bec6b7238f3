"""What the exactly solvable problem (`benchmarks/bandit.py`) predicts for the arms, and what the language model shows.

    rounds     Each round of (PR-)DPO ends at its optimum, log π_t/π_ref = c_t r + const, c_t = (1/β)(1 − (λ/(β+λ))^t);
               c_t = 1/β with a fixed reference and λ = 0, and t/β if each round's reference is the last policy.
               Predicted is √KL(π_t‖π_ref) as a share of that after the last round, on the bandit's five responses.
    syncs      Right after a hard refresh, policy and reference are one, and the gradient scale |∂loss/∂log π(y_w)| is
               β/2 (DPO), 1/β (IPO). Between refreshes it falls. Predicted and measured are shares of that scale.

A language model that takes 8 steps per round does not reach a round's optimum, so its rounds need not follow the law.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.bandit import BETA, REFERENCE, REWARDS, iterates
from studies.papers.results import Result

ROUNDS = 4
ITERATES = {
    "iterative_dpo": (0.0, False),
    "pr_dpo_1": (1.0, False),
    "pr_dpo_4": (4.0, False),
    "moving_dpo": (0.0, True),
}
FULL_SCALE = {"dpo": lambda beta: beta / 2, "ipo": lambda beta: 1 / beta}
TAU = 13


class Law(NamedTuple):
    """One line: a prediction, and the measured values of the seeds."""

    arm: str
    quantity: str
    predicted: float | None
    measured: list[float]


def predicted_shares(proximal: float, moving: bool) -> list[float]:
    """√KL(π_t‖π_ref) of the bandit after rounds 1, 2, ..., as shares of that after the last round."""
    strengths = iterates(proximal * BETA, moving_reference=moving).strength[1 : ROUNDS + 1]
    kls = []
    for strength in strengths:
        policy = (REFERENCE + strength * REWARDS).log_softmax(0)
        kls.append(float((policy.exp() * (policy - REFERENCE)).sum()))
    return [float(np.sqrt(kl / kls[-1])) for kl in kls]


def laws(results: Mapping[str, list[tuple[Result, float]]]) -> Iterator[Law]:
    """All predictions with their measurements.

    Args:
        results: The counted results of each arm, each with the KL at its end.
    """
    for arm, (proximal, moving) in ITERATES.items():
        predicted = predicted_shares(proximal, moving)
        for t in range(1, ROUNDS):
            measured = [
                float(np.sqrt(max(0.0, result.series["kl_by_round"][t]) / end))
                for result, end in results.get(arm, [])
                if end > 0
            ]
            yield Law(arm, f"√KL after round {t} / after round {ROUNDS}", predicted[t - 1], measured)
    for loss, full_scale in FULL_SCALE.items():
        for arm, places, predicted in ((f"hard_{loss}", (TAU, 2 * TAU), 1.0), (f"offline_{loss}", (-1,), None)):
            measured = [
                float(np.mean([result.series["gradient_scale"][place] for place in places])) / full_scale(result.beta)
                for result, _ in results.get(arm, [])
            ]
            where = "right after a refresh" if predicted else "at the last step"
            yield Law(arm, f"gradient scale {where} / at the start", predicted, measured)
