"""Preference pairs: a chosen response and one or more rejected ones."""

import re
from dataclasses import replace

from lit_align.data.formats.column_names import PROMPT_BESIDE, QUESTIONS
from lit_align.data.formats.layouts.layout import (
    PAIRS,
    Layout,
    any_prompt,
    has_prompt_beside,
    make_row,
    one_each,
    prompt_beside,
    without_prompt,
)
from lit_align.data.formats.record import Record, is_several
from lit_align.data.formats.rows import DataError, Message, Row, Skip, Text
from lit_align.errors import shown

CHOSEN = "chosen|chosen_response|preferred_output|preferred_response|response_chosen|response_j"
REJECTED = (
    "rejected|rejected_response|non_preferred_output|dispreferred_output|dispreferred_response|response_rejected|"
    "response_k"
)
_PROMPT_NAMES = (*QUESTIONS.split("|"), "user", "human", "prompts", "prompt_text", "system", "system_prompt")
_SCORE = ("score", "reward", "rating")
_CHOSEN_REWARD = "|".join(f"{n}_chosen|chosen_{n}|chosen-{n}" for n in _SCORE)
_REJECTED_REWARD = "|".join(f"{n}_rejected|rejected_{n}|rejected-{n}" for n in _SCORE)


def _explicit_pair(record: Record) -> Row:
    prompt = record.text("prompt")
    return _pair(record, prompt, without_prompt(record, prompt, _answers(record), f"{CHOSEN}|{REJECTED}"))


def _pair_beside(record: Record) -> Row:
    return _pair(record, prompt_beside(record), _answers(record))


def _implicit_pair(record: Record) -> Row:
    answers = _answers(record)
    _check_prompt_is_shared(record, answers)
    return _pair(record, None, answers)


def _check_prompt_is_shared(record: Record, answers: list[Text]) -> None:
    """Check that no other column holds the prompt: the words that the texts share are only a guess."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    for name, value in record.values.items():
        if name in record.read or not isinstance(value, str) or not value.strip() or not texts:
            continue
        if (len(value.split()) > 1 or name in _PROMPT_NAMES) and not all(value.strip() in text for text in texts):
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, which may belong to the prompt, but nothing reads "
                f"it, and the responses do not repeat it. Read it with columns={{prompt: {name}}}, or leave it out "
                f"with ignore_columns=[{name}]."
            )


def _transcript_pair(record: Record) -> Row:
    """Anthropic's HH: whole dialogues as text, each turn opened by a blank line and its speaker."""
    return _pair(record, None, [_dialogue(record.string(column)) for column in ("chosen", "rejected")])


def _rejected_chat(record: Record) -> Row:
    """ms-swift: a whole chat, and a rejected version of its last turn or of the chat."""
    chosen = record.text("messages")
    if isinstance(chosen, str):
        raise record.wrong("messages", chosen, "a list of messages")
    if record.has("rejected_messages"):
        return _pair(record, None, [chosen, record.text("rejected_messages")])
    texts = record.texts("rejected_response")
    rejected: list[Text] = [
        [*chosen[:-1], {"role": "assistant", "content": text}] if isinstance(text, str) else [*chosen[:-1], *text]
        for text in texts
    ]
    return _pair(record, None, [chosen, *rejected])


def _rejected_beside_response(record: Record) -> Row:
    return _pair(record, any_prompt(record), [record.text("response"), *record.texts("rejected_response")])


def _answers(record: Record) -> list[Text]:
    return [record.text(CHOSEN), *record.texts(REJECTED)]


def _pair(record: Record, prompt: Text | None, answers: list[Text]) -> Row:
    row = make_row(record, prompt, answers)
    if not (record.has(_CHOSEN_REWARD) or record.has(_REJECTED_REWARD)):
        return row
    if not record.has(_CHOSEN_REWARD) or not record.has(_REJECTED_REWARD):
        sides = (_CHOSEN_REWARD, _REJECTED_REWARD)
        if not all(any(each.has(side) for each in record.reading.sample) for side in sides):
            return row  # the data have numbers for one side alone, which are listed as unread
        name, value = record.get(f"{_CHOSEN_REWARD}|{_REJECTED_REWARD}")
        raise DataError(
            f"{record.source}: `{name}` holds {shown(value)}, but the other side of the pair has no number. Give both "
            f"or neither, or leave it out with ignore_columns=[{name}]."
        )
    return replace(row, rewards=one_each(record, row.responses, _CHOSEN_REWARD, _REJECTED_REWARD))


# --- conditions ---


def _has_several(record: Record) -> bool:
    return is_several(record.values.get("rejected"))


def _holds_its_prompt_beside(record: Record) -> bool:
    """Whether the prompt is in a separate column, which the responses do not repeat."""
    if not has_prompt_beside(record):
        return False
    answers = _answers(record)
    if any(isinstance(answer, list) and any(each["role"] == "user" for each in answer) for answer in answers):
        return False
    name = record.filled(PROMPT_BESIDE)
    question = record.values.get(name or "")
    return not (isinstance(question, str) and all(_begins_with(answer, question.strip()) for answer in answers))


def _begins_with(answer: Text, question: str) -> bool:
    return isinstance(answer, str) and answer.lstrip().startswith(question)


# --- transcripts ---

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _are_transcripts(record: Record) -> bool:
    values = [record.values[name] for name in ("chosen", "rejected")]
    return all(isinstance(value, str) and _TURN.match(value) for value in values)


def _dialogue(transcript: str) -> list[Message]:
    before, *turns = _TURN.split(transcript)
    if before.strip() or not turns:
        raise Skip("rows that are not transcripts")
    return [
        {"role": _SPEAKERS[speaker], "content": words.strip()}
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]


LAYOUTS = (
    Layout(
        "preferences with several rejected responses",
        ("prompt", "chosen", "rejected"),
        PAIRS,
        _explicit_pair,
        _has_several,
    ),
    Layout("preference pairs with an explicit prompt", ("prompt", CHOSEN, REJECTED), PAIRS, _explicit_pair),
    Layout(
        "preference pairs in Human/Assistant transcripts",
        ("chosen", "rejected"),
        PAIRS,
        _transcript_pair,
        _are_transcripts,
    ),
    Layout(
        "preference pairs with the prompt in another column",
        (PROMPT_BESIDE, CHOSEN, REJECTED),
        PAIRS,
        _pair_beside,
        _holds_its_prompt_beside,
        may_become_chat=True,
    ),
    Layout("preference pairs with an implicit prompt", (CHOSEN, REJECTED), PAIRS, _implicit_pair),
    Layout("chats with a rejected answer", ("messages", "rejected_response|rejected_messages"), PAIRS, _rejected_chat),
    Layout(
        "responses with a rejected one",
        (f"prompt|{PROMPT_BESIDE}", "response", "rejected_response"),
        PAIRS,
        _rejected_beside_response,
        may_become_chat=True,
    ),
)
