"""Language models as judges, over any endpoint that speaks OpenAI's chat completions protocol.

    GradingJudge    grades each response on criteria (TR paper: coherence, correctness, helpfulness, harmlessness);
                    the reward is their mean, and the grades are kept beside it
    PairwiseJudge   compares each two responses to a prompt, in both orders; P(y_i ≻ y_j) is the mean of the two
                    verdicts (1, ½ or 0), and how much the order decided is told

What the judge is asked stands in text files (`judges/`): copy one, edit it, and name its path. An answer is written to
the cache on disk as it comes, and is never asked for again: not after a kill, not by another run with the same cache.
The API key is read from the environment; it is neither logged nor written anywhere.
"""

import hashlib
import http.client
import itertools
import json
import os
import random
import re
import sqlite3
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lit_align.console import say, tell
from lit_align.data.formats import Text
from lit_align.data.scorers import PairwiseScorer, Scorer, Scores, _shown
from lit_align.errors import UserError

SHIPPED = Path(__file__).parent / "judges"
CRITERIA = ("coherence", "correctness", "helpfulness", "harmlessness")
ATTEMPTS = 3
"""Times that a judge is asked for an answer that can be read; each is a longer conversation, hence another request."""

Messages = list[dict[str, str]]
T = TypeVar("T")


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
                say(f"  {self.path} is no cache that can be read ({error}); it is set aside as {aside.name}.")
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
class Account:
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
        self.account = Account()
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
        self.account.cached += len(answers)
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
        text, usage = self._insist(messages, started)
        answer = Answer(
            text.encode("utf-8", "replace").decode(),  # half a surrogate pair cannot be stored
            _tokens(usage.get("prompt_tokens")),
            _tokens(usage.get("completion_tokens")),
            time.monotonic() - started,
        )
        self.cache.put(key, self.endpoint.model, answer)
        with self._lock:
            self.account.calls += 1
            self.account.prompt_tokens += answer.prompt_tokens
            self.account.answer_tokens += answer.answer_tokens
            self.account.seconds.append(answer.seconds)
        return answer.text

    def _insist(self, messages: Messages, started: float) -> tuple[str, dict[str, Any]]:
        """Post until there is an answer, with growing waits; the answer's text and its count of tokens."""
        for attempt in itertools.count():
            try:
                return self._post(self._body(messages))
            except _Again as again:
                if attempt >= self.endpoint.retries or self._stop.is_set():
                    raise self._down(attempt + 1, time.monotonic() - started, again) from again
                backoff = min(60.0, 2.0**attempt) * random.uniform(0.75, 1.25)
                self._stop.wait(backoff if again.wait is None else min(again.wait, 600.0))
                with self._lock:
                    self.account.retried += 1
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
            _Again: it failed in a way that may pass.
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
                raise _Again(what, _retry_after(error.headers.get("Retry-After"))) from None
            raise JudgeError(
                f"the judge {endpoint.model} at {url} refuses the request: {what}. Check endpoint.model, "
                f"endpoint.base_url and the key in {endpoint.api_key_variable or 'no variable'}; what was answered "
                "before is kept."
            ) from None
        except (OSError, http.client.HTTPException, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise _Again(hidden(f"{type(reason).__name__}: {reason}")) from None
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
            shown = _shown(hidden(content.decode("utf-8", "replace")))
            raise _Again(f"an answer that is no chat completion ({type(error).__name__}: {error}): {shown}") from None
        usage = answer.get("usage")
        return text or "", usage if isinstance(usage, dict) else {}


class _Again(Exception):
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


class _Asker(Generic[T]):
    """A template, the endpoint it is sent to, and what is done with answers that cannot be read."""

    def __init__(self, endpoint: Endpoint, template: str, kind: str, fields: set[str], unanswered: T | None):
        self.client = Client(endpoint)
        self.text = _template(template, kind, fields)
        self.unanswered = unanswered

    @property
    def identity(self) -> str:
        endpoint = self.client.endpoint
        asked = repr((endpoint.address, self.text, endpoint.temperature, endpoint.max_tokens, self.unanswered))
        return f"{endpoint.model}@{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    def ask(self, filled: Sequence[dict[str, str]], parse: Callable[[str], T | None], wanted: str) -> list[T]:
        """What `parse` reads in the answers to the filled-in templates; where it reads nothing, the judge is reminded.

        Raises:
            JudgeError: an answer cannot be read even so, and `unanswered` has no substitute.
        """
        asked = [[{"role": "user", "content": string.Template(self.text).substitute(fields)}] for fields in filled]
        read: list[T | None] = [None] * len(asked)
        texts = [""] * len(asked)
        for _ in range(ATTEMPTS):
            open_ = [place for place, value in enumerate(read) if value is None]
            for place, text in zip(open_, self.client.ask_all([asked[place] for place in open_]), strict=True):
                texts[place], read[place] = text, parse(text)
                reminder = f"That cannot be read. Answer with one line of JSON and nothing else: {wanted}"
                asked[place] = [
                    *asked[place],
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": reminder},
                ]
        for place, value in enumerate(read):
            if value is None:
                if self.unanswered is None:
                    raise JudgeError(
                        f"the judge {self.client.endpoint.model} was asked {ATTEMPTS} times and did not answer like "
                        f"{wanted}, but {_shown(texts[place])} (response {_shown(filled[place]['response'])}). Take "
                        "a better judge or template, raise endpoint.max_tokens, or set scorer.unanswered to the value "
                        "that such responses get."
                    )
                self.client.account.unanswered += 1
        return [self.unanswered if value is None else value for value in read]  # type: ignore[misc]

    def release(self, more: str = "") -> None:
        """Close what is open, and tell the account."""
        account, self.client.account = self.client.account, Account()
        self.client.close()
        if account.calls or account.cached:
            tell("judge", account.line(self.client.endpoint))
            if more:
                tell("", more)


class GradingJudge(Scorer):
    """A language model that grades each response on several criteria; the reward is the mean of the grades.

    Args:
        endpoint: Which model is asked, and where.
        template: What it is asked: tldr or hh, or a text file with $prompt, $response, $lowest, $highest and $answer.
        criteria: Names of the criteria, as the template explains them.
        lowest: The worst grade.
        highest: The best grade.
        unanswered: Grade on each criterion where the judge gives none, counted; null stops the run instead.
    """

    batch_size = 4096  # responses per call; `endpoint.concurrency` limits the requests

    def __init__(
        self,
        endpoint: Endpoint,
        template: str = "hh",
        criteria: Sequence[str] = CRITERIA,
        lowest: int = 1,
        highest: int = 10,
        unanswered: float | None = None,
    ):
        if not criteria or not all(re.fullmatch(r"\w+", name) for name in criteria):
            raise UserError(f"scorer.criteria={[*criteria]}: give one or more names of letters, digits and _.")
        if not lowest < highest:
            raise UserError(f"scorer.lowest={lowest} must be below scorer.highest={highest}.")
        self.criteria = tuple(criteria)
        self.lowest, self.highest = lowest, highest
        grades = None if unanswered is None else {name: float(unanswered) for name in self.criteria}
        fields = {"prompt", "response", "lowest", "highest", "answer"}
        self._asker = _Asker(endpoint, template, "grades", fields, grades)

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and all that it is asked."""
        return f"{self._asker.identity} grades {self.lowest}–{self.highest}: {', '.join(self.criteria)}"

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
        wanted = ", ".join(f'"{name}": {self.highest}' for name in self.criteria)
        fixed = {"lowest": str(self.lowest), "highest": str(self.highest), "answer": wanted}
        filled = [
            {"prompt": _as_text(prompt), "response": response} | fixed
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        grades = self._asker.ask(filled, self.read, f"{{{wanted}}}")
        return Scores(
            [sum(each.values()) / len(each) for each in grades],
            {name: [each[name] for each in grades] for name in self.criteria},
        )

    def read(self, answer: str) -> dict[str, float] | None:
        """The grades in an answer; None unless it has one for each criterion, within the limits."""
        grades = {}
        for name in self.criteria:
            found = re.findall(rf'\b{name}\b["\'*]*\s*[:=]\s*["\'*]*\s*(-?\d+(?:\.\d+)?)', answer, re.IGNORECASE)
            if not found or not self.lowest <= float(found[-1]) <= self.highest:
                return None
            grades[name] = float(found[-1])
        return grades

    def release(self) -> None:
        self._asker.release()


# What may follow a verdict: nothing, so that neither "A or B?" nor "a close call" is one for A
_WINNER = re.compile(
    r"""["'*\s]* (?:a\s+(?=tie))? (a|b|tie)\b ["'*]*
    (?: [^\w?\n]*$                 # the end of the line,
      | \s*\}(?!\s*,)              # of the JSON object (with a comma it is the question, repeated),
      | \s*,\s*["']\w+["']\s*:     # of this field,
      | [.!]\s                     # or of the sentence
    )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ALONE = re.compile(r"[^\w?]*(?:a\s+(?=tie))?(a|b|tie)[^\w?]*$", re.IGNORECASE)


class PairwiseJudge(PairwiseScorer):
    """A language model that says which of two responses is better; each two are compared in both orders.

    K responses take K·(K−1) requests. Told at the end of a phase: how often the first place won (an unbiased judge is
    at 50 %), and in how many pairs it, or the second, won in both orders (0 %).

    Args:
        endpoint: Which model is asked, and where.
        template: What it is asked: tldr or hh, or a text file with $prompt, $first and $second.
        unanswered: Probability that the first wins where the judge says nothing, counted (½ is a tie); null stops the
            run instead.
    """

    def __init__(self, endpoint: Endpoint, template: str = "hh", unanswered: float | None = None):
        if unanswered is not None and not 0 <= unanswered <= 1:
            raise UserError(f"scorer.unanswered={unanswered} is a probability: it must lie in [0, 1].")
        self._asker = _Asker(endpoint, template, "pair", {"prompt", "first", "second"}, unanswered)
        self._verdicts: list[tuple[float, float]] = []  # of each pair, how far the first place won in either order

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and all that it is asked."""
        return f"{self._asker.identity} pairwise"

    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        pairs = [
            (n, i, j) for n, group in enumerate(responses) for i, j in itertools.combinations(range(len(group)), 2)
        ]
        filled = [
            {"prompt": _as_text(prompts[n]), "first": responses[n][first], "second": responses[n][second]}
            | {"response": responses[n][first]}
            for n, i, j in pairs
            for first, second in ((i, j), (j, i))
        ]
        verdicts = self._asker.ask(filled, self.read, '{"winner": "A"}, "B" or "tie"')
        P = [[[0.5] * len(group) for _ in group] for group in responses]
        for (n, i, j), straight, swapped in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            P[n][i][j] = (straight + 1 - swapped) / 2
            P[n][j][i] = 1 - P[n][i][j]
            if responses[n][i] != responses[n][j]:
                self._verdicts.append((straight, swapped))
        return P

    @staticmethod
    def read(answer: str) -> float | None:
        """How far the first place wins: 1, ½ or 0; None where the last "winner:", or all of the answer, is unclear."""
        *before, last = re.split(r"""\bwinner\b["'*]*\s*[:=]""", answer, flags=re.IGNORECASE)
        if before and re.search(r"\bor\W*$", before[-1], re.IGNORECASE):
            return None  # {"winner": "A"} or {"winner": "B"}: the question, repeated
        found = (_WINNER if before else _ALONE).match(last)
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[1].lower()] if found else None

    def position_bias(self) -> dict[str, float]:
        """Shares over the pairs compared since the last release; none if there were none.

        first_place: of all verdicts, how often the first place won, ties as half. decided_by_place: of all pairs, those
        where the first place, or the second, won in both orders.
        """
        if not self._verdicts:
            return {}
        both = [straight + swapped for straight, swapped in self._verdicts]
        count = len(both)
        return {
            "pairs": float(count),
            "first_place": sum(both) / (2 * count),
            "decided_by_place": sum(each in (0.0, 2.0) for each in both) / count,
        }

    def release(self) -> None:
        bias = self.position_bias()
        self._verdicts = []
        self._asker.release(
            f"position bias: the first place won {bias['first_place']:.1%} of {2 * bias['pairs']:.0f} verdicts; the "
            f"place alone decided {bias['decided_by_place']:.1%} of {bias['pairs']:.0f} pairs"
            if bias
            else ""
        )


def _as_text(prompt: Text) -> str:
    """A prompt as a judge reads it: a chat with the names of its speakers."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)


def _template(name: str, kind: str, fields: set[str]) -> str:
    """The text of a shipped template, or of a file.

    Raises:
        UserError: there is none of that name, or it does not have the fields that are filled in.
    """
    path = SHIPPED / f"{name}_{kind}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem.partition("_")[0] for file in SHIPPED.glob(f"*_{kind}.txt")))
        raise UserError(f"scorer.template={name!r} is neither one of {shipped} nor a text file. See {SHIPPED}.")
    text = path.read_text(encoding="utf-8")
    template = string.Template(text)
    needed = fields & {"response", "first", "second"}
    if not template.is_valid() or not needed <= set(template.get_identifiers()) <= fields:
        raise UserError(
            f"scorer.template={name!r} must hold {_dollars(needed)}, may hold {_dollars(fields - needed)}, and any "
            "other dollar sign is written twice ($$)."
        )
    return text


def _dollars(names: set[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names))
