"""Judges: grades and verdicts, alone and in rounds."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import endpoint, graded_by_length, grades, in_turn, longer_wins
from processes import die_at, fork, run_in
from tiny import adamw, fit, on_policy, round_store

from lit_align.callbacks import ReferenceRefresh
from lit_align.data import Endpoint, GradingJudge, Listwise, PairwiseJudge
from lit_align.data.scorers.base import compare, score
from lit_align.data.scorers.chat_request import JudgeError
from lit_align.data.scorers.judges import CRITERIA
from lit_align.errors import UserError
from lit_align.objectives import DPO, SPPO
from lit_align.policy import PolicyConfig

ROOT = Path(__file__).parents[3]


# --- grades ---


def test_the_reward_is_the_mean_of_the_grades(serve, in_tmp):
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
def test_grades_are_read_from_the_forms_that_models_write(serve, in_tmp, answer):
    assert score(GradingJudge(endpoint(serve(lambda messages: answer))), ["q"], ["a"]) == [7.0]


def test_a_judge_without_a_grade_is_reminded_and_then_named(serve, in_tmp):
    server = serve(in_turn("I like it.", '{"coherence": 11}', grades(5)))
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [5.0]
    assert [len(request["messages"]) for request in server.requests] == [1, 3, 5]
    never = serve(lambda messages: "I like it.")
    with pytest.raises(
        JudgeError, match=r'queried 3 times .* "I like it." \(response "b"\)\. Use .* scorer.unanswered'
    ):
        score(GradingJudge(endpoint(never)), ["q"], ["b"])


def test_a_grade_that_is_cut_at_the_limit_is_not_read(serve, in_tmp):
    """The last grade is 10, and max_tokens ends the answer within it."""
    whole = grades(10)
    choice = {"message": {"content": whole.removesuffix("0}")}, "finish_reason": "length"}
    cut = (200, {}, json.dumps({"choices": [choice]}), 0)
    server = serve(in_turn(cut, whole))
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [10.0]
    assert len(server.requests) == 2


def test_a_judge_that_answers_nothing_gets_no_empty_message_back(serve, in_tmp):
    """A reasoning model that ends within its thoughts; some servers refuse empty messages."""
    server = serve(in_turn("", " ", grades(5)))
    assert score(GradingJudge(endpoint(server)), ["q"], ["a"]) == [5.0]
    assert all(message["content"].strip() for request in server.requests for message in request["messages"])


def test_responses_without_a_grade_get_the_substitute(serve, in_tmp, capsys):
    judge = GradingJudge(endpoint(serve(lambda messages: "no")), unanswered=1)
    assert score(judge, ["q"] * 2, ["a", "b"]) == [1.0, 1.0]
    judge.release()
    assert "2 without a usable answer" in capsys.readouterr().out


def too_long_above(limit: int, answer: Any) -> Any:
    """A server with a short context, in vLLM's words."""
    said = {"error": {"message": "This model's maximum context length is 2048 tokens. However, ...", "code": 400}}

    def reply(messages: list[dict[str, str]]) -> Any:
        whole = sum(len(message["content"]) for message in messages)
        return answer(messages) if whole < limit else (400, {}, json.dumps(said), 0)

    return reply


def test_a_request_that_is_too_long_is_one_item_without_an_answer(serve, in_tmp, capsys):
    server = serve(too_long_above(10_000, lambda messages: grades(7)))
    judge = GradingJudge(endpoint(server), unanswered=1)
    assert score(judge, ["q"] * 3, ["a", "b" * 20_000, "c"]) == [7.0, 1.0, 7.0]
    assert len(server.requests) == 3
    judge.release()
    assert "1 without a usable answer" in capsys.readouterr().out
    with pytest.raises(JudgeError, match=r"does not take a request: HTTP 400 .* \(response .* scorer.unanswered"):
        score(GradingJudge(endpoint(server)), ["q"], ["b" * 20_000])


def test_a_request_that_a_filter_refuses_is_one_item_without_an_answer(serve, in_tmp):
    said = {
        "error": {"message": "The response was filtered by the content management policy", "code": "content_filter"}
    }
    server = serve(lambda messages: (400, {}, json.dumps(said), 0) if "bad" in messages[0]["content"] else grades(7))
    judge = GradingJudge(endpoint(server), unanswered=1)
    assert score(judge, ["q"] * 2, ["bad", "c"]) == [1.0, 7.0]


