"""From files to rows: sources of prompts and preferences, their formats detected by their columns.

A source is a .jsonl, .json or .parquet file, a folder saved by `datasets`, or a hub name. The first format in `FORMATS`
whose columns the first row has is taken for all rows; it is named on the screen. Every error names file and row, what
was found, and the mend; rows that a rule skips are counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_align.errors import UserError

Message = dict[str, str]
Text = str | list[Message]
"""Plain text, or a chat: messages with `role` and `content`."""

Kind = Literal["prompts", "preferences"]


class DataError(UserError):
    """A source that cannot be read, or a row that is not what its format needs."""


class _Skip(Exception):
    """A row is left out by a stated rule."""


@dataclass(frozen=True)
class Row:
    """One prompt with its responses."""

    prompt: Text
    responses: tuple[str, ...] = ()  # the chosen one first; none for a mere prompt
    rewards: tuple[float, ...] | None = None
    source: str = ""  # "file.jsonl:17", counted from 1


@dataclass
class Rows(Sequence[Row]):
    """All rows of a source."""

    rows: list[Row]
    description: str  # the format, in words
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@dataclass(frozen=True)
class Format:
    """How rows with certain columns are read.

    Args:
        columns: All of these must be there.
        parse: Gives prompt, responses and rewards of a row; raises `ValueError` with what is wrong.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Row]


def read_rows(path: str, *, split: str | None = None, kind: Kind) -> Rows:
    """Read a source whole.

    Args:
        path: .jsonl, .json or .parquet file, folder saved by `datasets`, or hub name.
        split: Of a saved or hub data set; None is "train".
        kind: Whether the rows are mere prompts, or preferences between responses.

    Raises:
        DataError: the source is missing or empty, is no JSON, or a row lacks what its format needs.
    """
    rows = Rows([], "")
    chosen: Format | None = None
    for source, row in _records(path, split):
        if not isinstance(row, dict):
            raise DataError(f"{source}: a row must be an object with named columns, not {_shown(row)}.")
        if chosen is None:
            chosen = _detect(source, row, kind)
            rows.description = f"{chosen.name} ({', '.join(chosen.columns)})"
        try:
            parsed = chosen.parse(_Columns(row))
        except _Skip as reason:
            rows.skipped[str(reason)] += 1
            continue
        except ValueError as error:
            raise DataError(f"{source}: {error} The format, by the first row, is: {rows.description}.") from error
        rows.rows.append(Row(parsed.prompt, parsed.responses, parsed.rewards, source))
    if chosen is None:
        raise DataError(f"{path}: there is no row in it.")
    return rows


# --- sources ---


def _records(path: str, split: str | None) -> Iterator[tuple[str, Any]]:
    """Each row with its place, counted from 1."""
    file = Path(path)
    if file.suffix in (".jsonl", ".json", ".parquet"):
        if not file.is_file():
            raise DataError(f"{path}: there is no such file.")
        if split is not None:
            raise DataError(f"{path}: a file has no splits; leave split={split!r} out.")
        yield from {".jsonl": _json_lines, ".json": _json_file, ".parquet": _parquet}[file.suffix](file)
    elif file.is_dir():
        yield from _saved(path, split)
    else:
        yield from _hub(path, split)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{file}:{number}: no JSON ({error.msg} at column {error.colno}).") from error


def _json_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: no JSON ({error.msg}). A file with one object per line must end in .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: must hold a list of rows, not {_shown(rows)}.")
    yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, start=1))


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except pa.ArrowException as error:
        raise DataError(f"{file}: no Parquet file ({error}).") from error


