"""Columns that nothing reads: they are reported, or stop the run if a row may be incomplete without them."""

import re
from collections.abc import Iterator, Mapping

from lit_align.data.formats.column_names import ANSWERS, QUESTIONS
from lit_align.data.formats.columns import OTHER_ITEMS
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, Kind, Row, answer_text, is_empty, listing
from lit_align.errors import shown

_MEDIA = re.compile(r"(image|picture|photo|audio|video|sound|speech)s?(_(path|url|file|name|byte)s?)?", re.IGNORECASE)
_OF_JUDGES = re.compile(r"(labell?ing|judge|annotation|grading|scoring)_", re.IGNORECASE)
"""Beginning of columns with a judge's own chat, which is not part of the row's."""
_THOUGHTS = re.compile(
    r"(\w+_)?(thinking|thoughts?|reasoning|rationale|cot|chain_of_thought)(_(trajector(y|ies)|contents?|steps|text))?",
    re.IGNORECASE,
)
"""Names of columns that hold thoughts, which belong before an answer that is imitated."""

_CONTEXT = frozenset(
    """
    prompt prompts input inputs context contexts document documents docs passage passages paragraph paragraphs article
    tools functions system system_prompt system_message history trajectory initial_reason_steps prefix dialog dialogs
    dialogue dialogues conversation conversations messages chat question questions query instruction instructions
    problem premise hypothesis background knowledge evidence facts schema preamble persona choices options
    quote quotes excerpt excerpts snippet snippets abstract table tables hint hints demonstrations constraints scenario
    """.split()  # noqa: SIM905  # one name a line would hide the code
)
"""Names of columns that usually belong to the prompt."""


def check_unread(row: Row, record: Record, kind: Kind, *, is_whole: bool) -> None:
    """Report unread columns; stop at a column that may belong to the prompt and is not repeated in the row.

    Args:
        is_whole: Whether the row is known to be complete, so that only images and sound can be missing.

    Raises:
        DataError: such a column is not empty; or the row is a text to imitate, and thoughts are in another column.
    """
    unread = {name: value for name, value in record.values.items() if name not in record.read and not is_empty(value)}
    _check_media(unread, record.source)
    for name, value in unread.items():
        is_chat = _is_chat(value) and not _OF_JUDGES.match(name) and not name.endswith(OTHER_ITEMS)
        belongs = _stem(name.lower().rpartition(".")[2]) in _CONTEXT or is_chat
        if belongs and not is_whole and not _is_repeated(value, row):
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, which may belong to the prompt, but nothing reads "
                f"it. {_advice(name, value, row, record)}, or leave it out with ignore_columns=[{name}]."
            )
        if kind == "texts" and not is_whole and _THOUGHTS.fullmatch(name) and not _is_repeated(value, row):
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, which may belong to the response, but nothing reads "
                f"it. {_advice_on_thoughts(name, value, record)} with ignore_columns=[{name}]."
            )
        record.reading.unread[name] = None


def _check_media(unread: Mapping[str, object], source: str) -> None:
    if media := [name for name, value in unread.items() if _MEDIA.fullmatch(_stem(name)) or _holds_bytes(value)]:
        holds, columns = ("holds", "column") if len(media) == 1 else ("hold", "columns")
        raise DataError(
            f"{source}: {listing(f'`{name}`' for name in media)} {holds} {shown(unread[media[0]])}, but images and "
            f"sound are not read. Leave the {columns} out with ignore_columns=[{listing(media)}] if the text is "
            "complete without."
        )


def _stem(name: str) -> str:
    """A column's name without its number: context_1, context2."""
    return re.sub(r"[_-]?\d+$", "", name)


def _advice_on_thoughts(name: str, value: object, record: Record) -> str:
    """How to put thoughts before the answer, if that is possible, or to leave them out."""
    answer = next((each for each in ANSWERS.split("|") if isinstance(record.values.get(each), str)), None)
    first = value[0] if isinstance(value, list) and value else value
    if answer is None or not isinstance(first, str):
        return "Leave it out"
    path = f"{name}.0" if isinstance(value, list) else name
    template = rf"<think>\n{{{path}}}\n</think>\n\n{{{answer}}}"
    prompt = _prompt_columns(record)
    before = f"prompt: {prompt[0]}, " if prompt and prompt != ["prompt"] else ""
    return f"Put it before the answer, for example with columns={{{before}completion: '{template}'}}, or leave it out"


def _advice(name: str, value: object, row: Row, record: Record) -> str:
    if name in ("tools", "functions", "documents"):
        chat = "" if isinstance(row.prompt, list) else ", which makes the prompt a user's turn"
        target = "documents" if name == "documents" else "tools"
        return f"Hand it to the chat template with columns={{{target}: {name}}}{chat}"
    prompt = _prompt_columns(record)
    if isinstance(value, list):
        if _is_chat(value) or not (prompt or "prompt" in record.reading.mapped):
            return f"If it holds earlier turns, read them with columns={{history: {name}}}"
        name = f"{name}.0"
    if not isinstance(value, str | list):
        keys = [key for key, each in value.items() if isinstance(each, str)] if isinstance(value, dict) else []
        name = f"{name}.{keys[0] if keys else '…'}"
    if "prompt" in record.reading.mapped:
        return f"Add {{{name}}} to the template in columns={{prompt: …}}"
    if prompt:
        parts = [*prompt, name] if name.startswith("input") else [name, *prompt]
        template = r"\n".join(f"{{{part}}}" for part in parts)
        return f"Add it to the prompt, for example with columns={{prompt: '{template}'}}"
    if isinstance(value, str) and isinstance(row.prompt, list):
        return f"Read it as the system message with columns={{system: {name}}}"
    return f"Read it with columns={{prompt: {name}}}"


def _prompt_columns(record: Record) -> list[str]:
    """The columns of text that were read as the prompt."""
    return [
        name for name in ("prompt", *QUESTIONS.split("|")) if name in record.read and not _is_chat(record.values[name])
    ]


def _is_repeated(value: object, row: Row) -> bool:
    """Whether the row contains each text of the value, as separate lines or as a long passage."""
    texts = [*([row.prompt] if isinstance(row.prompt, str) else row.prompt), *row.responses]
    joined = "\n".join(answer_text(each).strip() for each in texts)
    return all(occurs_in(piece.strip(), joined) for piece in _texts_in(value))


def occurs_in(piece: str, text: str) -> bool:
    """Whether a text contains a piece as separate lines, or a piece too long to be there by chance."""
    return f"\n{piece}\n" in f"\n{text}\n" or (len(piece) >= 40 and piece in text) or not piece


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in ("role", "from", "speaker"):
                yield from _texts_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and not each.keys().isdisjoint(("role", "from")) for each in value)
    )


def _holds_bytes(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, bytes)
