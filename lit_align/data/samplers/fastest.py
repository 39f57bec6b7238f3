"""The choice of `data.sampler: auto`."""

import importlib.util

from lightning.pytorch import Trainer

from lit_align.data.samplers.base import Sampler
from lit_align.data.samplers.generate import GenerateSampler
from lit_align.data.samplers.vllm import VLLMSampler


def fastest_sampler(trainer: Trainer) -> Sampler:
    """The fastest sampler that is installed and works with the trainer's processes on its device.

    docs/speed.md has the figures of CPUs; on GPUs the two have not been compared.
    """
    on_gpu = trainer.strategy.root_device.type == "cuda"
    if on_gpu and trainer.world_size == 1 and importlib.util.find_spec("vllm") is not None:
        return VLLMSampler()
    return GenerateSampler()