def _saved(path: str, split: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no folder saved by `datasets.save_to_disk`.") from error
    yield from _numbered(path, loaded, split)


def _hub(path: str, split: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(path)
    except Exception as error:  # the hub's errors are of many types, and all of them mean this
        raise DataError(
            f"{path!r} is no .jsonl, .json or .parquet file, no folder, and no data set that the hub gives us "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
    yield from _numbered(path, loaded, split)


def _numbered(path: str, loaded: Any, split: str | None) -> Iterator[tuple[str, Any]]:
    if hasattr(loaded, "keys"):
        name = split or "train"
        if name not in loaded:
            raise DataError(f"{path}: has no split {name!r}, but {', '.join(loaded)}. Name one of these.")
        loaded = loaded[name]
        path = f"{path}[{name}]"
    elif split is not None:
        raise DataError(f"{path}: is one data set without splits; leave split={split!r} out.")
    yield from ((f"{path}:{number}", row) for number, row in enumerate(loaded, start=1))


# --- formats ---


class _Columns(dict[str, Any]):
    """A row whose missing or empty columns are a clear error."""

    def __missing__(self, column: str) -> Any:
        raise ValueError(f"has no column {column!r}; its columns are: {', '.join(self) or 'none'}.")

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, str):
            raise ValueError(f"column {column!r} must be text, not {_shown(value)}.")
        return value

    def chat_or_text(self, column: str) -> Text:
        value = self[column]
        return value if isinstance(value, str) else _chat(column, value)


def _chat(column: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be text or a list of messages, not {_shown(value)}.")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"column {column!r} must hold messages with `role` and `content`, not {_shown(message)}.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _reply(column: str, value: Any) -> str:
    """A response that is text, or a chat of one message by the assistant."""
    if isinstance(value, str):
        return value
    chat = _chat(column, value)
    if len(chat) != 1:
        raise ValueError(f"column {column!r} must hold one message beside an explicit prompt, not {len(chat)}.")
    return chat[0]["content"]


def _prompt(row: _Columns) -> Row:
    return Row(row.chat_or_text("prompt"))


def _messages(row: _Columns) -> Row:
    chat = _chat("messages", row["messages"])
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat:
        raise ValueError("column 'messages' has no message before the assistant's.")
    return Row(chat)


def _explicit(row: _Columns) -> Row:
    prompt = row.chat_or_text("prompt")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1 and isinstance(rejected[0], dict):
        return _implicit(row)  # UltraFeedback: whole chats, the prompt beside them
    several = rejected if isinstance(rejected, list) and all(isinstance(r, str) for r in rejected) else [rejected]
    if not several:
        raise ValueError("column 'rejected' is an empty list.")
    return _pair(prompt, _reply("chosen", chosen), *(_reply("rejected", r) for r in several))


def _implicit(row: _Columns) -> Row:
    chosen, rejected = row.chat_or_text("chosen"), row.chat_or_text("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "\n\nAssistant:" in chosen and "\n\nHuman:" in chosen:
            chosen, rejected = _transcript("chosen", chosen), _transcript("rejected", rejected)
        else:
            raise ValueError(
                "columns 'chosen' and 'rejected' are plain texts without a 'prompt' column, and no "
                "'\\n\\nHuman: … \\n\\nAssistant: …' transcripts, so that the prompt is unknown."
            )
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("columns 'chosen' and 'rejected' must both be texts, or both chats.")
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != rejected[-1]["role"]:
        raise _Skip("whose chats differ before the last message")
    if len(chosen) < 2:
        raise ValueError("columns 'chosen' and 'rejected' have a single message: there is no prompt.")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _transcript(column: str, text: str) -> list[Message]:
    """Anthropic's HH transcripts as a chat."""
    roles = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    chat: list[Message] = []
    rest = text if text.startswith("\n\n") else f"\n\n{text}"
    while rest:
        mark = next((mark for mark in roles if rest.startswith(mark)), None)
        if mark is None:
            raise ValueError(f"column {column!r} must begin with 'Human:' or 'Assistant:', not {_shown(rest.strip())}.")
        rest = rest[len(mark) :]
        ends = [place for other in roles if (place := rest.find(other)) >= 0]
        end = min(ends, default=len(rest))
        chat.append({"role": roles[mark], "content": rest[:end].strip()})
        rest = rest[end:]
    return chat


def _ranked(row: _Columns) -> Row:
    responses, rewards = row["responses"], row["rewards"]
    if not isinstance(responses, list) or not isinstance(rewards, list) or len(responses) != len(rewards):
        raise ValueError("columns 'responses' and 'rewards' must be lists of one length.")
    if len(responses) < 2:
        raise _Skip("with fewer than two responses")
    if not all(isinstance(r, int | float) and not isinstance(r, bool) and r == r for r in rewards):
        raise ValueError(f"column 'rewards' must hold numbers, not {_shown(rewards)}.")
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    texts = tuple(_reply("responses", responses[i]) for i in order)
    return Row(row.chat_or_text("prompt"), texts, tuple(float(rewards[i]) for i in order))


def _pair(prompt: Text, chosen: str, *rejected: str) -> Row:
    different = [text for text in rejected if text != chosen]
    if not different:
        raise _Skip("whose responses are equal")
    return Row(prompt, (chosen, *different))


FORMATS = [
    Format("prompts", "prompts", ("prompt",), _prompt),
    Format("prompts from chats", "prompts", ("messages",), _messages),
    Format("prompts of preference pairs", "prompts", ("chosen", "rejected"), lambda row: Row(_implicit(row).prompt)),
    Format("rewarded responses with explicit prompts", "preferences", ("prompt", "responses", "rewards"), _ranked),
    Format("pairs with explicit prompts", "preferences", ("prompt", "chosen", "rejected"), _explicit),
    Format("pairs with shared prompts", "preferences", ("chosen", "rejected"), _implicit),
]


def _detect(source: str, row: dict[str, Any], kind: Kind) -> Format:
    of_kind = [form for form in FORMATS if form.kind == kind]
    for form in of_kind:
        if all(column in row for column in form.columns):
            return form
    raise DataError(
        f"{source}: no known format of {kind} has the columns {', '.join(row) or '(none)'}. Needed are: "
        + "; or ".join(", ".join(form.columns) for form in of_kind)
        + "."
    )


def _shown(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
