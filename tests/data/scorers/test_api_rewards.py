"""The reward function of `docs/own_code.md` that asks an API, with a server that fails in each way it can."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scoring import message_of

from lit_align.data.scorers.base import ScorerError, score
from lit_align.data.scorers.function import FunctionScorer
from lit_align.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "own_code.md"
KEY = "key-4711"
BUSY = (429, "slow down")


class Rewards(ThreadingHTTPServer):
    """Gives its answers one after another; when they are used up, a response's reward is its length."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Rewards

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = 200, json.dumps({"rewards": [len(response) for response in body["responses"]]})
        if self.headers["Authorization"] != f"Bearer {KEY}":
            answer = 401, "who are you?"
        status, text = self.server.answers.pop(0) if self.server.answers else answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rewards]:
    (code,) = re.findall(r"^```python\n(# api_rewards\.py\n.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    Path("api_rewards.py").write_text(code)
    server = Rewards()
    monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("REWARD_KEY", KEY)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def rewards() -> list[float]:
    return score(FunctionScorer("api_rewards.py:reward"), ["p", "q"], ["a", "bb"])


def test_a_busy_server_is_asked_again(server: Rewards):
    server.answers = [BUSY, BUSY, BUSY]
    assert rewards() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([BUSY] * 4, "HTTPError: HTTP Error 429: Too Many Requests in api_rewards.py, line 17, on a batch of 2"),
        ([(500, "")], "HTTPError: HTTP Error 500: Internal Server Error in api_rewards.py, line 17"),
        ([(200, "<html>")], "JSONDecodeError: Expecting value: line 1 column 1 (char 0) in api_rewards.py, line 18"),
        ([(200, '{"reward": 1}')], "KeyError: 'rewards' in api_rewards.py, line 18"),
        ([(200, '{"rewards": [1]}')], "gave 1 score for 2 responses"),
    ],
)
def test_each_failure_is_one_message_with_the_line(server: Rewards, answers: list[tuple[int, str]], words: str):
    server.answers = answers
    message = message_of(ScorerError, rewards)
    assert words in message
    assert '(prompt "q", response "bb")' in message


def test_a_wrong_key_a_missing_one_and_no_server(server: Rewards, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REWARD_KEY", "wrong")
    Path("api_rewards.py").write_text(Path("api_rewards.py").read_text() + "# imported again\n")
    assert "HTTP Error 401: Unauthorized in api_rewards.py" in message_of(ScorerError, rewards)
    monkeypatch.delenv("REWARD_KEY")
    Path("api_rewards.py").write_text(Path("api_rewards.py").read_text() + "# imported again\n")
    message = message_of(UserError, rewards)
    assert (
        "(KeyError: 'REWARD_KEY' in api_rewards.py, line 8). The error is in its code: fix it, or set what" in message
    )
    monkeypatch.setenv("REWARD_KEY", KEY)
    monkeypatch.setenv("REWARD_URL", "http://127.0.0.1:9/")
    assert "URLError: <urlopen error [Errno 111] Connection refused> in api" in message_of(ScorerError, rewards)


def test_a_server_that_does_not_answer(server: Rewards, monkeypatch: pytest.MonkeyPatch):
    Path("api_rewards.py").write_text(Path("api_rewards.py").read_text().replace("timeout=60", "timeout=0.1"))
    monkeypatch.setattr(Handler, "do_POST", lambda handler: threading.Event().wait(0.5))
    assert "raised TimeoutError: timed out in api_rewards.py" in message_of(ScorerError, rewards)
