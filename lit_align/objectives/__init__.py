"""The objectives: a pure loss function and a LightningModule in each file.

A proximal form (PR-DPO, PR-IPO, ...) is the same class with `proximal` > 0; a trust-region form (TR-DPO, TR-IPO, ...)
is the same class with a `ReferenceRefresh` callback.

Every loss function raises a ValueError that names an argument whose shape is not the one in its docstring.
"""

from lit_align.objectives._likelihood import sft_loss
from lit_align.objectives.anchor import adapted_proximal, effective_anchor
from lit_align.objectives.anchored import AnchoredObjective
from lit_align.objectives.base import PreferenceObjective
from lit_align.objectives.cpo import CPO, cpo_loss
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.objectives.exo import EXO, exo_loss
from lit_align.objectives.ipo import IPO, ipo_loss
from lit_align.objectives.kto import KTO, kto_loss, kto_z0
from lit_align.objectives.mpo import MPO, mpo_loss
from lit_align.objectives.orpo import ORPO, log1mexp, orpo_loss
from lit_align.objectives.reward_model import RewardModel, bradley_terry_loss
from lit_align.objectives.sft import SFT
from lit_align.objectives.simpo import SimPO, simpo_loss
from lit_align.objectives.sppo import (
    SPPO,
    sppo_baseline,
    sppo_loss,
    win_probabilities_from_pairwise,
    win_probabilities_from_rewards,
)

__all__ = [
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "KTO",
    "MPO",
    "ORPO",
    "SFT",
    "SPPO",
    "AnchoredObjective",
    "PreferenceObjective",
    "RewardModel",
    "SimPO",
    "adapted_proximal",
    "bradley_terry_loss",
    "cpo_loss",
    "dpo_loss",
    "effective_anchor",
    "exo_loss",
    "ipo_loss",
    "kto_loss",
    "kto_z0",
    "log1mexp",
    "mpo_loss",
    "orpo_loss",
    "sft_loss",
    "simpo_loss",
    "sppo_baseline",
    "sppo_loss",
    "win_probabilities_from_pairwise",
    "win_probabilities_from_rewards",
]
