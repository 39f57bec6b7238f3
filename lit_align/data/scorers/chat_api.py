"""A client of OpenAI-style chat endpoints: retries, concurrent requests, cached answers, and usage statistics."""

import hashlib
import http.client
import itertools
import json
import math
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from lit_align.console import print_line
from lit_align.data.scorers.answer_cache import Answer, AnswerCache
from lit_align.data.scorers.base import excerpt
from lit_align.data.scorers.endpoint import Endpoint
from lit_align.errors import UserError

ATTEMPTS = 3
"""Attempts to get a readable answer from a judge; each is a longer conversation, hence another request."""

LONGEST_WAIT = 600.0
"""Longest wait in seconds; a server that requests a longer wait is queried again after this time."""
CLAIM_SECONDS = 10.0
"""How much longer than its timeout a request stays claimed by a process."""

Messages = list[dict[str, str]]


class JudgeError(UserError):
    """A judge does not answer, or its answers cannot be read. Names the judge, what happened, and the fix."""


@dataclass(frozen=True)
class TooLong:
    """Takes the place of an answer: the conversation does not fit into the judge's context."""

    said: str  # by the server


@dataclass
class UsageStats:
    """Requests and tokens since the last report."""

    calls: int = 0
    cached: int = 0
    retried: int = 0
    unanswered: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: list[float] = field(default_factory=list)  # of each call

    def line(self, endpoint: Endpoint) -> str:
        """Calls, tokens, cost and latency."""
        cost = (self.prompt_tokens * endpoint.price_input + self.answer_tokens * endpoint.price_output) / 1e6
        took = sorted(self.seconds)
        parts = [f"{self.calls} calls", f"{self.cached} answers from {endpoint.cache}"]
        parts += [f"{self.retried} retries"] if self.retried else []
        parts += [f"{self.unanswered} without a usable answer"] if self.unanswered else []
        parts += [f"{self.prompt_tokens} + {self.answer_tokens} tokens"]
        parts += [f"cost {cost:.4g}"] if endpoint.price_input or endpoint.price_output else []
        if took:
            parts += [f"{took[len(took) // 2]:.2f} s a call (slowest {took[-1]:.2f} s)"]
        return " · ".join(parts)


