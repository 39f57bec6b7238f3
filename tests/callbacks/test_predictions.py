"""Answers in the files of AlpacaEval and MT-Bench."""

import json
import re
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import pytest
from tiny import write_pairs

from lit_align.callbacks import Predictions
from lit_align.callbacks.predictions import Predicted
from lit_align.data import OfflinePairs, Sampling
from lit_align.data.formats.rows import Row
from lit_align.data.sampling import Response
from lit_align.data.scorers.base import GroupScores
from lit_align.errors import UserError
from lit_align.objectives import DPO, RewardModel
from lit_align.policy import PolicyConfig


def predict(model: str, folder: Path, questions: list[dict], **options) -> str:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    predictions = Predictions("questions.jsonl", sampling=Sampling(max_new_tokens=6), **options)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[predictions], default_root_dir="run"
    )
    trainer.predict(DPO(PolicyConfig(model)), OfflinePairs(write_pairs(folder)))
    return Path("run", options["out"]).read_text()


def test_alpaca_evals_file_has_each_instruction_with_its_answer(tiny_model, in_tmp, capsys):
    questions = [{"instruction": f"Say {i}.", "output": "", "dataset": "helpful_base"} for i in range(3)]
    rows = json.loads(predict(tiny_model, in_tmp, questions, out="a.json", format="alpaca_eval", name="mine"))
    assert [row["instruction"] for row in rows] == ["Say 0.", "Say 1.", "Say 2."]
    assert all(row.keys() == {"instruction", "output", "generator", "dataset"} for row in rows)
    assert {row["generator"] for row in rows} == {"mine"}
    assert any(row["output"] for row in rows)
    assert re.search(r"cut        \d of 3 responses, at predictions.sampling.max_new_tokens", capsys.readouterr().out)


def test_mt_benchs_second_turn_follows_the_models_own_answer(tiny_model, in_tmp, monkeypatch):
    from lit_align.callbacks import predictions

    asked = []
    tokenize = predictions.tokenize_prompts

    def spy(rows, *args):
        asked.extend(row.prompt for row in rows)
        return tokenize(rows, *args)

    monkeypatch.setattr(predictions, "tokenize_prompts", spy)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
        {"question_id": 82, "category": "math", "turns": ["Add."]},
    ]
    text = predict(tiny_model, in_tmp, questions, out="m.jsonl", format="mt_bench", responses_per_prompt=2)
    first, second = map(json.loads, text.splitlines())
    assert (first["question_id"], first["model_id"]) == (81, "run")
    assert [choice["index"] for choice in first["choices"]] == [0, 1]
    assert [len(choice["turns"]) for choice in first["choices"]] == [2, 2]
    assert [len(choice["turns"]) for choice in second["choices"]] == [1, 1]
    chats = [chat for chat in asked if len(chat) == 3]
    assert [chat[1] for chat in chats] == [
        {"role": "assistant", "content": choice["turns"][0]} for choice in first["choices"]
    ]
    assert [chat[2]["content"] for chat in chats] == ["Shorter.", "Shorter."]


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"out": "a.json", "format": "alpaca_eval"}, [{"prompt": "x"}], "questions.jsonl:1: the row has no text `inst"),
        ({"out": "a.jsonl", "format": "mt_bench"}, [{"turns": "x"}], "questions.jsonl:1: the row has no list of texts"),
        ({"out": "a.jsonl", "format": "mt_bench"}, [{"turns": ["x"]}], "the row has no `question_id`"),
    ],
)
def test_other_rows_are_named(tiny_model, in_tmp, options, rows, message):
    with pytest.raises(UserError, match=message):
        predict(tiny_model, in_tmp, rows, **options)


def test_options_without_effect_are_refused():
    with pytest.raises(UserError, match=r"format=alpaca_eval, its name must end in \.json\."):
        Predictions("p.jsonl", format="alpaca_eval")
    with pytest.raises(UserError, match=r"predictions.name=x has no effect because format=rows"):
        Predictions("p.jsonl", name="x")


def test_columns_of_a_table_are_those_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_align.callbacks.predictions.ROWS_AT_ONCE", 2)
    chats = [[{"role": "user", "content": f"{n}"} | ({"name": "Ann"} if n == 4 else {})] for n in range(5)]
    rows = [Row(chat, source=f"p:{n}") for n, chat in enumerate(chats)]
    responses = [[Response([n], f"r{n}", True)] for n in range(5)]
    scores = [GroupScores([float(n)]) for n in range(5)]
    predicted = Predicted(rows, responses, scores)
    predicted.write_parquet(tmp_path / "p.parquet")
    predicted.write_lines(tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == [{"source": f"p:{n}", "prompt": chats[n], "responses": [f"r{n}"], "scores": [n]} for n in range(5)]
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row | {"prompt": None} for row in table] == [row | {"prompt": None} for row in lines]
    assert [row["prompt"][0]["name"] for row in table] == [None] * 4 + ["Ann"]
    assert "scores" not in next(iter(Predicted(rows, responses, None)))


def test_a_reward_model_is_refused_before_it_is_loaded(tiny_model, in_tmp):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[Predictions("prompts.jsonl")])
    with pytest.raises(UserError, match="predict: RewardModel gives no responses"):
        trainer.predict(RewardModel(PolicyConfig("no such model")), OfflinePairs(write_pairs(in_tmp)))


def test_calls_of_tools_are_json_in_a_table(tmp_path):
    calls = [[{"function": {"name": "f", "arguments": each}}] for each in ({}, {"x": 1}, {"x": "one"})]
    rows = [Row([{"role": "assistant", "content": None, "tool_calls": call}]) for call in calls]
    Predicted(rows, [[Response([1], "r", True)]] * 3, None).write_parquet(tmp_path / "p.parquet")
    found = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [json.loads(row["prompt"][0]["tool_calls"]) for row in found] == calls


def test_a_name_with_a_folder_is_not_of_the_runs_folder(in_tmp):
    Predictions("p.jsonl", out="./here.jsonl").write(Predicted([], [], None), Path("run"))
    Predictions("p.jsonl", out="there.jsonl").write(Predicted([], [], None), Path("run"))
    assert Path("here.jsonl").exists()
    assert Path("run/there.jsonl").exists()


def test_prompts_beyond_the_models_positions_are_refused(tiny_model, in_tmp):
    Path("questions.jsonl").write_text(json.dumps({"prompt": "x" * 505}) + "\n")
    predictions = Predictions("questions.jsonl", sampling=Sampling(max_new_tokens=60))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[predictions])
    with pytest.raises(UserError, match=r"sampling.max_new_tokens=60 must be at most .* of questions.jsonl has"):
        trainer.predict(DPO(PolicyConfig(tiny_model)), OfflinePairs(write_pairs(in_tmp)))
