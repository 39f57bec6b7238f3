"""Columns of the prompts' rows as further arguments of a function."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from scoring import message_of
from tiny import fit, on_policy, write_prompts

from lit_align.callbacks import WinRate
from lit_align.data import EnsembleScorer, FunctionScorer, OnPolicyPairs, PairwiseFunctionScorer
from lit_align.data.scorers.base import compare, score
from lit_align.errors import UserError
from lit_align.objectives import DPO
from lit_align.policy import PolicyConfig

ROWS = [{"question": f"{i} + {i}?", "answer": str(2 * i), "level": [i]} for i in range(4)]


def equal(prompts: list[Any], responses: list[str], answer: list[str]) -> list[float]:
    return [float(response == right) for response, right in zip(responses, answer, strict=True)]


def of_trl(completions: list[str], answer: Any = None, **kwargs: Any) -> list[float]:
    assert kwargs["level"] == [[int(right) // 2] for right in answer]
    return equal(kwargs["prompts"], completions, answer)


def written(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("function", [equal, of_trl, lambda answer, responses: equal([], responses, answer)])
def test_each_response_gets_the_values_of_its_prompt(in_tmp: Path, function: Any):
    scorer = FunctionScorer(function, batch_size=2, rows=written(ROWS))
    prompts = ["3 + 3?", "1 + 1?", [{"role": "user", "content": "2 + 2?"}], "1 + 1?"]
    assert score(scorer, prompts, ["6", "3", "4", "2"]) == [1, 0, 1, 1]
    assert FunctionScorer(function, rows=ROWS).identity == scorer.identity  # type: ignore[arg-type]  # rows of Python
    assert "answer" in EnsembleScorer({"a": scorer, "b": scorer}).reads


def test_a_comparison_gets_the_values_of_its_prompt(in_tmp: Path):
    def prefer(prompt: Any, responses: list[str], answer: str) -> list[list[float]]:
        return [[0.5 + 0.5 * ((a == answer) - (b == answer)) for b in responses] for a in responses]

    scorer = PairwiseFunctionScorer(prefer, rows=written(ROWS))
    assert compare(scorer, ["2 + 2?"], [["5", "4"]]) == [[[0.5, 0.0], [1.0, 0.5]]]


def test_prompts_are_made_of_the_same_columns_as_the_datas(in_tmp: Path):
    rows = [{"a": i, "context": "ignored", "b": "+ 1", "answer": str(i + 1)} for i in range(3)]
    prompt = {"prompt": "{a} {b}"}
    scorer = FunctionScorer(equal, rows=written(rows), columns=prompt, ignore_columns=["context"])
    assert score(scorer, ["2 + 1"], ["3"]) == [1]

    def reads_all(completions: list[str], a: Any, context: Any) -> list[float]:
        assert (a, context) == ([2], ["ignored"])  # those of the prompt and the ignored ones, too
        return [1.0]

    assert score(
        FunctionScorer(reads_all, rows="rows.jsonl", columns=prompt, ignore_columns=["context"]), ["2 + 1"], [""]
    )


def test_the_identity_follows_the_values_that_the_function_reads(in_tmp: Path):
    def identity(**changes: Any) -> str:
        return FunctionScorer(equal, rows=written([{**row, **changes} for row in ROWS])).identity

    assert identity() == identity(level=7) != identity(answer="1")


def test_rows_with_a_response_are_all_read(in_tmp: Path):
    rows = [{"prompt": "1 + 1?", "completion": text, "answer": answer} for text, answer in (("a", "2"), ("b", "3"))]
    message = message_of(UserError, FunctionScorer, equal, rows=written(rows))
    assert "rows.jsonl:1 and rows.jsonl:2 have the same prompt" in message
    assert score(FunctionScorer(equal, rows=written([{**row, "answer": "2"} for row in rows])), ["1 + 1?"], ["2"]) == [
        1
    ]


def test_rows_may_be_a_split_of_a_saved_data_set(in_tmp: Path):
    parts = {name: Dataset.from_list([{"prompt": name, "answer": name}]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk("saved")
    assert score(FunctionScorer(equal, rows="saved", rows_split="test"), ["test"], ["test"]) == [1]


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (equal, {}, ["must take two arguments", "set scorer.rows"]),
        (of_trl, {"columns": {"prompt": "question"}}, ["scorer.columns=", "no effect without scorer.rows"]),
        (lambda prompts, responses: [1.0], {"rows": "rows.jsonl"}, ["rows has no effect", "question, answer, level"]),
        (lambda prompts, responses, solution: [1.0], {"rows": "rows.jsonl"}, ["question, answer, level. Change its"]),
        (lambda question, answer: [1.0], {"rows": "rows.jsonl"}, ["reward(prompts, responses)", "further arguments"]),
        (equal, {"rows": "other.jsonl"}, ["no such file"]),
        (equal, {"rows": [*ROWS, {"question": "1 + 1?", "answer": "3"}]}, ["2 and rows.jsonl:5 have the same prompt"]),
    ],
)
def test_arguments_and_columns_that_do_not_fit_are_named(in_tmp: Path, function: Any, options: Any, words: list[str]):
    written(ROWS)
    message = message_of(UserError, FunctionScorer, function, **options)
    for word in words:
        assert word in message, message


def test_a_prompt_without_a_row_is_named_before_anything_is_sampled(tiny_model: str, in_tmp: Path, capsys: Any):
    def reward(responses: list[str], answer: list[str]) -> list[float]:
        return [sum(map(ord, response)) % 17 + float(right) for response, right in zip(responses, answer, strict=True)]

    def run(rows: str, *callbacks: WinRate) -> OnPolicyPairs:
        data = on_policy(in_tmp)
        data.prompts, data.scorer = "train.jsonl", FunctionScorer(reward, rows=rows)
        fit(DPO(PolicyConfig(tiny_model)), data, *callbacks, max_epochs=1)
        return data

    prompts = [json.loads(line) for line in Path(write_prompts(in_tmp)).read_text().splitlines()]
    written([{**row, "answer": "7", "unread": 1} for row in prompts], "train.jsonl")
    assert ("not read", "unread") in run("train.jsonl").describe()
    capsys.readouterr()
    with pytest.raises(
        UserError, match=r'rows=rows.jsonl must have a row for each prompt, and none has "Prompt number'
    ):
        run(written(ROWS))
    held_out = WinRate(written([{"prompt": "Another"}], "test.jsonl"), FunctionScorer(reward, rows="train.jsonl"))
    with pytest.raises(UserError, match=r'rows=train.jsonl must have a row for each prompt, and none has "Another"'):
        run("train.jsonl", held_out)
    assert "sample" not in capsys.readouterr().out
