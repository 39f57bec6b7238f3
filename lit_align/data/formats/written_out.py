"""Values that a text spells out, and halves of surrogate pairs in texts."""

import ast
import json
import re
from collections import Counter
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def written_out(text: str, skipped: Counter[str]) -> Any:
    """The value that a text spells out in JSON, or as Python prints it.

    Args:
        skipped: Counts the texts in it that are changed.

    Raises:
        ValueError: the text is neither.
    """
    value = _parsed(text)
    return without_surrogates(value, skipped) if has_surrogate(text) else value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError("neither JSON nor a Python literal") from error


def has_surrogate(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a part of a text may spell out half a surrogate pair, or holds one."""
    return bool(_SURROGATE.search(text, start, len(text) if end is None else end))


def without_surrogates(value: Any, skipped: Counter[str]) -> Any:
    """The value with � for half a surrogate pair, which is not a character that a tokenizer or a file can take."""
    if isinstance(value, dict):
        return {without_surrogates(key, skipped): without_surrogates(each, skipped) for key, each in value.items()}
    if isinstance(value, list):
        return [without_surrogates(each, skipped) for each in value]
    if not isinstance(value, str):
        return value
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole != value:
        skipped["texts with half a surrogate pair, now �"] += 1
    return whole
