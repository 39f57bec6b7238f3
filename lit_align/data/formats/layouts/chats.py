"""Prompts with one response, labelled responses, chats, prompts, texts."""

from dataclasses import replace
from itertools import groupby

from lit_align.data.formats.column_names import ANSWERS, CHATS, QUESTIONS
from lit_align.data.formats.layouts.layout import (
    IMITATION,
    Layout,
    any_prompt,
    ends_with_assistant,
    has_prompt,
    make_row,
    without_prompt,
)
from lit_align.data.formats.messages import as_answer, trained_turns
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import Kind, Message, Row, Skip

_WHOLE_CHATS = CHATS.removesuffix("|trajectory")
_COMPLETION = "completion|response"
_LABEL = "label|kto_tag|desirable"
_LABELLED: frozenset[Kind] = frozenset({"prompts", "labelled"})
_TEXTS: frozenset[Kind] = frozenset({"texts"})
_PROMPTS: frozenset[Kind] = frozenset({"prompts"})


def _text_row(record: Record) -> Row:
    return Row("", (record.string("text"),), source=record.source)


def _prompt_row(record: Record) -> Row:
    return make_row(record, any_prompt(record), [])


def _completion_row(record: Record) -> Row:
    name, value = record.get(ANSWERS)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    prompt, answer = any_prompt(record), str(value) if is_number else record.text(name)
    return make_row(record, prompt, without_prompt(record, prompt, [answer], name))


def _completion_turns(record: Record) -> list[Row]:
    """One row for each of the assistant's turns in the response, with all that comes before it."""
    _leave_out_undesirable(record)
    row, (name, value) = _completion_row(record), record.get(ANSWERS)
    response = record.text(name) if isinstance(value, list) else ""
    if isinstance(response, str) or isinstance(row.prompt, str):
        return [row]
    given = any_prompt(record)
    start = len(given) if isinstance(given, list) else 1
    whole = [*row.prompt, response[-1]]
    before = len(whole) - len(response)  # turns of the prompt that the response does not repeat
    places = [before + place for place in trained_turns(response)[1] if before + place >= start]
    turns = [_turn(whole, place, record) for place in places]
    if places[:1] == [start]:  # it may continue the prompt's last message
        turns[0] = replace(turns[0], is_new_turn=False)
    return turns


def _leave_out_undesirable(record: Record) -> None:
    """Leave out a response that is labelled false, as for KTO. Other labels, such as 0 or a topic, are not read.

    Raises:
        Skip: it is labelled false.
    """
    name = record.filled(_LABEL)
    if name and str(record.values[name]).strip().lower() in ("true", "false") and not record.label(name):
        raise Skip("responses labelled undesirable")


def _labelled_row(record: Record) -> Row:
    return replace(_completion_row(record), labels=(record.label(_LABEL),))


def _chat(record: Record) -> list[Message]:
    name, value = record.get(_WHOLE_CHATS)
    chat = record.text(name)
    if isinstance(chat, str):
        raise record.wrong(name, value, "a list of messages")
    return chat


def _chat_row(record: Record) -> Row:
    """The assistant's last turn as a response to the turns before it; any other chat is a prompt."""
    chat = _chat(record)
    return make_row(record, None, [chat]) if chat[-1]["role"] == "assistant" else make_row(record, chat, [])


def _chat_turns(record: Record) -> list[Row]:
    """One row for each of the assistant's turns, with all that comes before it."""
    _leave_out_undesirable(record)
    chat, places = trained_turns(_chat(record))
    if places[:1] == [0]:
        record.reading.skipped["turns of the assistant at the start of a chat"] += 1
    return [_turn(chat, place, record) for place in places if place > 0]


def _turn(chat: list[Message], place: int, record: Record) -> Row:
    """The message at a place as the response to all that comes before it."""
    before = chat[:place]
    return Row(before, (as_answer(chat[place]),), source=record.source, is_new_turn=ends_with_assistant(before))


def _holds_chat(record: Record) -> bool:
    """Whether the column holds messages, or spells them out, not a dialogue as plain text."""
    _, value = record.get(_WHOLE_CHATS)
    return not isinstance(value, str) or value.lstrip().startswith("[") or record.has("messages")


def _segment_rows(record: Record) -> list[Row]:
    """One row for each run of segments labelled true, with all that comes before it."""
    name, segments = record.items("segments")
    rows, before = [], ""
    for is_trained, run in groupby(segments, key=lambda segment: _segment(record, name, segment).label("label")):
        text = "".join(_segment(record, name, segment).string("text") for segment in run)
        if is_trained and text:
            rows.append(Row(before, (text,), source=record.source, is_verbatim=True))
        before += text
    return rows


def _segment(record: Record, name: str, value: object) -> Record:
    """A segment as a record of its own."""
    if not isinstance(value, dict) or not {"label", "text"} <= value.keys():
        raise record.wrong(name, value, 'segments like {"label": true, "text": "…"}')
    record.reading.unread |= {f"{name}[].{key}": None for key in value if key not in ("label", "text")}
    return Record(value, record.source, record.reading)


def _labelled_chat_row(record: Record) -> Row:
    return replace(_chat_row(record), labels=(record.label(_LABEL),))


_ANY_PROMPT = f"prompt|{QUESTIONS}"

LAYOUTS = (
    Layout(
        "segments of texts",
        ("segments",),
        _TEXTS,
        lambda record: _segment_rows(record)[-1],
        lambda record: isinstance(record.values["segments"], list | str),
        is_whole=True,
        parse_turns=_segment_rows,
        turns="trained segments",
    ),
    Layout("labelled responses", ("prompt", _COMPLETION, _LABEL), _LABELLED, _labelled_row),
    Layout("labelled chats", (_WHOLE_CHATS, _LABEL), _LABELLED, _labelled_chat_row, _holds_chat),
    Layout(
        "labelled responses",
        (_ANY_PROMPT, ANSWERS, _LABEL),
        _LABELLED,
        _labelled_row,
        has_prompt,
        may_become_chat=True,
    ),
    Layout(
        "prompts with a response",
        ("prompt", _COMPLETION),
        IMITATION,
        _completion_row,
        parse_turns=_completion_turns,
    ),
    Layout("chats", (_WHOLE_CHATS,), IMITATION, _chat_row, _holds_chat, parse_turns=_chat_turns),
    Layout(
        "prompts with a response",
        (_ANY_PROMPT, ANSWERS),
        _TEXTS,
        _completion_row,
        has_prompt,
        may_become_chat=True,
        parse_turns=_completion_turns,
    ),
    Layout("prompts", (_ANY_PROMPT,), _PROMPTS, _prompt_row, has_prompt, may_become_chat=True),
)
TEXTS = (Layout("texts", ("text",), _TEXTS, _text_row, is_whole=True),)
