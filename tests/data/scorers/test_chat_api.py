"""The client of chat endpoints: retries, the key, and the cache, against a real HTTP server."""

import json
import os
import socket
import sqlite3
import struct
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from judge_server import KEY, endpoint, graded_by_length, grades, in_turn
from processes import fork

from lit_align.data import Endpoint, GradingJudge
from lit_align.data.scorers.answer_cache import Answer, AnswerCache
from lit_align.data.scorers.base import score
from lit_align.data.scorers.chat_api import Client
from lit_align.data.scorers.chat_request import JudgeError, retry_after
from lit_align.errors import UserError


def test_equal_requests_are_paid_for_once(serve, in_tmp, capsys):
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
    assert "0 calls · 1 answer from judge.sqlite" in capsys.readouterr().out


def test_processes_that_start_together_pay_once(serve, in_tmp):
    """Two judges with connections of their own ask the same at once; the claim of a process that died does not hold."""

    def slowly(messages: list[dict[str, str]]) -> str:
        time.sleep(0.2)
        return graded_by_length(messages)

    def grade(judge: GradingJudge) -> list[float]:
        return list(score(judge, ["q"] * 4, ["a", "bb", "ccc", "dddd"]))

    def die_while_sending() -> None:
        Client._post = lambda self, body: os._exit(0)  # type: ignore[method-assign]
        grade(GradingJudge(endpoint(server)))

    server = serve(slowly)
    assert fork(die_while_sending) == 0
    judges = [GradingJudge(endpoint(server)) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(grade, judges))
    assert both == [[2.0, 3.0, 4.0, 5.0]] * 2
    assert len(server.requests) == 4
    for judge in judges:
        judge.release()


def test_two_servers_share_no_answers(serve, in_tmp):
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
def test_a_transient_failure_is_retried(serve, in_tmp, trouble, monkeypatch, capsys):
    monkeypatch.setattr("lit_align.data.scorers.chat_api.random.uniform", lambda low, high: 0.01)
    server = serve(in_turn(trouble, trouble, grades(4)))
    judge = GradingJudge(endpoint(server, timeout=0.5))
    assert score(judge, ["q"], ["a"]) == [4.0]
    assert len(server.requests) == 3
    judge.release()
    assert "1 call ·" in (said := capsys.readouterr().out)
    assert "2 retries" in said


@pytest.mark.parametrize("trouble", ["stalls", "is reset"])
def test_a_failure_whose_text_never_ends_is_retried(serve, in_tmp, trouble):
    def never_end(handler: BaseHTTPRequestHandler) -> None:
        if trouble == "stalls":
            time.sleep(1)
        else:
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    broken = (503, {"Retry-After": "0", "Content-Length": "500"}, "oops", 0)
    server = serve(in_turn(broken, broken, grades(4)))
    server.after = lambda handler: never_end(handler) if len(server.requests) < 3 else None
    assert score(GradingJudge(endpoint(server, timeout=0.3)), ["q"], ["a"]) == [4.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("usage", "reported"),
    [
        ({"prompt_tokens": "n/a", "completion_tokens": 1}, "0 + 1 tokens"),
        ({"prompt_tokens": 1e400, "completion_tokens": 10**30}, "0 + 0 tokens"),
        ({"prompt_tokens": -5, "completion_tokens": [3]}, "0 + 0 tokens"),
        (["n/a"], "0 + 0 tokens"),
        (None, "0 + 0 tokens"),
    ],
)
def test_an_invalid_token_count_loses_no_answer(serve, in_tmp, capsys, usage, reported):
    body = json.dumps({"choices": [{"message": {"content": grades(5)}}], "usage": usage})
    server = serve(lambda messages: (200, {}, body, 0))
    judge = GradingJudge(endpoint(server))
    assert score(judge, ["q"], ["a"]) == [5.0]
    judge.release()
    assert reported in capsys.readouterr().out
    assert len(server.requests) == 1


def test_the_server_decides_how_long_to_wait(serve, in_tmp):
    server = serve(in_turn((429, {"Retry-After": "1"}, "", 0), grades(4)))
    began = time.monotonic()
    score(GradingJudge(endpoint(server)), ["q"], ["a"])
    assert 1 <= time.monotonic() - began < 4
    assert retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30))) == pytest.approx(30, abs=2)
    assert (retry_after("soon"), retry_after(None), retry_after("-3")) == (None, None, 0.0)
    assert (retry_after("inf"), retry_after("nan")) == (None, None)


def test_a_judge_that_is_down_is_one_paragraph(serve, in_tmp):
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


def test_a_refused_connection_is_named(in_tmp, monkeypatch):
    monkeypatch.setattr("lit_align.data.scorers.chat_api.random.uniform", lambda low, high: 0.01)
    there = Endpoint("m", "http://127.0.0.1:9/v1", api_key_variable=None, retries=1, cache="c")
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1 gave no answer in 2 attempts.*Connection ?[Rr]efused"):
        score(GradingJudge(there), ["q"], ["a"])


def test_requests_are_concurrent_up_to_the_limit(serve, in_tmp):
    def slowly(messages: list[dict[str, str]]) -> str:
        limit = time.monotonic() + 20
        while server.most_at_once < 4 and time.monotonic() < limit:  # the first four wait for each other
            time.sleep(0.01)
        time.sleep(0.05)  # a fifth one would be seen
        return graded_by_length(messages)

    server = serve(slowly)
    score(GradingJudge(endpoint(server, concurrency=4)), ["q"] * 12, [str(n) for n in range(12)])
    assert server.most_at_once == 4


