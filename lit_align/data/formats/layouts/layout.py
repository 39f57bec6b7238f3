"""`Layout`, and the separation of prompt and responses."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_align.data.formats.column_names import PROMPT_BESIDE, QUESTIONS
from lit_align.data.formats.messages import as_answer, without_marks
from lit_align.data.formats.record import Record, either
from lit_align.data.formats.rows import DataError, Kind, Message, Row, Skip, Text, Turns, listing
from lit_align.errors import amount, shown

TURNS = "turns of the assistant"


@dataclass(frozen=True)
class Layout:
    """A layout of columns.

    Args:
        name: Name of the layout, printed when it is detected.
        columns: Columns that a row must have; `a|b` is either.
        kinds: Kinds of data that its rows can be read as.
        parse: Converts a record to a row.
        condition: A further condition on the first record.
        is_whole: Whether the model reads only these columns: not `system` and `tools`, for example.
        may_become_chat: Whether a plain prompt becomes a user's turn if the row has a system message or a history.
        parse_turns: Converts a record to rows of the kind `texts`, one for each part that is trained on.
        turns: Name of these parts; of the assistant's turns, data.turns chooses.
    """

    name: str
    columns: tuple[str, ...]
    kinds: frozenset[Kind]
    parse: Callable[[Record], Row]
    condition: Callable[[Record], bool] = lambda record: True
    is_whole: bool = False
    may_become_chat: bool = False
    parse_turns: Callable[[Record], list[Row]] | None = None
    turns: str = TURNS

    def matches(self, record: Record) -> bool:
        return all(record.has(column) for column in self.columns) and self.condition(record)

    def rows(self, record: Record, kind: Kind, turns: Turns) -> list[Row]:
        """The rows of a record: one, or for texts one of each part that is trained on; or of the last part only."""
        if kind != "texts" or self.parse_turns is None:
            return [self.parse(record)]
        parts = self.parse_turns(record)
        return parts[-1:] if turns == "last" else parts


_DIFFERENT_CHATS = (
    "rows whose responses differ before their last turn (their first answers make pairs with "
    "columns={response_1: conversation_a.1.content, …})"
)

RANKED: frozenset[Kind] = frozenset({"prompts", "preferences", "texts"})
PAIRS: frozenset[Kind] = frozenset({"prompts", "preferences", "labelled", "texts"})
IMITATION: frozenset[Kind] = frozenset({"prompts", "texts"})


# --- the prompt, if no column is named `prompt` ---


def has_prompt_beside(record: Record) -> bool:
    return record.filled(PROMPT_BESIDE) is not None


def has_prompt(record: Record) -> bool:
    return record.has("prompt") or has_prompt_beside(record)


def prompt_beside(record: Record) -> Text:
    """The prompt that a chat, a question, or an instruction with its input holds."""
    name = record.filled(PROMPT_BESIDE) or QUESTIONS
    prompt = record.text(name)
    if name == "instruction" and isinstance(prompt, str) and record.filled("input"):
        prompt = f"{prompt}\n{record.string('input')}"
    return prompt


def any_prompt(record: Record) -> Text:
    return record.text("prompt") if record.has("prompt") else prompt_beside(record)


# --- separating prompt and responses ---


def make_row(record: Record, prompt: Text | None, answers: Sequence[Text]) -> Row:
    """A row of responses, which may repeat the prompt that they answer.

    Args:
        prompt: None if the prompt is the part that all answers share.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) == len(answers):
        if prompt is None:
            prompt, texts = _shared_words(texts)
        return Row(prompt if isinstance(prompt, str) else without_marks(prompt), tuple(texts), source=record.source)
    if texts:
        raise DataError(f"{record.source}: one response is text, another a list of messages. Make them all the same.")
    chats = [without_marks(answer) for answer in answers if isinstance(answer, list)]
    if any(chat[-1]["role"] != "assistant" for chat in chats):
        raise Skip("rows whose last turn is not the assistant's")
    shared = chats[0][:-1]
    if any(chat[:-1] != shared for chat in chats):
        raise Skip(_DIFFERENT_CHATS)
    whole = _joined(record, without_marks(prompt) if isinstance(prompt, list) else prompt, shared)
    if not whole:
        raise Skip("rows without a prompt")
    responses = tuple(as_answer(chat[-1]) for chat in chats)
    return Row(whole, responses, source=record.source, is_new_turn=ends_with_assistant(shared))


