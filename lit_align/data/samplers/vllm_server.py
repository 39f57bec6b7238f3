"""`VLLMServerSampler`: a vLLM server on other devices or other machines, which `lit-align serve` starts.

A round begins with its weights: the server finishes what it is doing and pauses; the training processes gather one
weight at a time, and the first sends it to the server's workers (`transfer.py`); the workers prove that they have the
policy's weights; the server forgets its cache and resumes. Each process then sends the prompts of its own batches.
"""

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

import torch
from torch import Tensor

from lit_align import __version__
from lit_align.console import print_line
from lit_align.data.samplers.base import EngineLost, Sampler, whole_weights
from lit_align.data.samplers.transfer import Sender, address_towards
from lit_align.data.samplers.vllm_client import RESTART, VLLMClient, WorkerState
from lit_align.data.samplers.vllm_options import (
    Completion,
    GenerateOptions,
    SeededPrompt,
    complete_all,
    seeded_prompts,
)
from lit_align.data.samplers.weights import add_sums, weight_sums
from lit_align.data.sampling import Response, SampleRequest
from lit_align.dtypes import dtype_name
from lit_align.errors import UserError, amount, check_address, check_number
from lit_align.policy import Policy
from lit_align.sharding import first_with_all, largest, on_first

URL_VARIABLE = "LIT_ALIGN_VLLM_URL"
ATTEMPTS = 3
"""How often the weights are sent for one batch before the server counts as broken."""
REQUESTS_AT_ONCE = 256
"""Requests of one process that the server has at the same time."""

T = TypeVar("T")