def test_the_key_is_sent_and_appears_nowhere_else(serve, in_tmp, monkeypatch, capsys):
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
def test_a_key_that_no_header_can_carry_is_refused_unshown(in_tmp, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match=r"api_key_variable=JUDGE_KEY: .* white space or .* as issued") as caught:
        Endpoint("m", api_key_variable="JUDGE_KEY")
    assert "secret" not in str(caught.value)


def test_a_key_that_breaks_later_is_refused_unshown(serve, in_tmp, monkeypatch, capsys):
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


def test_a_file_that_is_not_a_cache_is_set_aside(serve, in_tmp, capsys):
    Path("judge.sqlite").write_text("no data base, whatever its name says" * 100)
    assert score(GradingJudge(endpoint(serve(graded_by_length))), ["q"], ["a"]) == [2.0]
    assert "set aside as judge.sqlite.damaged-" in capsys.readouterr().out


def test_a_folder_or_a_locked_file_is_not_set_aside(serve, in_tmp, monkeypatch, capsys):
    server = serve(graded_by_length)
    Path("runs").mkdir()
    Path("runs/precious.txt").write_text("mine")
    score(judge := GradingJudge(endpoint(server)), ["q"], ["a"])
    judge.release()
    monkeypatch.setattr("lit_align.data.scorers.answer_cache.LOCK_SECONDS", 0.3)
    monkeypatch.setattr("lit_align.data.scorers.answer_cache.NOTICE_SECONDS", 0.1)
    lock = sqlite3.connect("judge.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    for cache, cause in {
        "runs": "unable to open",
        "judge.sqlite": "is locked",
        "runs/precious.txt/c.sqlite": "[Nn]ot a directory|exists",
    }.items():
        with pytest.raises(UserError, match=rf"endpoint.cache='{cache}' cannot be opened .*({cause}).*Name a new file"):
            score(GradingJudge(endpoint(server, cache=cache)), ["q"], ["b"])
    lock.close()
    assert "judge.sqlite is locked by another process; waiting" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["judge.sqlite", "runs"]
    assert Path("runs/precious.txt").read_text() == "mine"
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [2.0]
    assert len(server.requests) == 1


def test_threads_that_wait_for_a_lock_give_up_together(in_tmp, monkeypatch, capsys):
    """A lock that comes during the requests ends them in the time of one wait, however many there are."""
    cache = AnswerCache("judge.sqlite")
    monkeypatch.setattr("lit_align.data.scorers.answer_cache.LOCK_SECONDS", 0.5)
    monkeypatch.setattr("lit_align.data.scorers.answer_cache.NOTICE_SECONDS", 0.1)
    lock = sqlite3.connect("judge.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(cache.put, str(n), "judge", Answer("10", 1, 1, 0.1)) for n in range(6)]
    assert time.monotonic() - started < 2.5
    assert all("is locked" in str(each.exception()) for each in waiting)
    started = time.monotonic()
    with pytest.raises(UserError, match="is locked"):
        cache.release("0")
    assert time.monotonic() - started < 0.4, "a request that gave up is not released after another wait"
    assert "locked by another process; waiting" in capsys.readouterr().out
    lock.close()


# --- the cache ---


def test_a_claim_of_a_process_whose_id_another_has_now_does_not_hold(in_tmp):
    first, second = AnswerCache("judge.sqlite"), AnswerCache("judge.sqlite")
    assert first.claim("request", 60)
    assert not second.claim("request", 60)
    database = sqlite3.connect("judge.sqlite", isolation_level=None)
    database.execute("UPDATE held SET started = '1'")
    database.close()
    assert second.claim("request", 60)


def damage_an_inner_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def test_damage_after_the_first_page_is_set_aside_too(serve, in_tmp, capsys):
    server = serve(graded_by_length)
    score(judge := GradingJudge(endpoint(server)), ["q"], ["a"])
    judge.release()
    damage_an_inner_page(Path("judge.sqlite"))
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [2.0]
    assert "set aside as judge.sqlite.damaged-" in capsys.readouterr().out
    assert len(server.requests) == 2


def test_a_database_with_other_columns_is_refused(serve, in_tmp):
    with sqlite3.connect("judge.sqlite") as other:
        other.execute("CREATE TABLE answers (question TEXT)")
    with pytest.raises(UserError, match=r"endpoint.cache='judge.sqlite' must be a cache .* columns question\."):
        score(GradingJudge(endpoint(serve(graded_by_length))), ["q"], ["a"])


def test_a_cache_that_cannot_grow_says_so(serve, in_tmp):
    judge = GradingJudge(endpoint(serve(lambda messages: grades(4) + " because" * 9000)))
    judge._prompter.client.cache._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(UserError, match=r"endpoint.cache='judge.sqlite' cannot be written \(.*full\).*free space"):
        score(judge, ["q"], ["a"])


ESCAPED = {"JSON": KEY.replace("-", "\\u002d"), "address": KEY.replace("-", "%2D"), "plain": KEY}


@pytest.mark.parametrize("form", ESCAPED)
def test_a_key_that_the_server_echoes_is_hidden(serve, in_tmp, monkeypatch, form):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(lambda messages: (200, {}, f"you sent {ESCAPED[form]}", 0))
    with pytest.raises(JudgeError, match=r"you sent \*\*\*"):
        score(GradingJudge(endpoint(server, api_key_variable="JUDGE_KEY", retries=0)), ["q"], ["a"])
    server.answer = lambda messages: grades(4) + f" {ESCAPED[form]}"
    assert score(GradingJudge(endpoint(server, api_key_variable="JUDGE_KEY")), ["q"], ["a"]) == [4.0]
    assert b"4711" not in Path("judge.sqlite").read_bytes()