def test_fields_of_the_request_are_added_and_left_out(serve, in_tmp):
    server = serve(lambda messages: grades(3))
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 900}
    changed, plain = (GradingJudge(endpoint(server, extra_body=each)) for each in (extra, None))
    assert score(changed, ["q"], ["a"]) == score(plain, ["q"], ["a"]) == [3.0]
    assert [sorted(request) for request in server.requests] == [
        ["max_completion_tokens", "messages", "model", "path"],
        ["max_tokens", "messages", "model", "path", "temperature"],
    ]
    assert changed.identity != plain.identity
    with pytest.raises(UserError, match=r"extra_body.model: lit_align sets this field itself"):
        endpoint(server, extra_body={"model": "x"})


def test_a_judge_reads_calls_of_tools(serve, in_tmp):
    server = serve(lambda messages: grades(3))
    calls = [{"function": {"name": "find_bird"}}]
    prompt = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert score(GradingJudge(endpoint(server)), [prompt], ["a"]) == [3.0]
    sent = server.requests[0]["messages"][0]["content"]
    assert "find_bird" in sent
    assert "None" not in sent


def test_a_schema_is_sent_where_the_endpoint_has_it(serve, in_tmp):
    server = serve(in_turn(grades(3), '{"winner": "B"}', '{"winner": "A"}', grades(3)))
    graded = GradingJudge(endpoint(server, json_schema=True))
    assert score(graded, ["q"], ["a"]) == [3.0]
    compare(PairwiseJudge(endpoint(server, json_schema=True, concurrency=1)), ["q"], [["a", "b"]])
    sent = [request["response_format"]["json_schema"]["schema"] for request in server.requests]
    assert sent[0]["properties"]["helpfulness"] == {"type": "integer", "minimum": 1, "maximum": 10}
    assert sent[0]["required"] == list(CRITERIA)
    assert sent[1]["properties"] == {"winner": {"type": "string", "enum": ["A", "B", "tie"]}}
    plain = GradingJudge(endpoint(server))
    score(plain, ["q"], ["a"])
    assert "response_format" not in server.requests[-1]
    assert plain.identity != graded.identity


def test_dollars_braces_and_hostile_text_reach_the_judge_as_they_are(serve, in_tmp):
    server = serve(graded_by_length)
    hostile = ["$prompt {x} %s", "\x00", "שלום 👩‍👩‍👧", "<|im_end|>", "", "x" * 100_000, "\ud800"]
    scores = score(GradingJudge(endpoint(server)), ["q"] * len(hostile), hostile)
    assert scores == [1.0 + len(text) % 10 for text in hostile]


# --- comparisons ---


def test_each_pair_is_compared_in_both_orders(serve, in_tmp):
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
def test_only_a_clear_verdict_is_read(answer, verdict):
    assert PairwiseJudge.read(answer) == verdict


def test_position_bias_counts_no_substituted_verdicts(serve, in_tmp, capsys):
    def only_short(messages: list[dict[str, str]]) -> str:
        return longer_wins(messages) if "mute" not in messages[0]["content"] else "no"

    judge = PairwiseJudge(endpoint(serve(only_short)), unanswered=0.5)
    (P, Q) = compare(judge, ["q"] * 2, [["mute", "aa"], ["b", "bb"]])
    assert (P[0][1], Q[0][1]) == (0.5, 0.0)
    assert judge.position_bias() == {"pairs": 1.0, "first_place": 0.5, "decided_by_place": 0.0}


