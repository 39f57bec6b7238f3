"""vLLM's engine, and the loop that serves it in a process of its own.

On CPUs vLLM multiplies by packed copies of the weights and drops what it packed; of tied weights it then never packs
the copy of the output head again. Here it keeps the weights, and packs them after each load. The proof covers both: the
sums of all weights, and the products of each packed layer with unit vectors, which are columns of its weight.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.data.samplers.weights import weight_sums
from lit_align.errors import first_line

CHECKED_COLUMNS = 64
"""Columns of each packed weight that the proof reads."""


@dataclass(frozen=True)
class EngineOptions:
    """How to start an engine."""

    model: str  # folder with the configuration and the tokenizer; weights come later
    dtype: str
    memory: float  # share of the device's memory
    longest: int  # most tokens of a prompt and its response


@dataclass(frozen=True)
class GenerateOptions:
    """How to sample; the fields of vLLM's SamplingParams that all responses share."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    stop_token_ids: list[int]


@dataclass(frozen=True)
class Failure:
    """The answer to a call that raised an exception."""

    message: str


class Engine:
    """vLLM's engine in this process."""

    def __init__(self, options: EngineOptions):
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        self._sleeps = not current_platform.is_cpu()  # vLLM has no sleep mode on CPUs
        self._packing = _Packing() if current_platform.is_cpu() else None
        # without chunks: on CPUs a seed for a prompt in chunks ends vLLM ("CPU Generator does not use offset")
        whole_prompts = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(options.longest, 4096),
        }
        self._llm: Any = LLM(
            model=options.model,
            load_format="dummy",
            dtype=options.dtype,
            gpu_memory_utilization=options.memory,  # of the machine's memory on CPUs
            max_model_len=options.longest,
            seed=0,
            **({"enable_sleep_mode": True} if self._sleeps else whole_prompts),
        )
        if self._llm.llm_engine.model_config.use_mla or any(weight.ndim > 2 for weight in self._model.parameters()):
            raise ValueError("mixtures of experts, convolutions and latent attention are not supported")
        if self._sleeps:
            self._llm.sleep(level=2)

    @property
    def _model(self) -> Any:
        return self._llm.apply_model(lambda model: model)[0]

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take weights under the names that transformers gives them."""
        try:
            if self._sleeps:
                self._llm.wake_up(tags=["weights"])
            self._model.load_weights(weights)
        finally:
            for _ in weights:  # after a failure, read what the sender still sends
                pass
        if self._packing:
            self._packing.pack()
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])

    def weight_sums(self) -> tuple[int, int] | None:
        """`weight_sums` of the weights; None if a layer multiplies by others."""
        if self._packing and not all(map(multiplies_by_its_weight, self._packing.layers)):
            return None
        return weight_sums(self._model.parameters())

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], options: GenerateOptions) -> list[list[int]]:
        """The tokens of one response to each prompt."""
        # keys and values of old weights are wrong; those of the last batch would make this one depend on it
        self._llm.reset_prefix_cache()
        responses = self._responses(prompts, seeds, options)
        # where a prompt ends within a character, vLLM reads its text as part of the response
        if wrong := [i for i, response in enumerate(responses) if self._stopped_at_nothing(response)]:
            without = replace(options, stop=[])
            again = self._responses([prompts[i] for i in wrong], [seeds[i] for i in wrong], without)
            for i, response in zip(wrong, again, strict=True):
                responses[i] = response
        return [list(response.token_ids) for response in responses]

    def _responses(self, prompts: Sequence[list[int]], seeds: Sequence[int], options: GenerateOptions) -> list[Any]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        shared = vars(options) | {
            "ignore_eos": True,  # only stop_token_ids end a response
            "include_stop_str_in_output": True,  # `cut` removes it from the text, and keeps its tokens
        }
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(seed=seed, **shared) for seed in seeds],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]

    def _stopped_at_nothing(self, response: Any) -> bool:
        """Whether vLLM ended a response at a stop string that the response does not hold."""
        if not isinstance(response.stop_reason, str):
            return False
        return response.stop_reason not in self._llm.get_tokenizer().decode(
            response.token_ids, skip_special_tokens=True
        )

    def sleep(self) -> None:
        """Free weights and cache, on GPUs."""
        if self._sleeps:
            self._llm.sleep(level=2)


class _Packing:
    """Packs the weights of linear layers for vLLM's CPU kernels, and keeps the plain weights."""

    def __init__(self) -> None:
        from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

        self.layers: list[Any] = []
        self._pack: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm
        utils.dispatch_cpu_unquantized_gemm = self._keep
        utils.check_cpu_sgl_kernel = lambda *shape: False  # these kernels replace a layer's bias, too

    def _keep(self, layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear
        self.layers.append(layer)

    def pack(self) -> None:
        for layer in self.layers:
            self._pack(layer, remove_weight=False)


def multiplies_by_its_weight(layer: Any) -> bool:
    """Whether a packed layer multiplies by the weight that it has now.

    A product with a unit vector is exact: one column of the weight plus zeros.
    """
    weight = layer.weight
    columns = torch.linspace(0, weight.shape[1] - 1, CHECKED_COLUMNS).long()
    units = torch.zeros(CHECKED_COLUMNS, weight.shape[1], dtype=weight.dtype)
    units[torch.arange(CHECKED_COLUMNS), columns] = 1
    return torch.equal(layer.cpu_linear(units, weight, None), weight[:, columns].T)


def send_weight(connection: Connection, name: str, weight: Tensor) -> None:
    """Send a weight to `received_weights`."""
    connection.send((name, weight.shape, weight.dtype))
    connection.send_bytes(_octets(weight.cpu().contiguous()))


def received_weights(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    """The weights that `send_weight` sends, until None is sent."""
    while (header := connection.recv()) is not None:
        name, shape, dtype = header
        weight = torch.empty(shape, dtype=dtype)
        connection.recv_bytes_into(_octets(weight))
        yield name, weight


def _octets(weight: Tensor) -> memoryview:
    return memoryview(weight.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def serve(file_descriptor: int) -> None:
    """Start the engine that the first message describes, and answer calls until the other process ends.

    A call is the name of a method of `Engine` and its arguments; the weights of `load` follow it.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(file_descriptor)
    engine: Engine | None = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            os._exit(0)  # without clean-up: vLLM holds nothing that outlives the process
        answer: Any = None
        try:
            if engine is None:
                engine = Engine(*arguments)
            elif name == "load":
                engine.load(received_weights(connection))
            else:
                answer = getattr(engine, name)(*arguments)
        except Exception as error:
            traceback.print_exc()
            answer = Failure(f"{type(error).__name__}: {first_line(error)}")
        connection.send(answer)


def _end_with_parent() -> None:
    """End this process when standard input closes: the other process has closed it, or has died."""
    sys.stdin.buffer.read()
    os._exit(0)
