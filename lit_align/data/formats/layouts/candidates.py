"""Numbered or lettered responses (response_1, response_2; answer_a, answer_b) and which of them is better.

A column such as `winner`, a signed strength of the preference, or a column of 0 and 1 for each response names the
better one; or each response has a score.
"""

import re
from dataclasses import dataclass

from lit_align.data.formats.layouts.layout import (
    PAIRS,
    RANKED,
    Layout,
    any_prompt,
    has_prompt_beside,
    make_row,
    one_each,
)
from lit_align.data.formats.layouts.ranked import sorted_row
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, Row, Skip, Text
from lit_align.data.formats.written_out import written_out
from lit_align.errors import shown

_CANDIDATE = re.compile(
    r"(response|answer|output|completion|conversation|human_ref|candidate|summary|generation|reply|model_output)"
    r"[_-]?([0-9]|[a-h])",
    re.IGNORECASE,
)
_WINNER = re.compile(
    r"(winner|better|preferred|preference|choice|chosen|best)(_(id|idx|index|response|answer|output|model))*",
    re.IGNORECASE,
)
_STRENGTH = ("preference_strength", "overall_preference")
"""HelpSteer: negative if the first response is better, positive if the second is."""
_COMPARED = re.compile(r"\[*\s*(\w+)\s*(?:>+|<+|=+)\s*(\w+)\s*\]*")
"""A>B, or [[A>>B]], as judges write it."""
_TIES = ("draw", "both", "bothbad", "both_bad", "neither", "none", "equal", "same", "")
_ORDINALS = {"first": "1", "second": "2", "left": "1", "right": "2"}
_SCORES = ("score", "reward", "rating")
_NOUNS = "model|response|answer|output|completion|assistant|candidate|option|side|system|conversation|summary"
_MODELS = ("model_{}", "model{}", "generator_{}")


@dataclass(frozen=True)
class Candidates:
    """The columns of the responses, in order, and the number or letter at the end of each name."""

    stem: str
    columns: tuple[str, ...]
    suffixes: tuple[str, ...]

    @property
    def are_numbered(self) -> bool:
        return self.suffixes[0].isdigit()


def find_candidates(record: Record) -> Candidates | None:
    """The first family of at least two columns whose names differ in their number or letter."""
    families: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for name in record.values:
        if (match := _CANDIDATE.fullmatch(name)) and record.has(name):
            stem, suffix = match.groups()
            families.setdefault((stem.lower(), suffix.isdigit()), []).append((suffix, name))
    for (stem, _), members in families.items():
        if len(members) >= 2:
            members.sort(key=lambda member: member[0].lower())
            return Candidates(stem, tuple(name for _, name in members), tuple(suffix for suffix, _ in members))
    return None


# --- rows ---


def _won_row(record: Record) -> Row:
    found = _candidates(record)
    winner = _winner(record, found)
    if winner is None:
        raise Skip("rows without a winner")
    prompt, answers = _texts(record, found)
    return make_row(record, prompt, [answers[winner], *answers[:winner], *answers[winner + 1 :]])


def _scored_row(record: Record) -> Row:
    found = _candidates(record)
    prompt, answers = _texts(record, found)
    row = make_row(record, prompt, answers)
    return sorted_row(row, one_each(record, row.responses, *(_score_columns(record, found) or found.columns)))


def _candidates(record: Record) -> Candidates:
    found = find_candidates(record)
    if found is None:
        raise Skip("rows with fewer than two responses")
    return found


def _texts(record: Record, found: Candidates) -> tuple[Text | None, list[Text]]:
    """The prompt, unless the responses are whole chats, and the responses."""
    listed = _listed_turns(record, found)
    if listed is not None:
        return None, listed
    answers = [record.text(column) for column in found.columns]
    if record.has("prompt"):
        return record.text("prompt"), answers
    if any(isinstance(answer, list) and any(each["role"] == "user" for each in answer) for answer in answers):
        return None, answers
    if isinstance(record.values.get("history"), str):
        return record.text("history"), answers
    return any_prompt(record), answers


def _listed_turns(record: Record, found: Candidates) -> list[Text] | None:
    """Chats, if prompt and responses are lists with a text for each turn (lmsys-arena-human-preference)."""
    lists = [_strings(record, name) for name in ("prompt", *found.columns)]
    prompts, *answers = lists
    if prompts is None:
        return None
    if any(answer is None or len(answer) != len(prompts) for answer in answers):
        raise record.wrong("prompt", record.values["prompt"], "as many turns as each response has")
    record.read.update(("prompt", *found.columns))
    if not all(isinstance(text, str) for texts in lists for text in texts or []):
        raise Skip("rows with an empty turn")
    return [
        record.chat("prompt", [{"user": q, "assistant": a} for q, a in zip(prompts, answer or [], strict=True)])
        for answer in answers
    ]


def _strings(record: Record, name: str) -> list[object] | None:
    """A list of texts (None for a missing turn), or its JSON text."""
    value = record.values.get(name)
    if isinstance(value, str) and re.match(r"""\s*\[\s*(["']|null\b|None\b)""", value):
        try:
            value = written_out(value, record.reading.skipped)
        except ValueError:
            return None
    if isinstance(value, list) and value and all(each is None or isinstance(each, str) for each in value):
        return value
    return None


# --- the winner ---


