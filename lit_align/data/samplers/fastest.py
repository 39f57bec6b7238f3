"""The choice of `data.sampler: auto`."""

import importlib.util

import torch

from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import GenerateSampler
from lit_align.data.samplers.vllm import VLLMSampler


def fastest_sampler(processes: int, device: torch.device) -> Sampler:
    """The fastest sampler that is installed and works with this many processes on this device.

    docs/speed.md has the figures of CPUs; on GPUs the two have not been compared.
    """
    if processes == 1 and device.type == "cuda" and importlib.util.find_spec("vllm") is not None:
        return VLLMSampler()
    return GenerateSampler()
