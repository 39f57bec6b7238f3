"""HTTP calls of a vLLM server that `lit-align serve` has started."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from lit_align.data.samplers.base import EngineLost
from lit_align.data.samplers.vllm_options import Completion
from lit_align.errors import UserError, first_line

MODEL = "policy"
"""The name of the served model."""
RESTART = "Start it with lit-align serve and this configuration"


@dataclass(frozen=True)
class WorkerState:
    """How a server computes; all its workers agree."""

    version: str  # of lit_align
    dtype: str
    longest: int  # most tokens of a prompt and its response
    workers: int
    other_parallelism: bool  # beside tensor parallelism


class VLLMClient:
    """Calls a server's endpoints.

    A server that does not answer, or answers with a failure of its own, raises `EngineLost`; one that refuses a call
    raises a `UserError`.

    Args:
        url: Its address.
        token: Its API key; empty if it has none.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, token: str, timeout: float):
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._timeout = timeout

    @property
    def name(self) -> str:
        """The server in messages."""
        return f"the vLLM server at {self.url}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def is_up(self) -> bool:
        try:
            self._request("/health", None, timeout=10)
        except (EngineLost, UserError):
            return False
        return True

    def state(self) -> WorkerState:
        return WorkerState(**self.call("policy_worker")[0])

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of `PolicyReceiver` in every worker; their results."""
        return self._request("/collective_rpc", {"method": method, "kwargs": arguments})["results"]

    def pause(self) -> None:
        """Let the requests under way end, and hold new ones back."""
        self._request("/pause?mode=wait", {})

    def resume(self) -> None:
        """Answer requests again, with keys and values of the present weights only."""
        answer = self._request("/reset_prefix_cache", {})
        if answer is not None and answer.get("success") is False:
            raise EngineLost(f"{self.name} has not reset its prefix cache")
        self._request("/resume", {})

    def complete(self, prompt: list[int], seed: int, options: dict[str, Any]) -> Completion:
        """One response to a prompt."""
        body = {"model": MODEL, "prompt": prompt, "seed": seed, "return_token_ids": True, **options}
        (choice,) = self._request("/v1/completions", body)["choices"]
        return Completion(choice["token_ids"], choice.get("stop_reason"))

    def _request(self, path: str, body: dict[str, Any] | None, timeout: float | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout or self._timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._refused(path, error) from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineLost(f"{self.name} does not answer: {first_line(getattr(error, 'reason', error))}") from None
        return json.loads(content) if content else None

    def _refused(self, path: str, error: urllib.error.HTTPError) -> UserError:
        try:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        except (OSError, http.client.HTTPException):  # the server is lost while it says why
            said = ""
        what = f"{self.name} answers {path.partition('?')[0]} with HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in (401, 403):
            return UserError(f"{what}. Set the environment variable of data.sampler.token_variable to its API key.")
        if error.code == 404:
            return UserError(f"{what}. {RESTART}: a server started otherwise takes no weights.")
        return EngineLost(what) if error.code >= 500 else UserError(f"{what}. {RESTART}.")