def without_prompt(record: Record, prompt: Text, answers: list[Text], columns: str) -> list[Text]:
    """Texts without the prompt that they repeat, if the texts of all of the first rows begin with their prompt.

    Args:
        columns: Those of the texts, `a|b`.
    """
    if not _begin_with(prompt, answers):
        return answers
    reading = record.reading
    if reading.repeats_prompt is None:
        reading.repeats_prompt = len(reading.sample) > 1 and all(
            _begin_with(each.values.get("prompt"), [each.values[name] for name in columns.split("|") if each.has(name)])
            for each in reading.sample
        )
    if not reading.repeats_prompt:
        return answers
    reading.skipped["rows whose responses repeat their prompt, which is read once"] += 1
    return [answer[len(prompt) :] for answer in answers]


def _begin_with(prompt: object, texts: Sequence[object]) -> bool:
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    return all(isinstance(text, str) and text.startswith(prompt) for text in texts)


def ends_with_assistant(chat: list[Message]) -> bool:
    return bool(chat) and chat[-1]["role"] == "assistant"


def _joined(record: Record, prompt: Text | None, shared: list[Message]) -> list[Message]:
    """The prompt and the turns with which all responses begin, each turn once."""
    if prompt is None or prompt == shared[: len(prompt)]:
        return shared
    if isinstance(prompt, str):
        if any(message["role"] == "user" for message in shared):
            _check_among(record, prompt, shared)  # as in UltraFeedback
            return shared
        opens = len(shared) > 0 and shared[0]["role"] in ("system", "developer")
        return [*shared[:opens], {"role": "user", "content": prompt}, *shared[opens:]]
    overlap = next(n for n in range(min(len(prompt), len(shared)), -1, -1) if prompt[len(prompt) - n :] == shared[:n])
    rest = shared[overlap:]
    if rest and rest[0]["role"] in ("system", "developer"):
        if prompt[0]["role"] in ("system", "developer"):
            raise _two_beginnings(record, "a system message")
        return [rest[0], *prompt, *rest[1:]]
    if rest and rest[0]["role"] == prompt[-1]["role"] == "user":
        raise _two_beginnings(record, "a user's turn, as the prompt's end is")
    if rest and rest[0]["role"] == prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{record.source}: the prompt ends with the assistant's message, which the response continues, so the "
            "response must be one message. Begin the response with the whole prompt, or end the prompt before it."
        )
    return [*prompt, *rest]


def _check_among(record: Record, prompt: str, turns: Sequence[Message]) -> None:
    """Make sure that the turns of whole chats hold the prompt of a column beside them."""
    words = "".join(prompt.split())
    if not any(words in "".join((turn["content"] or "").split()) for turn in turns):
        name = next(name for name in record.read if record.values.get(name) == prompt or name == "prompt")
        leave_out = "of `columns`" if name in record.reading.mapped else f"with ignore_columns=[{name}]"
        raise DataError(
            f"{record.source}: `{name}` holds {shown(prompt)}, but the responses are whole chats, and none of their "
            f"turns holds it. Leave it out {leave_out}, or make it a message with which the responses begin."
        )


def _two_beginnings(record: Record, what: str) -> DataError:
    return DataError(
        f"{record.source}: the responses begin with {what}, but not with the turns of the prompt. Make them begin with "
        "the whole prompt, or with the assistant's turn."
    )


def _shared_words(texts: list[str]) -> tuple[str, list[str]]:
    """The words with which all texts begin, and what follows in each, from the space before a word on."""
    if len(set(texts)) == 1:
        raise Skip("rows with equal or empty responses")
    shared = os.path.commonprefix(texts)  # noqa: RUF071  # character by character is what is meant
    if not all(text[len(shared) : len(shared) + 1].isspace() for text in texts):  # it ends within a word
        shared = shared[: len(shared) - len(re.split(r"\s", shared)[-1])].removesuffix(" ")
    if not shared.strip():
        raise Skip("rows without a shared prompt")
    return shared, [text[len(shared) :] for text in texts]


def one_each(record: Record, responses: Sequence[object], *columns: str) -> tuple[float, ...]:
    """One number for each response."""
    numbers = [number for column in columns for number in record.numbers(column)]
    if len(numbers) != len(responses):
        raise DataError(
            f"{record.source}: {amount(len(responses), 'responses')}, but {amount(len(numbers), 'numbers')} in "
            f"{listing(map(either, columns))}. Give one number per response."
        )
    return tuple(numbers)
