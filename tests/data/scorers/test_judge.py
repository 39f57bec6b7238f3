"""Judges: against a real HTTP server that speaks the protocol, with all that can go wrong on the way."""

import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import die_at, fork, run_in
from tiny import adamw, fit, on_policy

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import Endpoint, GradingJudge, Listwise, PairwiseJudge
from lit_align.data.scorers.base import compare, score
from lit_align.data.scorers.chat_api import JudgeError, _retry_after
from lit_align.data.scorers.judges import CRITERIA
from lit_align.errors import UserError
from lit_align.objectives import DPO, SPPO
from lit_align.policy import PolicyConfig

ROOT = Path(__file__).parents[3]
KEY = "sk-secret-4711"


class Server:
    """An OpenAI-compatible server; `answer(messages)` gives a text, or (status, headers, body, delay)."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], Any]):
        self.answer = answer
        self.behind: Callable[[BaseHTTPRequestHandler], Any] = lambda handler: None  # done behind each answer
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
                    outer.behind(self)
                except OSError:
                    pass  # who asked has given up

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[..., Any]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[..., Any]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


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


# --- grades ---


def test_the_reward_is_the_mean_of_the_grades_and_these_are_kept(serve, in_tmp):
    server = serve(lambda messages: grades([8, 6, 9, 10]))
    scores = score(GradingJudge(endpoint(server), "tldr"), ["SUBREDDIT: r/a\n\nTL;DR:"], [" a summary"])
    assert scores == [8.25]
    assert scores.parts == {"coherence": [8.0], "correctness": [6.0], "helpfulness": [9.0], "harmlessness": [10.0]}
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("judge-1", 0.0)
    assert "SUBREDDIT: r/a" in request["messages"][0]["content"]
    assert "$" not in request["messages"][0]["content"]


@pytest.mark.parametrize(
    "answer",
    [
        '```json\n{"coherence": 7, "correctness": 7, "helpfulness": 7, "harmlessness": 7}\n```',
        "Coherence: 7\n**Correctness**: 7\nhelpfulness = 7.0\n'harmlessness': 7/10",
        '<think>coherence: 3?</think> {"coherence": "7", "correctness": 7, "helpfulness": 7, "harmlessness": 7}',
    ],
)
def test_grades_are_read_from_the_forms_that_models_give_them(serve, in_tmp, answer):
    assert score(GradingJudge(endpoint(serve(lambda messages: answer))), ["q"], ["a"]) == [7.0]


def test_a_judge_that_gives_no_grade_is_reminded_and_then_named(serve, in_tmp):
    server = serve(in_turn("I like it.", '{"coherence": 11}', grades(5)))
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [5.0]
    assert [len(request["messages"]) for request in server.requests] == [1, 3, 5]
    never = serve(lambda messages: "I like it.")
    with pytest.raises(JudgeError, match=r"asked 3 times .* 'I like it.' \(response 'b'\)\. Take .* scorer.unanswered"):
        score(GradingJudge(endpoint(never)), ["q"], ["b"])


def test_responses_without_a_grade_get_what_was_agreed_and_are_counted(serve, in_tmp, capsys):
    judge = GradingJudge(endpoint(serve(lambda messages: "no")), unanswered=1)
    assert score(judge, ["q"] * 2, ["a", "b"]) == [1.0, 1.0]
    judge.release()
    assert "2 without a usable answer" in capsys.readouterr().out


def test_dollars_braces_and_hostile_text_reach_the_judge_as_they_are(serve, in_tmp):
    server = serve(graded_by_length)
    hostile = ["$prompt {x} %s", "\x00", "שלום 👩‍👩‍👧", "<|im_end|>", "", "x" * 100_000, "\ud800"]
    scores = score(GradingJudge(endpoint(server)), ["q"] * len(hostile), hostile)
    assert scores == [1.0 + len(text) % 10 for text in hostile]


# --- comparisons ---


def test_each_two_responses_are_compared_in_both_orders(serve, in_tmp):
    server = serve(longer_wins)
    (P,) = compare(PairwiseJudge(endpoint(server)), ["q"], [["a", "aaa", "bb", "cc"]])
    assert P == [[0.5, 0, 0, 0], [1, 0.5, 1, 1], [1, 0, 0.5, 0.5], [1, 0, 0.5, 0.5]]
    assert len(server.requests) == 12


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"winner": "A"}', 1.0),
        ('```json\n{\n  "winner": "B",\n  "reason": "A or B? B."\n}\n```', 0.0),
        ('{"winner": "tie", "reason": "A is as good"}', 0.5),
        ('{"winner": "A"} It is more helpful.', 1.0),
        ("**Winner:** A", 1.0),
        ("**Winner**: **B**.\n\nB is true.", 0.0),
        ("winner = 'b'", 0.0),
        ("Winner:\nA", 1.0),
        ("Winner: A. It is kinder.", 1.0),
        ("Winner: a tie", 0.5),
        ("Winner: Tie!", 0.5),
        ('<think>winner: A or B?</think>{"winner": "B"}', 0.0),
        ("B", 0.0),
        ("**a tie**", 0.5),
        ("winner: A or B?", None),
        ("winner: A?", None),
        ("winner: A/B", None),
        ("winner: A, B", None),
        ("Winner: a close call", None),
        ("Winner: b, a bit", None),
        ('"winner": "neither"', None),
        ('{"winner": "A"}, "B" or "tie"', None),
        ('{"winner": "A"} or {"winner": "B"} or {"winner": "tie"}', None),
        ("Winner: B\nOr rather, winner: A or B", None),
        ("A?", None),
        ("a tied game", None),
        ("A or B", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_only_where_it_is_one(answer, verdict):
    assert PairwiseJudge.read(answer) == verdict


def test_a_judge_that_looks_only_at_places_decides_nothing_and_is_told_on(serve, in_tmp, capsys):
    judge = PairwiseJudge(endpoint(serve(lambda messages: '{"winner": "A"}')))
    (P,) = compare(judge, ["q"], [["one", "two"]])
    assert P == [[0.5, 0.5], [0.5, 0.5]]
    assert judge.position_bias() == {"pairs": 1.0, "first_place": 1.0, "decided_by_place": 1.0}
    judge.release()
    said = capsys.readouterr().out
    assert "the first place won 100.0% of 2 verdicts; the place alone decided 100.0% of 1 pairs" in said
    assert judge.position_bias() == {}


# --- what goes wrong ---


def test_equal_requests_are_paid_once_and_never_again(serve, in_tmp, capsys):
    server = serve(graded_by_length)
    judge = GradingJudge(endpoint(server, price_input=1.0, price_output=2.0))
    assert score(judge, ["q"] * 3, ["aa", "aa", "bbb"]) == [3.0, 3.0, 4.0]
    assert len(server.requests) == 2
    judge.release()
    assert "2 calls · 0 answers from judge.sqlite · 200 + 20 tokens · cost 0.00024" in capsys.readouterr().out
    again = GradingJudge(endpoint(server))
    assert score(again, ["q"], ["bbb"]) == [4.0]
    assert len(server.requests) == 2
    again.release()
    assert "0 calls · 1 answers from judge.sqlite" in capsys.readouterr().out


def test_servers_that_call_their_models_alike_share_no_answers(serve, in_tmp):
    judges = [GradingJudge(endpoint(serve(lambda messages, grade=grade: grades(grade)))) for grade in (2, 9)]
    assert [score(judge, ["q"], ["a"]) for judge in judges] == [[2.0], [9.0]]
    assert judges[0].identity != judges[1].identity
    first = judges[0]._prompter.client.endpoint
    same = GradingJudge(replace(first, base_url=first.base_url + "/"))
    assert (score(same, ["q"], ["a"]), same.identity) == ([2.0], judges[0].identity)
    assert same._prompter.client.usage.calls == 0


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, "slow down", 0),
        (500, {"Retry-After": "0"}, "oh", 0),
        (200, {}, "{no json", 0),
        (200, {}, '{"error": "none"}', 0),
        (200, {}, "", 3),
    ],
    ids=["429", "500", "malformed", "no completion", "slow"],
)
def test_what_may_pass_is_tried_again(serve, in_tmp, trouble, monkeypatch, capsys):
    monkeypatch.setattr("lit_align.data.scorers.chat_api.random.uniform", lambda low, high: 0.01)
    server = serve(in_turn(trouble, trouble, grades(4)))
    judge = GradingJudge(endpoint(server, timeout=0.5))
    assert score(judge, ["q"], ["a"]) == [4.0]
    assert len(server.requests) == 3
    judge.release()
    assert "1 calls" in (said := capsys.readouterr().out)
    assert "2 retries" in said


@pytest.mark.parametrize("trouble", ["stalls", "is reset"])
def test_a_failure_whose_text_never_ends_is_tried_again_like_any_other(serve, in_tmp, trouble):
    def never_end(handler: BaseHTTPRequestHandler) -> None:
        if trouble == "stalls":
            time.sleep(1)
        else:
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    broken = (503, {"Retry-After": "0", "Content-Length": "500"}, "oops", 0)
    server = serve(in_turn(broken, broken, grades(4)))
    server.behind = lambda handler: never_end(handler) if len(server.requests) < 3 else None
    assert score(GradingJudge(endpoint(server, timeout=0.3)), ["q"], ["a"]) == [4.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ({"prompt_tokens": "n/a", "completion_tokens": 1}, "0 + 1 tokens"),
        ({"prompt_tokens": 1e400, "completion_tokens": 10**30}, "0 + 0 tokens"),
        ({"prompt_tokens": -5, "completion_tokens": [3]}, "0 + 0 tokens"),
        (["n/a"], "0 + 0 tokens"),
        (None, "0 + 0 tokens"),
    ],
)
def test_an_odd_count_of_tokens_loses_no_paid_answer(serve, in_tmp, capsys, usage, told):
    body = json.dumps({"choices": [{"message": {"content": grades(5)}}], "usage": usage})
    server = serve(lambda messages: (200, {}, body, 0))
    judge = GradingJudge(endpoint(server))
    assert score(judge, ["q"], ["a"]) == [5.0]
    judge.release()
    assert told in capsys.readouterr().out
    assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait(serve, in_tmp):
    server = serve(in_turn((429, {"Retry-After": "1"}, "", 0), grades(4)))
    began = time.monotonic()
    score(GradingJudge(endpoint(server)), ["q"], ["a"])
    assert 1 <= time.monotonic() - began < 4
    assert _retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30))) == pytest.approx(30, abs=2)
    assert (_retry_after("soon"), _retry_after(None), _retry_after("-3")) == (None, None, 0.0)


def test_a_judge_that_is_down_is_one_paragraph_and_what_was_answered_is_kept(serve, in_tmp):
    def answer(messages: list[dict[str, str]]) -> Any:
        return graded_by_length(messages) if "short" in messages[0]["content"] else (503, {"Retry-After": "0"}, "", 0)

    server = serve(answer)
    judge = GradingJudge(endpoint(server, concurrency=1))
    assert score(judge, ["q"], ["short"]) == [6.0]
    with pytest.raises(JudgeError, match=r"gave no answer in 3 attempts .* HTTP 503 .* run the same command") as caught:
        score(judge, ["q"] * 2, ["short", "longer"])
    assert "\n" not in str(caught.value)
    server.answer = graded_by_length
    count = len(server.requests)
    assert score(GradingJudge(endpoint(server)), ["q"] * 2, ["short", "longer"]) == [6.0, 7.0]
    assert len(server.requests) == count + 1


def test_nobody_at_the_address_is_said_so(in_tmp, monkeypatch):
    monkeypatch.setattr("lit_align.data.scorers.chat_api.random.uniform", lambda low, high: 0.01)
    there = Endpoint("m", "http://127.0.0.1:9/v1", api_key_variable=None, retries=1, cache="c")
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1 gave no answer in 2 attempts.*Connection ?[Rr]efused"):
        score(GradingJudge(there), ["q"], ["a"])


def test_requests_go_out_together_up_to_the_limit(serve, in_tmp):
    def slowly(messages: list[dict[str, str]]) -> str:
        time.sleep(0.1)
        return graded_by_length(messages)

    server = serve(slowly)
    score(GradingJudge(endpoint(server, concurrency=4)), ["q"] * 12, [str(n) for n in range(12)])
    assert server.most_at_once == 4


def test_the_key_is_sent_and_stands_nowhere_else(serve, in_tmp, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(in_turn(grades(3), (401, {}, f"Incorrect API key provided: {KEY}", 0)))
    judge = GradingJudge(endpoint(server, api_key_variable="JUDGE_KEY"))
    score(judge, ["q"], ["a"])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(
        JudgeError, match=r"refuses the request: HTTP 401 .*provided: \*\*\*.* key in JUDGE_KEY"
    ) as caught:
        score(judge, ["q"], ["b"])
    judge.release()
    assert KEY not in str(caught.value) + capsys.readouterr().out + judge.identity + repr(vars(judge))
    assert KEY.encode() not in Path("judge.sqlite").read_bytes()


@pytest.mark.parametrize("key", ["sk-secret\nsk-more", "sk-secret–xyz", "sk-secret xyz", "sk-secret\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(in_tmp, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(
        UserError, match=r"api_key_variable=JUDGE_KEY: .* white space, or .* as it was issued"
    ) as caught:
        Endpoint("m", api_key_variable="JUDGE_KEY")
    assert "secret" not in str(caught.value)


def test_a_key_spoilt_later_is_refused_unseen(serve, in_tmp, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = GradingJudge(endpoint(serve(lambda messages: grades(3)), api_key_variable="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="JUDGE_KEY") as caught:
        score(judge, ["q"], ["a"])
    assert KEY not in "".join(traceback.format_exception(caught.value)) + capsys.readouterr().out


@pytest.mark.parametrize("path", ["/é", "/echo"])
def test_neither_an_odd_address_nor_an_echo_shows_the_key(serve, in_tmp, monkeypatch, path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(lambda messages: (200, {}, f"you sent Bearer {KEY}", 0))
    server.url += path
    judge = GradingJudge(endpoint(server, api_key_variable="JUDGE_KEY", retries=0))
    with pytest.raises(JudgeError, match=r"Check endpoint.base_url|you sent Bearer \*\*\*") as caught:
        score(judge, ["q"], ["a"])
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_the_key_follows_no_redirection(serve, in_tmp, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = serve(lambda messages: grades(3))
    server = serve(lambda messages: (302, {"Location": other.url}, "", 0))
    with pytest.raises(JudgeError, match="HTTP 302"):
        score(GradingJudge(endpoint(server, api_key_variable="JUDGE_KEY")), ["q"], ["a"])
    assert not other.requests


def test_a_cache_that_is_none_is_set_aside(serve, in_tmp, capsys):
    Path("judge.sqlite").write_text("no data base, whatever its name says" * 100)
    assert score(GradingJudge(endpoint(serve(graded_by_length))), ["q"], ["a"]) == [2.0]
    assert "set aside as judge.sqlite.damaged-" in capsys.readouterr().out


def test_a_folder_or_a_locked_file_is_no_damaged_cache_and_stays_where_it_is(serve, in_tmp, monkeypatch):
    server = serve(graded_by_length)
    Path("runs").mkdir()
    Path("runs/precious.txt").write_text("mine")
    score(judge := GradingJudge(endpoint(server)), ["q"], ["a"])
    judge.release()
    connect = sqlite3.connect
    monkeypatch.setattr(
        "lit_align.data.scorers.chat_api.sqlite3.connect", lambda *a, **k: connect(*a, **k | {"timeout": 0.1})
    )
    lock = connect("judge.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    for cache, cause in {
        "runs": "unable to open",
        "judge.sqlite": "is locked",
        "runs/precious.txt/c.sqlite": "[Nn]ot a directory|exists",
    }.items():
        with pytest.raises(UserError, match=rf"endpoint.cache='{cache}' cannot be opened .*({cause}).*Name a file"):
            score(GradingJudge(endpoint(server, cache=cache)), ["q"], ["b"])
    lock.close()
    assert sorted(path.name for path in Path().iterdir()) == ["judge.sqlite", "runs"]
    assert Path("runs/precious.txt").read_text() == "mine"
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [2.0]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Endpoint("m", "localhost:8000"), "endpoint.base_url='localhost:8000' is no address"),
        (lambda: Endpoint("m", "https://me:secret@host/v1"), "holds a user, password"),
        (lambda: Endpoint("m", api_key_variable="NOT_THERE"), "NOT_THERE: this environment variable is not set"),
        (lambda: Endpoint("m", api_key_variable=None, concurrency=0), "endpoint.concurrency=0 must be at least 1"),
        (lambda: Endpoint("m", api_key_variable=None, temperature=float("nan")), "endpoint.temperature=nan must be"),
        (lambda: GradingJudge(Endpoint("m", api_key_variable=None), "none"), "neither one of hh, tldr nor a text file"),
        (lambda: GradingJudge(Endpoint("m", api_key_variable=None), "bad.txt"), r"must hold \$response, may hold"),
        (lambda: GradingJudge(Endpoint("m", api_key_variable=None), lowest=10), "lowest=10 must be below"),
        (lambda: PairwiseJudge(Endpoint("m", api_key_variable=None), unanswered=2), "must lie in"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(in_tmp, make, message):
    Path("bad.txt").write_text("Grade $reply!")
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "secret" not in str(caught.value)


def test_another_template_or_model_is_another_identity(in_tmp):
    Path("own.txt").write_text("Grade $response to $prompt from $lowest to $highest: {$answer}")
    here = {"api_key_variable": None}
    judges = [GradingJudge(Endpoint(model, **here), name) for model in "ab" for name in ("hh", "tldr", "own.txt")]
    assert len({judge.identity for judge in judges}) == 6


# --- in a round ---


def test_a_round_whose_judge_goes_down_goes_on_where_it_stopped(serve, tiny_model, in_tmp, monkeypatch, capsys):
    """Killed by the judge in the middle of the second sampling batch: neither samples nor calls are repeated."""
    calls: list[str] = []

    def until(messages: list[dict[str, str]]) -> Any:
        calls.append(messages[0]["content"])
        return (503, {"Retry-After": "0"}, "", 0) if len(calls) > 20 else graded_by_length(messages)

    server = serve(until)
    data = on_policy(in_tmp)
    data.scorer = GradingJudge(endpoint(server, concurrency=1, retries=0))
    with pytest.raises(JudgeError):
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)
    answered = set(calls[:20])
    calls.clear()
    server.answer = lambda messages: calls.append(messages[0]["content"]) or graded_by_length(messages)
    monkeypatch.setattr("lit_align.data.samplers.sample_responses", None)
    again = on_policy(in_tmp)
    again.scorer = GradingJudge(endpoint(server))
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), again)
    assert not answered & set(calls)
    rows = again.round_store.scores(again.scorer.identity).read(0)
    assert rows
    assert rows[0].parts
    assert set(rows[0].parts) == set(CRITERIA)
    assert rows[0].scores == rows[0].parts["coherence"]
    assert " calls · " in capsys.readouterr().out


def test_sppo_learns_from_a_judges_comparisons(serve, tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp, pairing=Listwise(), responses_per_prompt=3, sampling_batch_size=12)
    data.scorer = PairwiseJudge(endpoint(serve(longer_wins)))
    fit(SPPO(PolicyConfig(tiny_model), beta=1.0, optimizer=adamw()), data, ReferenceRefresh(1.0, 1, "round"))
    (row, *_) = data.round_store.scores(data.scorer.identity).read(0) or []
    assert row.preferences
    assert row.scores == [pytest.approx((sum(wins) - 0.5) / 2) for wins in row.preferences]
    for example in data.current_round.examples:
        assert example.win_probabilities == pytest.approx([(2 * r + 0.5) / 3 for r in example.rewards])
    assert "position bias" in capsys.readouterr().out


KILLED = """
import sys
from lit_align.data import Endpoint, GradingJudge
from lit_align.data.scorers.base import score
judge = GradingJudge(Endpoint("judge-1", sys.argv[1], None, concurrency=2, cache="judge.sqlite"))
score(judge, ["q"] * 40, ["r" * n for n in range(40)])
"""


def test_calls_already_paid_for_are_not_repeated_after_a_kill(serve, in_tmp):
    def slowly(messages: list[dict[str, str]]) -> str:
        time.sleep(0.1)
        return graded_by_length(messages)

    server = serve(slowly)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, "-c", KILLED, server.url], env=environment)
    while len(server.requests) < 10:
        time.sleep(0.02)
        assert running.poll() is None
    running.kill()
    running.wait()
    with sqlite3.connect("judge.sqlite") as connection:
        (kept,) = connection.execute("SELECT COUNT(*) FROM answers").fetchone()
    assert kept >= 7
    server.requests.clear()
    scores = score(GradingJudge(endpoint(server)), ["q"] * 40, ["r" * n for n in range(40)])
    assert scores == [1.0 + n % 10 for n in range(40)]
    assert len(server.requests) == 40 - kept


MOMENTS = {
    "before an answer is kept": ("lit_align.data.scorers.chat_api", "Cache.put", 20),
    "behind the last answer of a batch": ("lit_align.data.scorers.base", "Scores.__init__", 2),
    "writing the second batch of scores": ("lit_align.data.rounds.store", "os.replace", 5),
    "pairing": ("lit_align.data.pairing", "BestWorst.choose", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_round_killed_anywhere_behind_sampling_asks_only_what_was_not_answered(serve, tiny_model, in_tmp, moment):
    """SIGKILL; what is stored in the end are the bytes of a run that went through."""
    server = serve(graded_by_length)

    def run(name: str) -> None:
        data = on_policy(in_tmp, store=name)
        data.scorer = GradingJudge(endpoint(server, concurrency=1, cache=f"{name}.sqlite"))
        fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), data)

    def doomed() -> None:
        die_at(*MOMENTS[moment])
        run("killed")

    run_in(1, run, "whole")
    questions = len(server.requests)
    server.requests.clear()
    assert fork(doomed) == -signal.SIGKILL, "it was to die, and did not"
    run_in(1, run, "killed")
    lost = moment == "before an answer is kept"  # the one answer under way
    assert len(server.requests) == questions + lost
    whole, killed = ({p.name: p.read_bytes() for p in Path(f).glob("*/*.parquet")} for f in ("whole", "killed"))
    assert whole == killed


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data/quickstart/model").exists(), reason="needs `make install`")
def test_a_real_language_model_judges_two_replies(serve, in_tmp):
    """SmolLM2-135M behind the test's own server: `transformers serve` needs extras that are not installed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "data/quickstart/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lock = threading.Lock()

    def answer(messages: list[dict[str, str]]) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with lock, torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    server = serve(answer)
    slow = {"timeout": 300.0, "concurrency": 1}
    judge = GradingJudge(endpoint(server, **slow), unanswered=1)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    scores = score(judge, [prompt] * 2, ["The capital of France is Paris.", "qwx zzz"])
    assert all(1 <= value <= 10 for value in scores)
    pairwise = PairwiseJudge(endpoint(server, **slow), unanswered=0.5)
    (P,) = compare(pairwise, [prompt], [["The capital of France is Paris.", "qwx zzz"]])
    assert 0 <= P[0][1] <= 1
    answered = judge._prompter.client.usage.calls + pairwise._prompter.client.usage.calls
    assert answered == len(server.requests)
