r"""Mapping of columns by the user: `columns: {prompt: "{instruction}\n{input}", chosen: answers.0.text}`.

A target is a column that layouts read. Its source is the name of a column, a dotted path into one, or a template with
names or paths in braces. A template's line is left out if all of its fields are empty.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

from lit_align.data.formats.record import Reading, Record
from lit_align.data.formats.rows import DataError, is_empty, listing
from lit_align.data.formats.written_out import written_out
from lit_align.errors import shown

TARGETS = {
    "prompt": "the prompt, text or messages",
    "messages": "a whole chat",
    "text": "a text without a prompt",
    "segments": "parts of a text, each with a label: whether it is trained on",
    "completion": "the one response",
    "chosen": "the better response",
    "rejected": "the worse response, or several",
    "responses": "several responses",
    "rewards": "their rewards",
    "ranks": "their ranks, 1 the best",
    "score_chosen": "the reward of the chosen response",
    "score_rejected": "the reward of the rejected response",
    "response_1": "one of two responses",
    "response_2": "the other one",
    "winner": "which of the two is better",
    "label": "whether the response is desirable",
    "weight": "the weight of the row in the loss and in all means",
    "system": "the system message",
    "history": "earlier turns",
    "prefix": "the beginning of the response, given with the prompt",
    "tools": "functions for the chat template",
    "documents": "documents for the chat template",
}

OTHER_ITEMS = "[…]"
"""Ends the name of a column with the items of a list that no path of the user's mapping leads to."""

Value = Callable[[Record], Any]


def check_columns(columns: Mapping[str, str], sample: Sequence[Record]) -> None:
    """Check that a mapping's targets, templates and columns exist.

    Args:
        sample: The first rows; a column must be in one of them.
    """
    known = dict.fromkeys(name for record in sample for name in record.values)
    for target, made_of in columns.items():
        if target not in TARGETS:
            raise DataError(
                f"columns={{{target}: …}}: {target!r} must be one of {listing(TARGETS)}. Change the name on the left."
            )
        for path in _paths(target, made_of):
            if path not in known and _steps(path)[0] not in known:
                raise DataError(
                    f"{sample[0].source}: columns={{{target}: {shown(made_of)}}} must name columns of the data, and "
                    f"there is no column {path!r}. The columns are {listing(known)}."
                )


def mapped(columns: Mapping[str, str]) -> Callable[[Record, Reading], Record]:
    """A function that turns a raw record into one with the targets."""
    values = {target: _value(target, made_of) for target, made_of in columns.items()}
    paths = {path for target, made_of in columns.items() for path in _paths(target, made_of)}

    def apply(record: Record, reading: Reading) -> Record:
        record = replace(record, reading=reading, read=set())
        if not values:
            return record
        used = {path if path in record.values else _steps(path)[0] for path in paths}
        rest = {name: value for name, value in record.values.items() if name not in used and name not in values}
        for name in (name for name in record.values if name in used and name not in paths):
            rest |= _siblings(name, record.values[name], paths)
        made = {target: value(record) for target, value in values.items()}
        return replace(record, values=made | rest, read=set())

    return apply


def _siblings(name: str, value: Any, paths: Collection[str]) -> dict[str, Any]:
    """Values of an object that no path leads to, as columns such as info.context; those of a list as one column."""
    followed = {_steps(path)[1] for path in paths if _steps(path)[0] == name and len(_steps(path)) > 1}
    if isinstance(value, list):
        places = {int(step) % len(value) for step in followed if re.fullmatch(r"-?\d+", step)} if value else set()
        return {f"{name}{OTHER_ITEMS}": [each for place, each in enumerate(value) if place not in places]}
    if not isinstance(value, Mapping):
        return {}
    return {f"{name}.{key}": each for key, each in value.items() if key not in followed}


def _paths(target: str, made_of: str) -> list[str]:
    if "{" not in made_of:
        return [made_of]
    return [path for _, path in _pieces(target, made_of) if path is not None]


def _value(target: str, made_of: str) -> Value:
    if "{" not in made_of:
        return lambda record: follow(record, made_of)
    lines = [_pieces(target, line) for line in _lines(made_of)]
    return lambda record: _filled(record, lines)


def follow(record: Record, path: str) -> Any:
    """The value at a dotted path; None if the row has none."""
    if path in record.values:
        return record.values[path]
    value: Any = record.values
    for step in _steps(path):
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                value = written_out(value, record.reading.skipped)
            except ValueError:
                raise record.wrong(path, value, "an object or a list to follow the path into") from None
        if isinstance(value, list) and re.fullmatch(r"-?\d+", step):
            value = value[int(step)] if -len(value) <= int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _steps(path: str) -> list[str]:
    return [step for step in re.split(r"[.\[\]]", path) if step] or [path]


# --- templates ---


def _lines(template: str) -> list[str]:
    r"""The template's lines; on a command line, a new line is often written as \n."""
    return template.replace("\\n", "\n").replace("\\t", "\t").split("\n")


def _pieces(target: str, template: str) -> list[tuple[str, str | None]]:
    """Literal text, and the path of the field that follows it."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"columns={{{target}: {shown(template)}}} must be a template such as '{{question}}' ({error}). Write "
            "braces that belong to the text twice."
        ) from error
    if any(path == "" or conversion for _, path, _, conversion in parsed):
        raise DataError(
            f"columns={{{target}: {shown(template)}}} must have the name of a column in each pair of braces. Write "
            "braces that belong to the text twice."
        )
    return [(text, path if not spec else f"{path}:{spec}") for text, path, spec, _ in parsed]


def _filled(record: Record, lines: list[list[tuple[str, str | None]]]) -> str:
    """The filled-in template; a line whose fields are all empty is left out, with the blank lines before it."""
    kept: list[str] = []
    dropped_first = False
    for pieces in lines:
        fields = [_field(record, path) for _, path in pieces if path is not None]
        if fields and not any(fields):
            while kept and not kept[-1]:
                kept.pop()
            dropped_first |= not kept
        elif pieces or not dropped_first or any(kept):
            kept.append(_line(pieces, fields))
    return "\n".join(kept)


def _line(pieces: list[tuple[str, str | None]], fields: list[str]) -> str:
    """One line; the space before an empty field (after it, if it is the first) is left out too."""
    line, after_empty = "", False
    values = iter(fields)
    for text, path in pieces:
        if path is None:
            line += text
            continue
        value = next(values)
        if not value and not text.strip():
            after_empty |= not line
            continue
        line += (text.lstrip() if after_empty and not line else text) + value
    return line


def _field(record: Record, path: str) -> str:
    value = follow(record, path)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if is_empty(value):
        return ""
    raise record.wrong(path, value, "text to fill a template with")
