"""A real HTTP server that speaks the chat completions protocol, for the tests of judges."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lit_align.data import Endpoint
from lit_align.data.scorers.judges import CRITERIA

KEY = "sk-secret-4711"


class Server:
    """An OpenAI-compatible server; `answer(messages)` gives a text, or (status, headers, body, delay)."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], Any]):
        self.answer = answer
        self.after: Callable[[BaseHTTPRequestHandler], Any] = lambda handler: None  # called after each answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append({"path": self.path} | body)
                    outer.headers.append(dict(self.headers))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    answer = outer.answer(body["messages"])
                finally:
                    with outer.lock:
                        outer.at_once -= 1
                if isinstance(answer, str):
                    usage = {"prompt_tokens": 100, "completion_tokens": 10}
                    message = {"role": "assistant", "content": answer}
                    answer = (200, {}, json.dumps({"choices": [{"message": message}], "usage": usage}), 0)
                status, headers, text, delay = answer
                time.sleep(delay)
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                    outer.after(self)
                except OSError:
                    pass  # the client has given up

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def endpoint(server: Server, **options: Any) -> Endpoint:
    defaults = {"api_key_variable": None, "timeout": 5.0, "retries": 2, "cache": "judge.sqlite"}
    return Endpoint("judge-1", server.url, **(defaults | options))


def grades(value: float | list[float]) -> str:
    values = value if isinstance(value, list) else [value] * 4
    return json.dumps(dict(zip(CRITERIA, values, strict=True)))


def graded_by_length(messages: list[dict[str, str]]) -> str:
    """A grade that depends on the response alone: its length, up to 9, plus 1."""
    found = re.search(r"\[reply to grade\]\n(.*)\n\[end of reply\]", messages[0]["content"], re.DOTALL)
    assert found
    return grades(1 + len(found[1]) % 10)


def longer_wins(messages: list[dict[str, str]]) -> str:
    found = re.search(
        r"\[reply A\]\n(.*)\n\[end of reply A\].*\[reply B\]\n(.*)\n\[end of r", messages[0]["content"], re.S
    )
    assert found
    first, second = len(found[1]), len(found[2])
    return json.dumps({"winner": "tie" if first == second else "A" if first > second else "B"})


def in_turn(*answers: Any) -> Callable[[Any], Any]:
    """The answers one after another, the last for ever."""
    left = list(answers)
    return lambda messages: left.pop(0) if len(left) > 1 else left[0]
