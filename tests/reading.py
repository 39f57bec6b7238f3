"""Helpers of the tests of data formats."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from lit_align.data.formats import DataError, Row, Rows, read_rows


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **extras: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extras}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


BIRD = [user("Bird?")]
CROW, STONE = [assistant("Crow")], [assistant("Stone")]
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
COMPARISON = {
    "info": {"id": "t3", "post": " I quit. \n", "title": "Work", "subreddit": "jobs", "site": None, "article": None},
    "summaries": [{"text": " Stayed.", "policy": "sup4"}, {"text": "Left.", "policy": "ref"}],
    "choice": 1,
    "worker": "w",
}


def read(*rows: dict[str, Any], kind: str = "preferences", **options: Any) -> Rows:
    """Write rows to rows.jsonl and read them back."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(file, kind=kind, **options)  # type: ignore[arg-type]


def first(row: dict[str, Any], **options: Any) -> Row:
    """The first row that is read back."""
    return read(row, **options)[0]


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, "one paragraph"
    return text


def refusal(*rows: dict[str, Any], **options: Any) -> str:
    """The message with which rows are refused."""
    return message_of(lambda: read(*rows, **options))
