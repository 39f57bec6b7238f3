"""The address of a judge, and how it is queried."""

import os
import re
from dataclasses import dataclass
from typing import Any

from lit_align.arguments import CheckedArguments
from lit_align.errors import UserError, check_address, check_number


@dataclass
class Endpoint(metaclass=CheckedArguments):
    """The server of a judge, and how to query it.

    Args:
        model: Name of the model on the server.
        base_url: Address of an OpenAI-compatible server (OpenAI, vLLM, transformers serve, llama.cpp, ...);
            /chat/completions is appended.
        api_key_variable: Environment variable that holds the API key; null for servers that need no key.
        concurrency: Most requests at the same time.
        timeout: Seconds until a request is aborted and sent again.
        retries: How often a request is sent again after 408, 409, 425, 429, 5xx, a timeout, a failed connection or an
            answer that is not JSON. Waits double from 1 s up to 60 s, unless the server sends Retry-After.
        temperature: Temperature of the judge's sampling.
        max_tokens: Longest answer, in tokens; reasoning models need more.
        extra_body: Further fields of each request, such as {reasoning_effort: low}; null leaves a field out. OpenAI's
            reasoning models need {max_tokens: null, max_completion_tokens: 2000, temperature: null}.
        price_input: Price of a million prompt tokens, in any currency, for the reported cost.
        price_output: Price of a million answer tokens.
        cache: SQLite file of all answers, by address, model and text of the request; runs may share it.
        json_schema: Have the server write answers that fit a JSON schema (response_format), so that even a small
            judge's can be parsed. OpenAI, vLLM and llama.cpp can; a server that cannot refuses or ignores it.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_variable: str | None = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    temperature: float = 0.0
    max_tokens: int = 256
    extra_body: dict[str, Any] | None = None
    price_input: float = 0.0
    price_output: float = 0.0
    cache: str = "runs/judge.sqlite"
    json_schema: bool = False

    def __post_init__(self) -> None:
        form = "https://HOST/v1, or http://HOST:PORT/v1"
        check_address("endpoint.base_url", self.base_url, form, "endpoint.api_key_variable")
        for name in ("retries", "temperature", "price_input", "price_output"):
            check_number(f"endpoint.{name}", getattr(self, name), least=0)
        for name in ("concurrency", "max_tokens"):
            check_number(f"endpoint.{name}", getattr(self, name), least=1)
        check_number("endpoint.timeout", self.timeout, above=0)
        if taken := [name for name in ("model", "messages", "stream") if name in (self.extra_body or {})]:
            raise UserError(f"endpoint.extra_body.{taken[0]}: lit_align sets this field itself. Leave it out.")
        self.key()

    @property
    def address(self) -> str:
        """`base_url` without the last slash."""
        return self.base_url.rstrip("/")

    def key(self) -> str:
        """The API key, as the environment has it now; empty for a server that needs no key.

        Raises:
            UserError: the variable is not set, or no HTTP header can carry its value. The value is not shown.
        """
        if self.api_key_variable is None:
            return ""
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key:
            raise UserError(
                f"endpoint.api_key_variable={self.api_key_variable}: this environment variable is not set. Set it to "
                f"the key of {self.base_url}, or use api_key_variable=null for a server that needs no key."
            )
        if not re.fullmatch("[!-~]+", key):
            raise UserError(
                f"endpoint.api_key_variable={self.api_key_variable}: this environment variable must hold the key "
                "alone, but contains white space or characters outside ASCII. Set it to the key on one line, as issued."
            )
        return key
