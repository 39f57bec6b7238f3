"""`GenerateSampler`: a copy of the policy samples a batch of prompts at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.data.generation import sample_responses
from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.weights import same_bits
from lit_align.data.sampling import Response, SampleRequest
from lit_align.dtypes import fast_dtype
from lit_align.policy import Policy


class CopySampler(Sampler):
    """A sampler that runs a copy of the policy in transformers."""

    _model: PreTrainedModel | None = None

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        self._model = policy.merged_copy(dtype)

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        own = dict(self.model.named_parameters())
        same = [name in own and same_bits(own.pop(name), weight) for name, weight in weights]
        return all(same) and not own

    def release(self) -> None:
        self._model = None

    @property
    def model(self) -> PreTrainedModel:
        assert self._model is not None, "call load before sample"
        return self._model


class GenerateSampler(CopySampler):
    """A copy of the policy in transformers, a batch of prompts at once (`generation.py`).

    Each sample has its own random stream: equal weights and batches give equal bytes, regardless of which process
    samples them, and how often.
    """

    samples_ahead = True

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        return sample_responses(self.model, policy.tokenizer, request)


@contextmanager
def sampling_copy(policy: Policy) -> Iterator[Sampler]:
    """Within this context, a sampler with a copy of the policy in the fastest type; every process must call it."""
    sampler = GenerateSampler()
    sampler.load(policy, fast_dtype(torch.bfloat16), longest=0)  # a copy takes any length
    yield sampler
    sampler.release()
