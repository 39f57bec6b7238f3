"""The choice of `data.sampler: auto`."""

import importlib.util

from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import GenerateSampler
from lit_align.data.samplers.vllm import VLLMSampler


def fastest_sampler(processes: int) -> Sampler:
    """The fastest sampler that is installed and works with this many processes (docs/speed.md has the figures)."""
    if processes == 1 and importlib.util.find_spec("vllm") is not None:
        return VLLMSampler()
    return GenerateSampler()