class Client:
    """Queries an endpoint with concurrent requests; a request whose answer is cached is not sent.

    Args:
        schema: JSON schema of the answers, for an endpoint with `json_schema`.
    """

    def __init__(self, endpoint: Endpoint, schema: dict[str, Any] | None = None):
        self.endpoint = endpoint
        self.schema = schema if endpoint.json_schema else None
        self.usage = UsageStats()
        self._cache: AnswerCache | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def cache(self) -> AnswerCache:
        if self._cache is None:
            self._cache = AnswerCache(self.endpoint.cache)
        return self._cache

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def ask_all(self, conversations: Sequence[Messages]) -> list[str | TooLong]:
        """The answer to each conversation; equal conversations are sent once.

        Raises:
            JudgeError: a conversation gets no answer. The other answers are in the cache.
        """
        distinct = {self._key(messages): messages for messages in conversations}
        cached = {key: self.cache.get(key) for key in distinct}
        answers: dict[str, str | TooLong] = {key: answer.text for key, answer in cached.items() if answer}
        self.usage.cached += len(answers)
        self._stop.clear()
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            pending = {
                pool.submit(self._ask, key, messages): key for key, messages in distinct.items() if key not in answers
            }
            try:
                for done in as_completed(pending):
                    answers[pending[done]] = done.result()
            except BaseException:
                self._stop.set()  # requests under way finish and are cached; none begins or is sent again
                pool.shutdown(cancel_futures=True)
                raise
        return [answers[self._key(messages)] for messages in conversations]

    def _body(self, messages: Messages) -> dict[str, Any]:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }
        if self.schema is None:
            return body
        form = {"name": "answer", "strict": True, "schema": self.schema}
        return body | {"response_format": {"type": "json_schema", "json_schema": form}}

    def _key(self, messages: Messages) -> str:
        text = json.dumps([self.endpoint.address, self._body(messages)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _ask(self, key: str, messages: Messages) -> str | TooLong:
        """The answer to a conversation; another process's, if that one sends the request."""
        while True:
            if claimed := self.cache.claim(key, self.endpoint.timeout + CLAIM_SECONDS):
                try:
                    answer = self.cache.get(key)  # it may have come before the claim
                    text = answer.text if answer else self._send(key, messages)
                finally:
                    self.cache.release(key)
            else:
                answer = self.cache.get(key)
                text = answer.text if answer else ""
            if answer:
                with self._lock:
                    self.usage.cached += 1
            if claimed or answer:
                return text
            if self._stop.wait(0.1):
                raise JudgeError("another request has failed")

    def _send(self, key: str, messages: Messages) -> str | TooLong:
        started = time.monotonic()
        try:
            text, usage = self._post_with_retries(messages, started)
        except ContextError as error:
            return TooLong(str(error))
        answer = Answer(
            text.encode("utf-8", "replace").decode(),  # an unpaired surrogate cannot be stored
            _tokens(usage.get("prompt_tokens")),
            _tokens(usage.get("completion_tokens")),
            time.monotonic() - started,
        )
        self.cache.put(key, self.endpoint.model, answer)
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.answer_tokens += answer.answer_tokens
            self.usage.seconds.append(answer.seconds)
        return answer.text

    def _post_with_retries(self, messages: Messages, started: float) -> tuple[str, dict[str, Any]]:
        """Send the request until there is an answer, with growing waits; the answer's text and token counts."""
        for attempt in itertools.count():
            try:
                return self._post(self._body(messages))
            except RetryableError as error:
                if attempt >= self.endpoint.retries or self._stop.is_set():
                    raise self._down(attempt + 1, time.monotonic() - started, error) from error
                backoff = min(60.0, 2.0**attempt) * random.uniform(0.75, 1.25)
                wait = backoff if error.wait is None else min(error.wait, LONGEST_WAIT)
                if wait > 60:
                    print_line(f"  the judge {self.endpoint.model} asks to wait {wait:.0f} s ({error}).")
                self._stop.wait(wait)
                with self._lock:
                    self.usage.retried += 1
        raise AssertionError("the loop above has no end")

    def _down(self, attempts: int, seconds: float, last: Exception) -> JudgeError:
        return JudgeError(
            f"the judge {self.endpoint.model} at {self.endpoint.base_url} gave no answer in {attempts} attempts and "
            f"{seconds:.0f} s; the last: {last}. All responses and answers so far are kept. To resume, run the same "
            "command again; raise endpoint.retries or endpoint.timeout to try longer."
        )

    def _post(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """One request; the answer's text and token counts. Neither they nor errors contain the key.

        Raises:
            RetryableError: it failed, perhaps only for now.
            ContextError: the conversation is too long for the model.
            JudgeError: it is refused, or cannot be sent.
        """
        endpoint = self.endpoint
        headers = {"Content-Type": "application/json", "User-Agent": "lit_align"}
        if key := endpoint.key():
            headers["Authorization"] = f"Bearer {key}"

        secret = _pattern_of(key) if key else None

        def hidden(text: str) -> str:
            return secret.sub("***", text) if secret else text

        url = endpoint.address + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=endpoint.timeout) as response:
                content = _read(response, time.monotonic() + endpoint.timeout)
        except urllib.error.HTTPError as error:
            try:
                said = _read(error, time.monotonic() + endpoint.timeout).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):  # a refusal's text may stall or be cut off too
                said = ""
            said = " ".join(hidden(said).split())[:300]
            what = hidden(f"HTTP {error.code} {error.reason}") + (f" ({said})" if said else "")
            if error.code in (400, 413, 422) and _TOO_LONG.search(said):
                raise ContextError(what) from None
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise RetryableError(what, _retry_after(error.headers.get("Retry-After"))) from None
            raise JudgeError(
                f"the judge {endpoint.model} at {url} refuses the request: {what}. Check endpoint.model, "
                f"endpoint.base_url and the key in {endpoint.api_key_variable or 'no variable'}; earlier answers are "
                "kept."
            ) from None
        except (OSError, http.client.HTTPException, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise RetryableError(hidden(f"{type(reason).__name__}: {reason}")) from None
        except ValueError as error:  # its text may hold a header
            raise JudgeError(
                f"the judge {endpoint.model} cannot be reached: {url} is not a valid address ({type(error).__name__}). "
                "Check endpoint.base_url."
            ) from None
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError("content is not a text")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            shown = excerpt(hidden(content.decode("utf-8", "replace")))
            raise RetryableError(
                f"an answer that is not a chat completion ({type(error).__name__}: {error}): {shown}"
            ) from None
        usage = answer.get("usage")
        return hidden(text or ""), usage if isinstance(usage, dict) else {}


class RetryableError(Exception):
    """A request failed, perhaps only for now; `wait` is the pause that the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class ContextError(Exception):
    """A conversation is too long for the judge; holds the server's words."""


_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|input|prompt|sequence) length|(prompt|input|request).*too long",
    re.IGNORECASE,
)
"""How OpenAI, vLLM, llama.cpp and others say that a prompt is too long."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, so that the key goes to no other address."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _read(response: Any, deadline: float) -> bytes:
    """The whole body before the deadline; a socket's own timeout restarts with each piece."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer arrives too slowly")
    return b"".join(pieces)


def _pattern_of(key: str) -> re.Pattern[str]:
    """Finds the key as it is, and with characters escaped as in JSON or in addresses."""
    return re.compile("".join(rf"(?:\\?{re.escape(c)}|(?i:\\u00{ord(c):02x})|(?i:%{ord(c):02x}))" for c in key))


def _tokens(count: Any) -> int:
    """A server's count of tokens; 0 if it is not a count, since that must not lose an answer that is paid for."""
    return int(count) if isinstance(count, int | float) and 0 <= count < 2**63 else 0


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which gives a number or a date; None if it gives neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
