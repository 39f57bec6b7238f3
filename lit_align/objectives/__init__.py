"""The objectives: a pure loss function and a LightningModule in each file.

A proximal form (PR-DPO, PR-IPO, ...) is the same class with `proximal` > 0; a trust-region form (TR-DPO,
TR-IPO, ...) is the same class beside a `ReferenceRefresh` callback.
"""

from lit_align.objectives.anchor import effective_anchor
from lit_align.objectives.base import AnchoredObjective, PreferenceObjective
from lit_align.objectives.dpo import DPO, dpo_loss
from lit_align.objectives.ipo import IPO, ipo_loss

__all__ = [
    "DPO",
    "IPO",
    "AnchoredObjective",
    "PreferenceObjective",
    "dpo_loss",
    "effective_anchor",
    "ipo_loss",
]
