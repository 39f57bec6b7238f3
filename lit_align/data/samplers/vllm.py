"""`VLLMSampler`: vLLM's engine."""

import importlib.util
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_align.data.samplers.base import Sampler, SampleRequest
from lit_align.data.samplers.weights import weight_sums
from lit_align.data.sampling import Response, seed_of
from lit_align.errors import UserError
from lit_align.policy import Policy

_INSTEAD = "use ContinuousBatchingSampler or GenerateSampler"


class VLLMSampler(Sampler):
    """vLLM's engine, on the one GPU that also trains. Not run by us, since vLLM was not available; see the README.

    The engine is created once, without weights. Each round wakes it, loads the policy's weights in place, empties its
    prompt cache, and puts it to sleep again; asleep, it holds neither weights nor cache. Each sample has its own seed,
    but vLLM does not promise equal bytes if a batch is sampled again. Needs `pip install 'lit-align[vllm]'`.

    Args:
        memory: Share of the GPU's memory that the engine may use while it samples; the trained model stays in memory.
    """

    def __init__(self, memory: float = 0.4):
        if not 0 < memory < 1:
            raise UserError(f"data.sampler.memory={memory} must be in (0, 1), a share of the GPU's memory. Change it.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "data.sampler=VLLMSampler needs vllm, which is not installed. Run pip install 'lit-align[vllm]', or "
                f"{_INSTEAD}."
            )
        if not torch.cuda.is_available():
            raise UserError(f"data.sampler=VLLMSampler needs a CUDA GPU, and there is none. Instead {_INSTEAD}.")
        self.memory = memory
        self._engine: Any = None

    def load(self, policy: Policy, dtype: torch.dtype) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                f"data.sampler=VLLMSampler works with one process only. Set trainer.devices=1, or {_INSTEAD}."
            )
        if self._engine is None:
            self._engine = self._start(policy, dtype)
        else:
            self._engine.wake_up(tags=["weights"])
        weights = [(name, value.detach().to(dtype)) for name, value in policy.full_weights()]
        self._engine.apply_model(lambda model: model.load_weights(weights))
        self._engine.wake_up(tags=["kv_cache"])
        self._engine.reset_prefix_cache()  # it was computed with the old weights

    def _start(self, policy: Policy, dtype: torch.dtype) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # the engine runs in this process, so that it can take the weights
        )
        from vllm import LLM  # type: ignore[import-not-found]

        with tempfile.TemporaryDirectory() as folder:
            policy.model.config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            engine = LLM(
                model=folder,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=self.memory,
                enable_sleep_mode=True,
                seed=0,
            )
        engine.sleep(level=2)
        engine.wake_up(tags=["weights"])
        return engine

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        theirs = self._engine.apply_model(lambda model: weight_sums(model.parameters()))[0]
        return theirs == weight_sums(weight for _, weight in weights)

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        options = {
            "max_tokens": request.sampling.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": request.sampling.top_k or -1,
            "stop": request.sampling.stop,
            "include_stop_str_in_output": True,  # `cut` removes it from the text, and keeps its tokens
            "stop_token_ids": list(request.end_ids),
        }
        seeded = [
            (prompt, seed_of(key, k))
            for prompt, key in zip(request.prompts, request.keys, strict=True)
            for k in range(request.count)
        ]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in seeded],
            [SamplingParams(seed=seed, **options) for _, seed in seeded],
            use_tqdm=False,
        )
        return request.grouped([list(each.outputs[0].token_ids) for each in outputs], policy.tokenizer)

    def release(self) -> None:
        if self._engine is not None:
            self._engine.sleep(level=2)  # neither weights nor cache
