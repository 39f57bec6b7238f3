"""Data modules, and what they are made of: formats, sampling, scorers, pairing, the store of rounds."""

from lit_align.data.offline_pairs import OfflinePairs
from lit_align.data.on_policy import OnPolicyPairs
from lit_align.data.pairing import BestWorst, Listwise, PairingRule
from lit_align.data.sampling import Sampling
from lit_align.data.scorers import FunctionScorer, Scorer, SequenceClassificationScorer

__all__ = [
    "BestWorst",
    "FunctionScorer",
    "Listwise",
    "OfflinePairs",
    "OnPolicyPairs",
    "PairingRule",
    "Sampling",
    "Scorer",
    "SequenceClassificationScorer",
]
