"""vLLM's engine, and the loop that serves it in a process of its own."""

import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_align.data.samplers.vllm_options import Completion, GenerateOptions, SeededPrompt, complete_all
from lit_align.data.samplers.vllm_weights import ModelWeights, check_supported
from lit_align.errors import first_line
from lit_align.sharding import drain


@dataclass(frozen=True)
class EngineOptions:
    """How to start an engine."""

    model: str  # folder with the configuration and the tokenizer; weights come later
    dtype: str
    memory: float  # share of the device's memory
    longest: int  # most tokens of a prompt and its response


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
        self._weights = ModelWeights(on_cpu=current_platform.is_cpu())
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
        check_supported(self._llm.llm_engine.model_config, self._model)
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
            self._weights.load(self._model, weights)
        finally:
            drain(weights)
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])

    def weight_sums(self) -> tuple[int, int] | None:
        """`weight_sums` of the weights; None if a layer multiplies by others."""
        return self._weights.sums(self._model)

    def generate(self, prompts: Sequence[SeededPrompt], options: GenerateOptions) -> list[list[int]]:
        """The tokens of one response to each prompt."""
        # keys and values of old weights are wrong; those of the last batch would make this one depend on it
        self._llm.reset_prefix_cache()
        return complete_all(self._complete, prompts, options, self._llm.get_tokenizer())

    def _complete(self, prompts: Sequence[SeededPrompt], options: GenerateOptions) -> list[Completion]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        requests = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in prompts],
            [SamplingParams(seed=seed, **options.arguments()) for _, seed in prompts],
            use_tqdm=False,
        )
        outputs = [request.outputs[0] for request in requests]
        return [Completion(list(output.token_ids), output.stop_reason) for output in outputs]

    def sleep(self) -> None:
        """Free weights and cache, on GPUs."""
        if self._sleeps:
            self._llm.sleep(level=2)


def send_weight(connection: Connection, name: str, weight: Tensor) -> None:
    """Send a weight to `received_weights`."""
    connection.send((name, weight.shape, weight.dtype))
    octets = _octets(weight.cpu().contiguous())
    while octets:
        octets = octets[os.write(connection.fileno(), octets) :]


def received_weights(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    """The weights that `send_weight` sends, until None is sent; each is valid until the next is read."""
    buffer = torch.empty(0, dtype=torch.uint8)  # new memory for each would cost as much as receiving it
    while (header := connection.recv()) is not None:
        name, shape, dtype = header
        size = shape.numel() * dtype.itemsize
        if len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        weight = buffer[:size].view(dtype).view(shape)
        _read(connection.fileno(), _octets(weight))
        yield name, weight


def _read(file_descriptor: int, octets: memoryview) -> None:
    """Fill a buffer. `Connection.recv_bytes_into` copies the bytes three times instead of once."""
    while octets:
        count = os.readv(file_descriptor, [octets])
        if not count:
            raise EOFError
        octets = octets[count:]


def _octets(weight: Tensor) -> memoryview:
    return memoryview(weight.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def serve(file_descriptor: int) -> None:
    """Start the engine that the first message describes, and answer calls until the other process ends.

    A call is the name of a method of `Engine` and its arguments; the weights of `load` follow it.
    """
    tempfile.tempdir = tempfile.mkdtemp(prefix="lit_align_")  # vLLM leaves a file in it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(file_descriptor)
    engine: Engine | None = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            _end()
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
    _end()


def _end() -> NoReturn:
    """End this process at once: of vLLM only files outlive it."""
    shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
    os._exit(0)