def test_a_judge_that_looks_only_at_places_is_reported(serve, in_tmp, capsys):
    judge = PairwiseJudge(endpoint(serve(lambda messages: '{"winner": "A"}')))
    (P,) = compare(judge, ["q"], [["one", "two"]])
    assert P == [[0.5, 0.5], [0.5, 0.5]]
    assert judge.position_bias() == {"pairs": 1.0, "first_place": 1.0, "decided_by_place": 1.0}
    judge.release()
    said = capsys.readouterr().out
    assert "the first place won 100.0% of 2 verdicts; the place alone decided 100.0% of 1 pair" in said
    assert judge.position_bias() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Endpoint("m", "localhost:8000"), "endpoint.base_url='localhost:8000' must be an address"),
        (lambda: Endpoint("m", "https://me:secret@host/v1"), "must not contain a user, password"),
        (lambda: Endpoint("m", "https://me:secret@[host/v1"), "must not contain a user, password"),
        (lambda: Endpoint("m", "https://host/v1#secret"), "must not contain .* fragment"),
        (lambda: Endpoint("m", "http://[::1/v1"), "must be an address. Give https://HOST/v1"),
        (lambda: Endpoint("m", "http://host:99999/v1"), "must be an address"),
        (lambda: Endpoint("m", api_key_variable="NOT_THERE"), "NOT_THERE: this environment variable is not set"),
        (lambda: Endpoint("m", api_key_variable=None, concurrency=0), "endpoint.concurrency=0 must be at least 1"),
        (lambda: Endpoint("m", api_key_variable=None, temperature=float("nan")), "endpoint.temperature=nan must be"),
        (lambda: Endpoint("m", api_key_variable=None, timeout=float("inf")), "timeout=inf must be above 0 and finite"),
        (lambda: GradingJudge(Endpoint("m", api_key_variable=None), "none"), "must be one of hh, tldr, or a text file"),
        (
            lambda: GradingJudge(Endpoint("m", api_key_variable=None), "bad.txt"),
            r"must contain \$response and may contain",
        ),
        (lambda: GradingJudge(Endpoint("m", api_key_variable=None), lowest=10), "lowest=10 must be below"),
        (
            lambda: PairwiseJudge(Endpoint("m", api_key_variable=None), unanswered=2),
            r"unanswered=2 must be at least 0 and at most 1",
        ),
    ],
)
def test_impossible_options_are_refused(in_tmp, make, message):
    Path("bad.txt").write_text("Grade $reply!")
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "secret" not in str(caught.value)


def test_template_and_model_enter_the_identity(in_tmp):
    Path("own.txt").write_text("Grade $response to $prompt from $lowest to $highest: {$answer}")
    here = {"api_key_variable": None}
    judges = [GradingJudge(Endpoint(model, **here), name) for model in "ab" for name in ("hh", "tldr", "own.txt")]
    assert len({judge.identity for judge in judges}) == 6


# --- in a round ---


def test_a_round_resumes_where_its_judge_went_down(serve, tiny_model, in_tmp, monkeypatch, capsys):
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
    monkeypatch.setattr("lit_align.data.samplers.generate.sample_responses", None)
    again = on_policy(in_tmp)
    again.scorer = GradingJudge(endpoint(server))
    fit(DPO(PolicyConfig(tiny_model), optimizer=adamw()), again)
    assert not answered & set(calls)
    rows = round_store(again).scores(again.scorer.identity).read(0)
    assert rows
    assert rows[0].parts
    assert set(rows[0].parts) == set(CRITERIA)
    assert rows[0].scores == rows[0].parts["coherence"]
    assert " calls · " in capsys.readouterr().out


def test_sppo_learns_from_a_judges_comparisons(serve, tiny_model, in_tmp, capsys):
    data = on_policy(in_tmp, pairing=Listwise(), responses_per_prompt=3, sampling_batch_size=12)
    data.scorer = PairwiseJudge(endpoint(serve(longer_wins)))
    fit(SPPO(PolicyConfig(tiny_model), beta=1.0, optimizer=adamw()), data, ReferenceRefresh(1.0, 1, "round"))
    (row, *_) = round_store(data).scores(data.scorer.identity).read(0) or []
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


def test_no_call_is_repeated_after_a_kill(serve, in_tmp):
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
    "before an answer is kept": ("lit_align.data.scorers.answer_cache", "AnswerCache.put", 20),
    "after the last answer of a batch": ("lit_align.data.scorers.base", "Scores.__init__", 2),
    "writing the second batch of scores": ("lit_align.data.rounds.store", "os.replace", 5),
    "pairing": ("lit_align.data.pairing", "BestWorst.choose", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_round_killed_after_sampling_repeats_no_request(serve, tiny_model, in_tmp, moment):
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
    """SmolLM2-135M; the test serves it, since `transformers serve` needs extras that are not installed."""
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