def _winner(record: Record, found: Candidates) -> int | None:
    """The place of the better response; None if no response is better."""
    if columns := _one_hot(record, found):
        marks = [record.label(column) for column in columns]
        return marks.index(True) if sum(marks) == 1 else None
    if found.stem == "human_ref" and record.has("labels"):  # SHP: 1 where the first one is preferred
        return int(not record.label("labels"))
    name = _winner_column(record)
    if name is None:
        return None
    _, value = record.get(name)
    if isinstance(value, str):
        place = _named(record, found, name, value.strip().lower())
        if place != _NUMBER:
            return place
        value = float(_ORDINALS.get(value.strip().lower(), value))
    return _numbered(record, found, name, value)


_NUMBER = -1


def _named(record: Record, found: Candidates, column: str, value: str) -> int | None:
    """The place of the response that a text names; `_NUMBER` if the text is a number."""
    if compared := _COMPARED.fullmatch(value):
        value = "tie" if "=" in value else compared[1 if ">" in value else 2]
    if value.startswith("tie") or value in _TIES:
        return None
    if value in _ORDINALS or re.fullmatch(r"-?\d+(\.\d+)?", value):
        return _NUMBER
    for place, (name, suffix) in enumerate(zip(found.columns, found.suffixes, strict=True)):
        for model in (pattern.format(each) for each in (suffix, "abcdefgh"[place]) for pattern in _MODELS):
            if isinstance(of := record.values.get(model), str) and of.strip().lower() == value:
                record.read.add(model)
                return place
        if value == name.lower():
            return place
    for place, suffix in enumerate(found.suffixes):
        if re.fullmatch(rf"((the[ _-])?({_NOUNS}|{found.stem})[ _-]?)?({suffix.lower()}|{'abcdefgh'[place]})", value):
            return place
    for place, name in enumerate(found.columns):
        if record.values[name] == record.values[column]:
            return place
    raise record.wrong(column, record.values[column], f"the name of the better response ({', '.join(found.columns)})")


def _numbered(record: Record, found: Candidates, column: str, value: object) -> int | None:
    """The place of the response that a number means."""
    number = record.number(column, value)
    if column in _STRENGTH:
        return None if number == 0 else int(number > 0)
    if 0 < number < len(found.columns) and number % 1 == 0.5:  # halfway between two
        return None
    place = int(number) - _first_number(record, found, column)
    if number % 1 or not 0 <= place < len(found.columns):
        raise record.wrong(column, value, f"the number of the better response ({', '.join(found.columns)})")
    return place


def _first_number(record: Record, found: Candidates, column: str) -> int:
    """The number that means the first response: as in the columns' names, or as the first rows show."""
    seen = {_whole(each.values.get(column)) for each in (record, *record.reading.sample)}
    if found.are_numbered and ("winner" not in record.reading.mapped or 0 not in seen):
        return int(found.suffixes[0])
    if 0 in seen:
        return 0
    if len(found.columns) in seen:
        return 1
    raise DataError(
        f"{record.source}: `{column}` holds {shown(record.values[column])} in each of the first rows, so it is "
        f"not clear whether 0 or 1 means `{found.columns[0]}`. Set columns={{response_1: …, response_2: …, winner: "
        f"{column}}}, where 1 means response_1."
    )


def _whole(value: object) -> int | None:
    try:
        return int(float(value)) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _winner_column(record: Record) -> str | None:
    names = [name for name in record.values if record.has(name)]
    strengths = [name for name in names if name in _STRENGTH]
    winners = [name for name in names if _WINNER.fullmatch(name) and name not in _STRENGTH]
    return next(iter([*winners, *strengths]), None)


def _one_hot(record: Record, found: Candidates) -> list[str] | None:
    for pattern in ("winner_model_{}", "winner_{}"):
        columns = [pattern.format(suffix) for suffix in found.suffixes]
        if all(map(record.has, columns)):
            if record.has("winner_tie"):
                record.read.add("winner_tie")
            return columns
    return None


def _score_columns(record: Record, found: Candidates) -> list[str] | None:
    for kind in _SCORES:
        for pattern in ("{kind}_{suffix}", "{kind}{suffix}", "{column}_{kind}", "{kind}_{column}"):
            columns = [
                pattern.format(kind=kind, suffix=suffix, column=column)
                for column, suffix in zip(found.columns, found.suffixes, strict=True)
            ]
            if all(map(record.has, columns)):
                return columns
    return None


# --- conditions ---


def _has_winner(record: Record) -> bool:
    found = find_candidates(record)
    if found is None or not _has_prompt(record, found):
        return False
    named = _one_hot(record, found) or _winner_column(record)
    return bool(named) or (found.stem == "human_ref" and record.has("labels"))


def _has_scores(record: Record) -> bool:
    found = find_candidates(record)
    return found is not None and _has_prompt(record, found) and _score_columns(record, found) is not None


def _has_prompt(record: Record, found: Candidates) -> bool:
    whole = not isinstance(record.values[found.columns[0]], str) or found.stem == "conversation"
    return whole or record.has("prompt|history") or has_prompt_beside(record)


LAYOUTS = (
    Layout("pairs with a winner", (), PAIRS, _won_row, _has_winner, may_become_chat=True),
    Layout("responses with a score each", (), RANKED, _scored_row, _has_scores, may_become_chat=True),
)
