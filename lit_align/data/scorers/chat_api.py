"""A client of OpenAI-style chat endpoints: retries, concurrent requests, cached answers, and usage statistics."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from lit_align.console import print_line
from lit_align.data.scorers.answer_cache import Answer, AnswerCache
from lit_align.data.scorers.chat_request import Completion, Connection, JudgeError, RetryableError, UnanswerableError
from lit_align.data.scorers.endpoint import Endpoint
from lit_align.errors import amount

ATTEMPTS = 3
"""Attempts to get a readable answer from a judge; each is a longer conversation, hence another request."""

LONGEST_WAIT = 600.0
"""Longest wait in seconds; a server that requests a longer wait is queried again after this time."""
CLAIM_SECONDS = 10.0
"""How much longer than its timeout a request stays claimed by a process."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Unanswerable:
    """Takes the place of an answer: the conversation does not fit into the judge's context, or a filter refuses it."""

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
        parts = [amount(self.calls, "calls"), f"{amount(self.cached, 'answers')} from {endpoint.cache}"]
        parts += [amount(self.retried, "retries")] if self.retried else []
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
        self._connection = Connection(endpoint)

    @property
    def cache(self) -> AnswerCache:
        if self._cache is None:
            self._cache = AnswerCache(self.endpoint.cache)
        return self._cache

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def ask_all(self, conversations: Sequence[Messages]) -> list[str | Unanswerable]:
        """The answer to each conversation; equal conversations are sent once.

        Raises:
            JudgeError: a conversation gets no answer. The other answers are in the cache.
        """
        distinct = {self._key(messages): messages for messages in conversations}
        cached = {key: self.cache.get(key) for key in distinct}
        answers: dict[str, str | Unanswerable] = {key: answer.text for key, answer in cached.items() if answer}
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
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }
        if self.schema is not None:
            form = {"name": "answer", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        body |= endpoint.extra_body or {}
        return {name: value for name, value in body.items() if value is not None}

    def _key(self, messages: Messages) -> str:
        text = json.dumps([self.endpoint.address, self._body(messages)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _ask(self, key: str, messages: Messages) -> str | Unanswerable:
        """The answer to a conversation; another process's, if that one sends the request."""
        while not self.cache.claim(key, self.endpoint.timeout + CLAIM_SECONDS):
            if answer := self.cache.get(key):
                return self._reused(answer)
            if self._stop.wait(0.1):
                raise JudgeError("another request has failed")
        try:
            if answer := self.cache.get(key):  # it may have come before the claim
                return self._reused(answer)
            return self._send(key, messages)
        finally:
            self.cache.release(key)

    def _reused(self, answer: Answer) -> str:
        with self._lock:
            self.usage.cached += 1
        return answer.text

    def _send(self, key: str, messages: Messages) -> str | Unanswerable:
        started = time.monotonic()
        try:
            completion = self._post_with_retries(messages, started)
        except UnanswerableError as error:
            return Unanswerable(str(error))
        text = completion.text.encode("utf-8", "replace").decode()  # an unpaired surrogate cannot be stored
        answer = Answer(text, completion.prompt_tokens, completion.answer_tokens, time.monotonic() - started)
        self.cache.put(key, self.endpoint.model, answer)
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.answer_tokens += answer.answer_tokens
            self.usage.seconds.append(answer.seconds)
        return answer.text

    def _post_with_retries(self, messages: Messages, started: float) -> Completion:
        """Send the request until there is an answer, with growing waits."""
        attempts = 0
        while True:
            try:
                return self._connection.post(self._body(messages))
            except RetryableError as error:
                attempts += 1
                if attempts > self.endpoint.retries or self._stop.is_set():
                    raise self._down(attempts, time.monotonic() - started, error) from error
                backoff = min(60.0, 2.0 ** (attempts - 1)) * random.uniform(0.75, 1.25)
                wait = backoff if error.wait is None else min(error.wait, LONGEST_WAIT)
                if wait > 60:
                    print_line(f"  the judge {self.endpoint.model} asks to wait {wait:.0f} s ({error}).")
                self._stop.wait(wait)
                with self._lock:
                    self.usage.retried += 1

    def _down(self, attempts: int, seconds: float, last: Exception) -> JudgeError:
        return JudgeError(
            f"the judge {self.endpoint.model} at {self.endpoint.base_url} gave no answer in {attempts} attempts and "
            f"{seconds:.0f} s; the last: {last}. All responses and answers so far are kept. To resume, run the same "
            "command again; raise endpoint.retries or endpoint.timeout to try longer."
        )
