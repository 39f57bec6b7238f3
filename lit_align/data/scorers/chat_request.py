"""One request to an OpenAI-style chat endpoint: its answer, or what the refusal means."""

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from lit_align.data.scorers.base import excerpt
from lit_align.data.scorers.endpoint import Endpoint
from lit_align.errors import UserError

CUT = "…"


class JudgeError(UserError):
    """A judge does not answer, or its answers cannot be read. Names the judge, what happened, and the fix."""


class RetryableError(Exception):
    """A request failed, perhaps only for now; `wait` is the pause that the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class UnanswerableError(Exception):
    """A conversation is too long for the judge; holds the server's words."""


class Completion(NamedTuple):
    """A server's answer."""

    text: str
    prompt_tokens: int
    answer_tokens: int

    @classmethod
    def read(cls, content: bytes) -> "Completion":
        """The answer in a response's body; one that was cut at endpoint.max_tokens ends with CUT.

        Raises:
            ValueError, KeyError, IndexError, TypeError: it is not a chat completion.
        """
        answer = json.loads(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError("content is not a text")
        if text and choice.get("finish_reason") == "length":
            text += CUT
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return cls(text or "", _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens")))


class Connection:
    """Posts requests to an endpoint. Neither answers nor errors contain the API key."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.url = endpoint.address + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, body: dict[str, Any]) -> Completion:
        """Send one request.

        Raises:
            RetryableError: it failed, perhaps only for now.
            UnanswerableError: the conversation is too long for the model, or a filter refuses it.
            JudgeError: it is refused, or cannot be sent.
        """
        key = self.endpoint.key()
        hide = _hider(key)
        try:
            content = self._exchange(body, key)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, hide) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RetryableError(hide(f"{type(reason).__name__}: {reason}")) from None
        except ValueError as error:  # its text may hold a header
            raise JudgeError(
                f"the judge {self.endpoint.model} cannot be reached: {self.url} is not a valid address "
                f"({type(error).__name__}). Check endpoint.base_url."
            ) from None
        try:
            completion = Completion.read(content)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            shown = excerpt(hide(content.decode("utf-8", "replace")))
            raise RetryableError(
                f"an answer that is not a chat completion ({type(error).__name__}: {error}): {shown}"
            ) from None
        return completion._replace(text=hide(completion.text))

    def _exchange(self, body: dict[str, Any], key: str) -> bytes:
        """The body of the response to a request."""
        headers = {"Content-Type": "application/json", "User-Agent": "lit_align"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.endpoint.timeout) as response:
            return self._read(response)

    def _refusal(self, error: urllib.error.HTTPError, hide: Callable[[str], str]) -> Exception:
        """The exception that an HTTP status stands for."""
        try:
            said = self._read(error).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):  # a refusal's text may stall or be cut off too
            said = ""
        said = " ".join(hide(said).split())[:300]
        refusal = hide(f"HTTP {error.code} {error.reason}") + (f" ({said})" if said else "")
        if error.code in (400, 413, 422) and (_TOO_LONG.search(said) or _FILTERED.search(said)):
            return UnanswerableError(refusal)
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return RetryableError(refusal, retry_after(error.headers.get("Retry-After")))
        return JudgeError(
            f"the judge {self.endpoint.model} at {self.url} refuses the request: {refusal}. Check endpoint.model, "
            f"endpoint.base_url and the key in {self.endpoint.api_key_variable or 'no variable'}, or change fields of "
            "the request with endpoint.extra_body; earlier answers are kept."
        )

    def _read(self, response: Any) -> bytes:
        """The whole body, within the endpoint's timeout; a socket's own timeout restarts with each piece."""
        deadline = time.monotonic() + self.endpoint.timeout
        pieces = []
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            if time.monotonic() > deadline:
                raise TimeoutError("the answer arrives too slowly")
        return b"".join(pieces)


_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (model|input|prompt|sequence) length|(prompt|input|request).*too long",
    re.IGNORECASE,
)
"""How OpenAI, vLLM, llama.cpp and others say that a prompt is too long."""
_FILTERED = re.compile(
    r"content.?(filter|management|policy)|invalid_prompt|usage polic|moderation|responsible.?ai", re.IGNORECASE
)
"""How OpenAI, Azure and others say that a filter refuses a prompt."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, so that the key goes to no other address."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _hider(key: str) -> Callable[[str], str]:
    """A function that takes a key out of texts: as it is, and with characters escaped as in JSON or in addresses."""
    if not key:
        return lambda text: text
    escaped = (rf"(?:\\?{re.escape(c)}|(?i:\\u00{ord(c):02x})|(?i:%{ord(c):02x}))" for c in key)
    pattern = re.compile("".join(escaped))
    return lambda text: pattern.sub("***", text)


def _tokens(count: Any) -> int:
    """A server's count of tokens; 0 if it is not a count, since that must not lose an answer that is paid for."""
    return int(count) if isinstance(count, int | float) and 0 <= count < 2**63 else 0


def retry_after(value: str | None) -> float | None:
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
