"""Questions and answers in the files of AlpacaEval and MT-Bench.

| benchmark | questions | answers |
|---|---|---|
| alpaca_eval | JSON or JSONL rows with `instruction` | a JSON list: `instruction`, `output`, `generator`, `dataset` |
| mt_bench | JSONL rows with `question_id` and `turns`, a list of texts | JSONL rows as FastChat's judge reads them |

A question is asked as a chat; each turn after the first follows the model's own answers to the turns before it. A model
without a chat template continues the instruction as plain text, which has one turn.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, Message, Row, Rows
from lit_align.data.formats.sources import read_records
from lit_align.errors import UserError

Benchmark = Literal["alpaca_eval", "mt_bench"]

Answers = list[list[str]]
"""Answers to one question: for each sample, one to each turn."""


@dataclass(frozen=True)
class Question:
    """A question of one or more turns of the user.

    Attributes:
        source: File and row.
        fields: The row's other values.
    """

    source: str
    turns: list[str]
    fields: dict[str, Any]


def read_questions(path: str, benchmark: Benchmark) -> list[Question]:
    """The questions of a file.

    Raises:
        DataError: the file cannot be read, is empty, or a row is not a question of the benchmark.
    """
    read = {"alpaca_eval": _instruction, "mt_bench": _turns}[benchmark]
    questions = [read(record) for record in read_records(path, None, Counter())]
    if not questions:
        raise DataError(f"{path}: the file has no question. Give one with at least one.")
    return questions


def _instruction(record: Record) -> Question:
    if not isinstance(instruction := record.values.get("instruction"), str):
        raise DataError(
            f"{record.source}: the row has no text `instruction`, which predictions.format=alpaca_eval reads. Give "
            "AlpacaEval's file, or leave predictions.format out."
        )
    return Question(record.source, [instruction], {**record.values})


def _turns(record: Record) -> Question:
    turns = record.values.get("turns")
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise DataError(
            f"{record.source}: the row has no list of texts `turns`, which predictions.format=mt_bench reads. Give "
            "MT-Bench's question.jsonl, or leave predictions.format out."
        )
    if "question_id" not in record.values:
        raise DataError(f"{record.source}: the row has no `question_id`, by which MT-Bench finds its answer. Add it.")
    return Question(record.source, turns, {**record.values})


def ask(
    questions: Sequence[Question],
    samples: int,
    is_chat: bool,
    respond: Callable[[Rows, int, int], list[list[str]]],
) -> list[Answers]:
    """The model's answers to the questions, turn by turn.

    Args:
        samples: Answers to each question.
        is_chat: The model has a chat template.
        respond: Gives, for rows, the number of the turn and a count, so many responses to each row.

    Raises:
        UserError: a question has several turns, and the model has no chat template.
    """
    answers: list[Answers] = [[[] for _ in range(samples)] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [(i, question) for i, question in enumerate(questions) if turn < len(question.turns)]
        if turn and not is_chat:
            raise UserError(
                f"{asked[0][1].source}: the question has several turns, but the model has no chat template. Set "
                "data.chat_template, or ask questions of one turn."
            )
        count = 1 if turn else samples  # each first answer is continued on its own
        places = [(i, question, sample) for i, question in asked for sample in range(samples if turn else 1)]
        rows = [_row(question, turn, answers[i][sample], is_chat, sample) for i, question, sample in places]
        given = respond(Rows(rows, "questions", "", Counter()), turn, count)
        for (i, _, sample), texts in zip(places, given, strict=True):
            for k, text in enumerate(texts):
                answers[i][sample + k].append(text)
    return answers


def _row(question: Question, turn: int, answers: list[str], is_chat: bool, sample: int) -> Row:
    """The prompt of one turn, after the answers to the turns before it."""
    source = f"{question.source}, turn {turn + 1}, sample {sample + 1}" if turn else question.source
    if not is_chat:
        return Row(question.turns[0], source=source)
    chat: list[Message] = []
    for said, answered in zip(question.turns[:turn], answers, strict=True):
        chat += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return Row([*chat, {"role": "user", "content": question.turns[turn]}], source=source)


def answers_file(questions: Sequence[Question], answers: Sequence[Answers], benchmark: Benchmark, model: str) -> str:
    """The content of the benchmark's file of answers.

    Args:
        model: Its name in the benchmark's tables.
    """
    pairs = list(zip(questions, answers, strict=True))
    if benchmark == "mt_bench":
        now = time.time()
        return "".join(
            json.dumps(
                {
                    "question_id": question.fields["question_id"],
                    "answer_id": hashlib.sha256(f"{model} {question.source}".encode()).hexdigest()[:22],
                    "model_id": model,
                    "choices": [{"index": index, "turns": turns} for index, turns in enumerate(given)],
                    "tstamp": now,
                },
                ensure_ascii=False,
            )
            + "\n"
            for question, given in pairs
        )
    rows = [
        {"instruction": question.turns[0], "output": turns[0], "generator": model}
        | {key: question.fields[key] for key in ("dataset",) if key in question.fields}
        for question, given in pairs
        for turns in given
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
