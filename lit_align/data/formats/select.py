"""Selection of the parts of a row that each kind of data needs."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from lit_align.data.formats.rows import Kind, Row, is_blank, is_imitable


def _select_prompts(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Prompts; a prompt of several rows with a response each is taken once, unless their columns are kept."""
    seen: set[bytes] = set()
    for row in rows:
        chat = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        text = json.dumps([chat, row.tools, dict(row.template_args)], default=str)
        key = hashlib.sha256(text.encode()).digest()[:16]
        if row.responses and key in seen and not row.columns:
            skipped["repeated prompts"] += 1
            continue
        seen.add(key)
        yield replace(row, responses=(), rewards=None, labels=None, cut=None)


def _select_preferences(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Rows with a best response and others that differ from it."""
    for row in rows:
        texts = row.responses
        kept = [k for k, text in enumerate(texts) if not is_blank(text) and text not in texts[:k]]
        if len(kept) < 2 or kept[0] != 0:
            skipped["rows with equal or empty responses"] += 1
            continue
        best, *others = [row.rewards[k] for k in kept] if row.rewards else [0.0]
        if others and best < max(others):
            skipped["rows whose chosen response has not the highest reward"] += 1
            continue
        if not row.prompt:
            skipped["prompts without any text"] += 1
        if len(kept) < len(texts):
            skipped["repeated or empty responses"] += len(texts) - len(kept)
            row = row.of_responses(kept)
        yield row


def _select_labelled(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Rows with labels; the first response of a preference is desirable, the others are not."""
    for row in rows:
        if row.labels is None:
            for pair in _select_preferences(iter([row]), skipped):
                yield replace(pair, labels=(True, *[False] * (len(pair.responses) - 1)))
        elif not row.responses:
            skipped["rows whose last turn is not the assistant's"] += 1
        elif not is_blank(row.responses[0]):
            yield row
        else:
            skipped["rows with an empty response"] += 1


def _select_texts(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Prompts with the one response to imitate."""
    for row in rows:
        if is_imitable(row):
            yield replace(row.of_responses([0]), rewards=None, labels=None)
        else:
            skipped["rows without a response"] += 1


SELECT: dict[Kind, Callable[[Iterator[Row], Counter[str]], Iterator[Row]]] = {
    "prompts": _select_prompts,
    "preferences": _select_preferences,
    "labelled": _select_labelled,
    "texts": _select_texts,
}
