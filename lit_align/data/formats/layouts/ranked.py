"""Several responses with a reward or a rank each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lit_align.data.formats.column_names import PROMPT_BESIDE, RESPONSES
from lit_align.data.formats.layouts.layout import (
    RANKED,
    Layout,
    any_prompt,
    has_prompt,
    make_row,
    one_each,
)
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import Row

REWARDS = "rewards|scores|ratings"
RANKS = "ranks|ranking|rankings"

_TEXT_KEYS = ("response", "completion", "answer", "output", "generation", "text", "content", "message", "messages")
_REWARD_KEYS = ("reward", "overall_score", "score", "rating", "pm_score")
_RANK_KEYS = ("rank", "ranking")


def _by_reward(record: Record) -> Row:
    return best_first(record, _row(record), REWARDS)


def _by_rating(record: Record) -> Row:
    return best_first(record, _row(record), "rating|score")


def _by_rank(record: Record) -> Row:
    return best_first(record, _row(record), RANKS, lambda rank: -rank)


def _row(record: Record) -> Row:
    name, values = record.items(RESPONSES)
    texts = Record({name: values}, record.source, record.reading).texts(name)
    return replace(make_row(record, any_prompt(record), texts), cut=record.cut)


def best_first(record: Record, row: Row, column: str, reward: Callable[[float], float] = lambda number: number) -> Row:
    return sorted_row(row, [reward(number) for number in one_each(record, row.responses, column)])


def sorted_row(row: Row, rewards: Sequence[float]) -> Row:
    """The responses in order of their rewards, the best first."""
    order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
    return replace(row, rewards=tuple(rewards)).of_responses(order)


# --- responses that are objects: {"answer": "…", "rank": 1} ---


def _objects_row(record: Record) -> Row:
    name, values = record.items(RESPONSES)
    texts, rewards = [], []
    for value in values:
        if not isinstance(value, dict):
            raise record.wrong(name, value, 'responses like {"response": "…", "score": 1.0}')
        inner = Record(value, record.source, record.reading)
        texts.append(inner.text("|".join(_TEXT_KEYS)))
        key = _number_key(value)
        if key is None:
            raise record.wrong(name, value, f"a number in one of {', '.join((*_REWARD_KEYS, *_RANK_KEYS))}")
        number = inner.number(key, value[key])
        inner.read.add(key)
        rewards.append(-number if key in _RANK_KEYS else number)
        for other in value:
            if other not in inner.read:
                record.reading.unread[f"{name}[].{other}"] = None
    return sorted_row(make_row(record, any_prompt(record), texts), rewards)


def _number_key(value: dict[str, Any]) -> str | None:
    return next((key for key in (*_REWARD_KEYS, *_RANK_KEYS) if value.get(key) is not None), None)


def _holds_objects(record: Record) -> bool:
    name = record.filled(RESPONSES)
    if not name or not has_prompt(record):
        return False
    values = record.values[name]
    first = values[0] if isinstance(values, list) and values else None
    return isinstance(first, dict) and _number_key(first) is not None and not {*first}.isdisjoint(_TEXT_KEYS)


def _has_list_of_ratings(record: Record) -> bool:
    """Whether the ratings are one for each response, as distilabel writes them."""
    return isinstance(record.get("rating|score")[1], list) and has_prompt(record)


_PROMPT = f"prompt|{PROMPT_BESIDE}"
_BY_REWARD, _BY_RANK = "ranked responses with rewards", "ranked responses, rank 1 the best"

NAMED = (
    Layout(_BY_REWARD, ("prompt", "responses|completions", "rewards|scores"), RANKED, _by_reward),
    Layout(_BY_RANK, ("prompt", "responses|completions", "ranks"), RANKED, _by_rank),
)
"""Layouts that no pair of columns in the same row replaces."""
FOUND = (
    Layout(_BY_REWARD, (_PROMPT, RESPONSES, REWARDS), RANKED, _by_reward, has_prompt, may_become_chat=True),
    Layout(
        _BY_REWARD,
        (_PROMPT, RESPONSES, "rating|score"),
        RANKED,
        _by_rating,
        _has_list_of_ratings,
        may_become_chat=True,
    ),
    Layout(_BY_RANK, (_PROMPT, RESPONSES, RANKS), RANKED, _by_rank, has_prompt, may_become_chat=True),
    Layout(
        "responses with a reward or rank each",
        (_PROMPT, RESPONSES),
        RANKED,
        _objects_row,
        _holds_objects,
        may_become_chat=True,
    ),
)
