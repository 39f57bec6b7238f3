"""A client of OpenAI-style chat endpoints: retries, concurrency, an SQLite cache, and an account of what was used."""

import hashlib
import http.client
import itertools
import json
import os
import random
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.console import print_line
from lit_align.data.scorers.base import excerpt
from lit_align.errors import UserError

ATTEMPTS = 3
"""Times that a judge is asked for an answer that can be read; each is a longer conversation, hence another request."""

Messages = list[dict[str, str]]


@dataclass
class Endpoint:
    """Where a judge is, and how it is asked.

    Args:
        model: Name of the model there.
        base_url: Of an OpenAI-compatible server (OpenAI, vLLM, transformers serve, llama.cpp, ...), to which
            /chat/completions is added.
        api_key_variable: Environment variable that holds the key; null for servers that need none.
        concurrency: Requests at once.
        timeout: Seconds until a request is given up and made again.
        retries: Times that a request is made again after 408, 409, 425, 429, 5xx, a timeout, no connection or an answer
            that is no JSON; the waits double from 1 s on, up to 60 s, unless the server says (Retry-After).
        temperature: Of the judge's own sampling.
        max_tokens: Longest answer; reasoning models need more.
        price_input: Price of a million prompt tokens, in whatever currency, for the account.
        price_output: Price of a million answer tokens.
        cache: SQLite file of all answers, by address, model and text of the request; runs may share it.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_variable: str | None = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    temperature: float = 0.0
    max_tokens: int = 256
    price_input: float = 0.0
    price_output: float = 0.0
    cache: str = "runs/judge.sqlite"

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint.base_url={self.base_url!r} is no address: give https://HOST/v1, or http://….")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "endpoint.base_url holds a user, password or query, which would be written to config.yaml. Put the key "
                "into an environment variable and name it: endpoint.api_key_variable=NAME."
            )
        for name, least in {"concurrency": 1, "retries": 0, "max_tokens": 1, "temperature": 0}.items():
            if not getattr(self, name) >= least:  # a NaN is neither
                raise UserError(f"endpoint.{name}={getattr(self, name)} must be at least {least}.")
        if not self.timeout > 0:
            raise UserError(f"endpoint.timeout={self.timeout} must be above 0 (seconds).")
        self.key()

    @property
    def address(self) -> str:
        """`base_url` without the last slash; no user, password or query is in it (they are refused above)."""
        return self.base_url.rstrip("/")

    def key(self) -> str:
        """The API key, as the environment has it now; empty for a server that needs none.

        Raises:
            UserError: the variable is not set, or holds what no header can carry. The value is not shown.
        """
        if self.api_key_variable is None:
            return ""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key:
            raise UserError(
                f"endpoint.api_key_variable={self.api_key_variable}: this environment variable is not set. Set it to "
                f"the key of {self.base_url}, or give api_key_variable=null for a server that needs none."
            )
        if not re.fullmatch("[!-~]+", key):
            raise UserError(
                f"endpoint.api_key_variable={self.api_key_variable}: this environment variable holds white space, or "
                "characters outside ASCII, within the key. Set it to the key alone, on one line, as it was issued."
            )
        return key


class JudgeError(UserError):
    """A judge that cannot be asked, or whose answers cannot be read. Names it, what happened, and the mend."""


class Answer(NamedTuple):
    """What a judge answered."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float  # from the first attempt to the answer


