"""Data modules and their parts: formats, sampling, scorers, pairing, the store of rounds."""

from typing import TYPE_CHECKING

from lit_align.lazy import lazy_exports

if TYPE_CHECKING:
    from lit_align.data.offline_pairs import OfflinePairs
    from lit_align.data.on_policy import OnPolicyPairs
    from lit_align.data.pairing import AllPairs, Best, BestRandom, BestWorst, Listwise, PairingRule
    from lit_align.data.samplers.base import Sampler
    from lit_align.data.samplers.continuous import ContinuousBatchingSampler
    from lit_align.data.samplers.generate import GenerateSampler
    from lit_align.data.samplers.vllm import VLLMSampler
    from lit_align.data.samplers.vllm_server import VLLMServerSampler
    from lit_align.data.sampling import SampleRequest, Sampling
    from lit_align.data.scorers.base import PairwiseScorer, Scorer, Scores
    from lit_align.data.scorers.classifier import SequenceClassificationScorer
    from lit_align.data.scorers.endpoint import Endpoint
    from lit_align.data.scorers.ensemble import EnsembleScorer
    from lit_align.data.scorers.function import FunctionScorer, PairwiseFunctionScorer
    from lit_align.data.scorers.judges import GradingJudge, PairwiseJudge
    from lit_align.logprobs import PreferenceBatch

__all__ = [
    "AllPairs",
    "Best",
    "BestRandom",
    "BestWorst",
    "ContinuousBatchingSampler",
    "Endpoint",
    "EnsembleScorer",
    "FunctionScorer",
    "GenerateSampler",
    "GradingJudge",
    "Listwise",
    "OfflinePairs",
    "OnPolicyPairs",
    "PairingRule",
    "PairwiseFunctionScorer",
    "PairwiseJudge",
    "PairwiseScorer",
    "PreferenceBatch",
    "SampleRequest",
    "Sampler",
    "Sampling",
    "Scorer",
    "Scores",
    "SequenceClassificationScorer",
    "VLLMSampler",
    "VLLMServerSampler",
]

__getattr__ = lazy_exports(__name__)