class VLLMServerSampler(Sampler):
    """A vLLM server on other GPUs or other machines, for any number of training processes; run by us on CPUs only.

    Start the server with `lit-align serve` and the same configuration, in a private network only: everybody who reaches
    the server controls it. Weights are gathered and sent one at a time, so that no training process needs them all. If
    the server dies, restarts or takes other weights, the round waits for it, sends the weights again, and continues;
    stored responses are not sampled again. Each sample has its own seed: sampling a batch again on the same machines
    has given the same bytes, which vLLM does not promise.

    Args:
        url: Address of the server, http://HOST:PORT. null reads the environment variable LIT_ALIGN_VLLM_URL.
        token_variable: Environment variable with the server's API key, if it has one.
        tensor_parallel: Devices that share the model; `lit-align serve` starts the server with as many.
        memory: Share of each device's memory that the server may use, of the machine's on CPUs.
        wait_minutes: How long to wait for a server that does not answer.
    """

    streams_weights = True
    samples_ahead = True

    def __init__(
        self,
        url: str | None = None,
        token_variable: str = "VLLM_API_KEY",
        tensor_parallel: int = 1,
        memory: float = 0.4,
        wait_minutes: float = 10.0,
    ):
        if url is not None:
            _check_url("data.sampler.url", url)
        check_number("data.sampler.tensor_parallel", tensor_parallel, least=1)
        check_number("data.sampler.wait_minutes", wait_minutes, least=0)
        if not 0 < memory < 1:
            raise UserError(f"data.sampler.memory={memory} must be in (0, 1), a share of the memory. Change it.")
        self.url = url
        self.token_variable = token_variable
        self.tensor_parallel = tensor_parallel
        self.memory = memory
        self.wait_minutes = wait_minutes
        self._token = ""  # names the weights of this round on the server
        self._prepared_for: tuple[torch.dtype, int] | None = None

    @property
    def address(self) -> str:
        """The server's address.

        Raises:
            UserError: it is given neither as an option nor in the environment, or is not an address.
        """
        if self.url is not None:
            return self.url
        url = os.environ.get(URL_VARIABLE, "")
        if not url:
            raise UserError(
                f"data.sampler.url is not set, nor is the environment variable {URL_VARIABLE}. Set one of them to the "
                "address of the vLLM server, http://HOST:PORT."
            )
        _check_url(URL_VARIABLE, url)
        return url

    @property
    def client(self) -> VLLMClient:
        return VLLMClient(self.address, os.environ.get(self.token_variable, ""), timeout=600)

    # --- weights ---

    def prepare(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        client = self.client
        for attempt in range(1, ATTEMPTS + 1):
            self._wait(client)
            try:
                super().prepare(policy, dtype, longest)
                on_first(client.resume)
            except EngineLost as error:
                if attempt == ATTEMPTS:
                    raise UserError(f"{error}, {ATTEMPTS} times in a row. Look at its own messages.") from error
                print_line(f"  {error}; its weights are sent again.")
            else:
                self._prepared_for = dtype, longest
                return

    def load(self, policy: Policy, dtype: torch.dtype, longest: int) -> None:
        """Pause the server and send it the policy's current weights; every process calls it."""
        client = self.client
        state = on_first(client.state)
        check_server(client, state, dtype, longest)
        on_first(client.pause)
        self._token = on_first(lambda: secrets.token_hex(8))
        first_with_all(whole_weights(policy, dtype), lambda weights: self._send(weights, state, policy.device))

    def _send(self, weights: Iterator[tuple[str, Tensor]], state: WorkerState, device: torch.device) -> None:
        client = self.client
        sender = Sender(address_towards(*client.address), state.workers, device)
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(client.call, "policy_receive", transfer=asdict(sender.transfer), token=self._token)
            try:
                sender.send(weights, lambda: received.result() if received.done() else None)
            except RuntimeError as error:
                raise EngineLost(f"{client.name} has stopped receiving the weights: {error}") from None
            for failure in filter(None, received.result()):
                raise UserError(f"{client.name} cannot take the policy's weights: {failure}. Use GenerateSampler.")

    def weights_match(self, weights: Iterable[tuple[str, Tensor]]) -> bool:
        return first_with_all(iter(weights), self._match)

    def _match(self, weights: Iterator[tuple[str, Tensor]]) -> bool:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.call, "policy_sums")
            ours = weight_sums(weight for _, weight in weights)
        theirs = asked.result()
        self._check_token()  # nobody has sent others meanwhile
        return None not in theirs and add_sums(theirs) == ours

    def _check_token(self) -> None:
        """Check that the server has had no other weights since it took these.

        Raises:
            EngineLost: it has, or has restarted.
        """
        if set(self.client.call("policy_token")) != {self._token}:
            raise EngineLost(f"{self.client.name} has other weights than this round's (does another run use it?)")

    def _wait(self, client: VLLMClient) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it does not, for `wait_minutes`.
        """
        deadline, said = time.monotonic() + 60 * self.wait_minutes, False
        while not on_first(client.is_up):
            if not said:
                print_line(f"  waiting for {client.name}, up to {amount(self.wait_minutes, 'minutes')}.")
            if on_first(lambda: time.monotonic() > deadline):
                raise UserError(
                    f"{client.name} has not answered for {amount(self.wait_minutes, 'minutes')} "
                    f"(data.sampler.wait_minutes). "
                    f"{RESTART}; to continue the run, repeat its command: the responses sampled so far are kept."
                )
            said = True
            time.sleep(1)

    # --- samples ---

    def sample(self, policy: Policy, request: SampleRequest) -> list[list[Response]]:
        options = GenerateOptions.of(request)
        tokens = complete_all(self._complete, seeded_prompts(request), options, policy.tokenizer)
        self._check_token()
        return request.grouped(tokens, policy.tokenizer)

    def sample_in_turn(self, policy: Policy, request: SampleRequest | None) -> list[list[Response]]:
        assert self._prepared_for is not None, "call prepare before sampling"
        responses: list[list[Response]] | None = None
        lost: EngineLost | None = None
        for _ in range(ATTEMPTS):
            lost = None
            try:
                if responses is None:
                    responses = super().sample_in_turn(policy, request)
            except EngineLost as error:
                lost = error
            if not largest(lost is not None):
                assert responses is not None
                return responses
            print_line(f"  {lost or f'{self.client.name} was lost by another process'}; sampling waits for it.")
            self.prepare(policy, *self._prepared_for)
        raise UserError(
            f"{self.client.name} was lost {ATTEMPTS} times in one batch{f'; {lost}' if lost else ''}. Look at its "
            "own messages, then repeat the command: the responses sampled so far are kept."
        )

    def _complete(self, prompts: Sequence[SeededPrompt], options: GenerateOptions) -> list[Completion]:
        client, fields = self.client, options.arguments()
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            pending = [pool.submit(client.complete, prompt, seed, fields) for prompt, seed in prompts]
            return results(pending)

    def release(self) -> None:
        """Do nothing: the server keeps its memory."""


def results(pending: Sequence[Future[T]]) -> list[T]:
    """The results of calls; after the first failure, those that have not begun are cancelled."""
    try:
        return [future.result() for future in pending]
    except BaseException:
        for future in pending:
            future.cancel()
        raise


def _check_url(option: str, url: str) -> None:
    check_address(option, url, "http://HOST:PORT", "data.sampler.token_variable")


def check_server(client: VLLMClient, state: WorkerState, dtype: torch.dtype, longest: int) -> None:
    """Check that a server computes as the round needs it.

    Raises:
        UserError: it has another type, or too short a context, or more than tensor parallelism.
    """
    wanted = dtype_name(dtype)
    if state.version != __version__:
        problem = f"has lit_align {state.version}, and this is {__version__}"
    elif state.dtype != wanted:
        asked = f"data.sampling_dtype asks for {wanted} (name the type there: auto depends on the machine)"
        problem = f"computes in {state.dtype}, and {asked}"
    elif state.longest < longest:
        problem = f"takes {state.longest} tokens, and the longest prompt and its response have {longest}"
    elif state.other_parallelism:
        problem = "has pipeline or data parallelism, which is not supported"
    else:
        return
    raise UserError(f"{client.name} {problem}. {RESTART}.")