class Cache:
    """Answers on disk, by the digest of their request, each committed as it comes; threads and processes share it.

    Raises:
        UserError: the file cannot be opened. One that is damaged is set aside, and a new one begun.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                # the upper bytes of an error code tell apart kinds of the same
                damaged = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
                if not damaged or not self.path.is_file():
                    raise
                aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
                print_line(f"  {self.path} is no cache that can be read ({error}); it is set aside as {aside.name}.")
                os.replace(self.path, aside)
                self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"endpoint.cache={str(self.path)!r} cannot be opened ({error}). Name a file, new or a cache, in a "
                "folder that can be written to; if another process holds it locked, wait for that one to end."
            ) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, model TEXT, text TEXT, "
            "prompt_tokens INTEGER, answer_tokens INTEGER, seconds REAL)"
        )
        return connection

    def get(self, request: str) -> Answer | None:
        with self._lock:
            found = self._connection.execute(
                "SELECT text, prompt_tokens, answer_tokens, seconds FROM answers WHERE request = ?", (request,)
            ).fetchone()
        return Answer(*found) if found else None

    def put(self, request: str, model: str, answer: Answer) -> None:
        with self._lock:
            self._connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (request, model, *answer)
            )

    def close(self) -> None:
        self._connection.close()


@dataclass
class UsageStats:
    """What has been asked since the last account was given."""

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
    """Asks an endpoint, many requests at once, each once: from the cache where it has the answer."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.usage = UsageStats()
        self._cache: Cache | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def cache(self) -> Cache:
        if self._cache is None:
            self._cache = Cache(self.endpoint.cache)
        return self._cache

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def ask_all(self, conversations: Sequence[Messages]) -> list[str]:
        """The answer to each conversation; equal ones are asked once.

        Raises:
            JudgeError: one gets no answer. Those that came are in the cache.
        """
        distinct = {self._key(messages): messages for messages in conversations}
        cached = {key: self.cache.get(key) for key in distinct}
        answers = {key: answer.text for key, answer in cached.items() if answer}
        self.usage.cached += len(answers)
        self._stop.clear()
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            asked = {
                pool.submit(self._ask, key, messages): key for key, messages in distinct.items() if key not in answers
            }
            try:
                for done in as_completed(asked):
                    answers[asked[done]] = done.result()
            except BaseException:
                self._stop.set()  # those under way finish and are kept; none begins or waits to try again
                pool.shutdown(cancel_futures=True)
                raise
        return [answers[self._key(messages)] for messages in conversations]

    def _body(self, messages: Messages) -> dict[str, Any]:
        endpoint = self.endpoint
        return {
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }

    def _key(self, messages: Messages) -> str:
        text = json.dumps([self.endpoint.address, self._body(messages)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _ask(self, key: str, messages: Messages) -> str:
        started = time.monotonic()
        text, usage = self._post_with_retries(messages, started)
        answer = Answer(
            text.encode("utf-8", "replace").decode(),  # half a surrogate pair cannot be stored
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
        """Post until there is an answer, with growing waits; the answer's text and its count of tokens."""
        for attempt in itertools.count():
            try:
                return self._post(self._body(messages))
            except RetryableError as again:
                if attempt >= self.endpoint.retries or self._stop.is_set():
                    raise self._down(attempt + 1, time.monotonic() - started, again) from again
                backoff = min(60.0, 2.0**attempt) * random.uniform(0.75, 1.25)
                self._stop.wait(backoff if again.wait is None else min(again.wait, 600.0))
                with self._lock:
                    self.usage.retried += 1
        raise AssertionError("the loop above has no end")

    def _down(self, attempts: int, seconds: float, last: Exception) -> JudgeError:
        return JudgeError(
            f"the judge {self.endpoint.model} at {self.endpoint.base_url} gave no answer in {attempts} attempts and "
            f"{seconds:.0f} s; the last: {last}. All responses and the answers so far are kept: run the same command "
            "again, with --ckpt_path after the first round, and it goes on where it stopped (endpoint.retries and "
            "endpoint.timeout say how long to try)."
        )

    def _post(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """One request; the answer's text and its count of tokens.

        Raises:
            RetryableError: it failed in a way that may pass.
            JudgeError: it is refused, or cannot be made. Neither shows the key, whoever repeats it.
        """
        endpoint = self.endpoint
        headers = {"Content-Type": "application/json", "User-Agent": "lit_align"}
        if key := endpoint.key():
            headers["Authorization"] = f"Bearer {key}"

        def hidden(text: str) -> str:
            return text.replace(key, "***") if key else text

        url = endpoint.address + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=endpoint.timeout) as response:
                content = _read(response, time.monotonic() + endpoint.timeout)
        except urllib.error.HTTPError as error:
            try:
                said = _read(error, time.monotonic() + endpoint.timeout).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):  # a refusal's text may stall or be cut off, like any other
                said = ""
            said = " ".join(hidden(said).split())[:300]
            what = hidden(f"HTTP {error.code} {error.reason}") + (f" ({said})" if said else "")
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise RetryableError(what, _retry_after(error.headers.get("Retry-After"))) from None
            raise JudgeError(
                f"the judge {endpoint.model} at {url} refuses the request: {what}. Check endpoint.model, "
                f"endpoint.base_url and the key in {endpoint.api_key_variable or 'no variable'}; what was answered "
                "before is kept."
            ) from None
        except (OSError, http.client.HTTPException, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise RetryableError(hidden(f"{type(reason).__name__}: {reason}")) from None
        except ValueError as error:  # its text may hold a header
            raise JudgeError(
                f"the judge {endpoint.model} at {url} cannot be asked: no request can be made of that address "
                f"({type(error).__name__}). Check endpoint.base_url."
            ) from None
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            shown = excerpt(hidden(content.decode("utf-8", "replace")))
            raise RetryableError(
                f"an answer that is no chat completion ({type(error).__name__}: {error}): {shown}"
            ) from None
        usage = answer.get("usage")
        return text or "", usage if isinstance(usage, dict) else {}


class RetryableError(Exception):
    """A request failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given, and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; a socket's own timeout begins anew with each piece."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer comes too slowly")
    return b"".join(pieces)


def _tokens(count: Any) -> int:
    """A count of tokens as a server gives it; 0 for what is none, since the answer is paid and counts do not matter."""
    return int(count) if isinstance(count, int | float) and 0 <= count < 2**63 else 0


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which gives a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
