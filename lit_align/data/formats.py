"""From raw rows to typed rows. Whatever a data module reads passes through `read_rows`.

    file, folder, hub ──▶ Record (columns as they are) ──Format.parse──▶ Row (prompt, responses) ──▶ kind

The format is detected once, by the first row, in the order of `FORMATS`; every further row must fit it. Prompts
are all plain text or all chats; a response is always text, in a chat the content of its last turn. What a rule
leaves out is counted under its reason; what no rule covers is an error that names the row.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.data.store import find_rounds, read_rounds
from lit_align.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]  # {"role": …, "content": …}; a message's other keys are not read
Text = str | list[Message]  # plain text, or a chat
Kind = Literal["prompts", "preferences", "labelled", "texts"]


class DataError(UserError):
    """A data set that cannot be read. Names the file, the row, what was found there, and the mend."""


@dataclass(frozen=True)
class Row:
    """One prompt and its responses."""

    prompt: Text
    responses: tuple[str, ...] = ()  # the chosen or the best one first
    rewards: tuple[float, ...] | None = None  # of each response
    labels: tuple[bool, ...] | None = None  # whether each response is desirable (KTO)
    source: str = ""  # "file.jsonl:17" or "name[split]:17"; rows are counted from 1


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, and what was seen on the way."""

    rows: list[Row]
    format: str  # name of the detected format
    description: str  # one line for the screen
    skipped: Counter[str]  # what was left out or mended, by reason

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]


def read_rows(path_or_name: str | os.PathLike[str], *, split: str | None = None, kind: Kind) -> Rows:
    """Read a data set whole, detecting its format.

    Args:
        path_or_name: A .jsonl, .json or .parquet file, a folder that `datasets` saved, rounds that `OnPolicyPairs`
            stored (a run's folder, or one round's), or a hub name, with a configuration behind a colon if need be
            (openai/summarize_from_feedback:comparisons).
        split: Split of a folder or hub name; None is a folder's only one, or else train. Of rounds that several
            scorers have scored: the one whose identity holds this.
        kind: What the rows are for. prompts: what precedes any response. preferences: the better response,
            then one or more worse ones. labelled: responses marked desirable or not; preferences give both.
            texts: one response to imitate; of a preference, the better one.

    Raises:
        DataError: the data set does not exist, is damaged, empty or of no known format, or a row is.
    """
    source = os.fspath(path_or_name)
    skipped: Counter[str] = Counter()
    records = _records(source, split, skipped)
    first = next(records, None)
    if first is None:
        raise DataError(f"{source}: the data set is empty. Give one with at least one row.")
    format = _detect(first, kind)
    parsed = _parsed(format, chain([first], records), skipped)
    rows = list(_SELECT[kind](parsed, skipped))
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{source}: nothing is left of what was read as {format.name}: {counts}.")
    form = _form(rows[0])
    for row in rows:
        if _form(row) != form:
            raise DataError(
                f"{row.source}: the prompt is {_form(row)}, but that of {rows[0].source} is {form}. Make all of them "
                'plain text, or messages like {"role": "user", "content": "…"}.'
            )
    columns = ", ".join(first.get(column)[0] for column in format.columns)
    return Rows(rows, format.name, f"{format.name}, {form} (columns {columns})", skipped)


def _form(row: Row) -> str:
    return "plain text" if isinstance(row.prompt, str) else "chat messages"


# --- a raw row ---


@dataclass(frozen=True)
class Record:
    """A raw row. Its getters raise a `DataError` that says what is wrong; `a|b` stands for either column."""

    values: Mapping[str, Any]
    source: str

    def has(self, column: str) -> bool:
        return any(self.values.get(name) is not None for name in column.split("|"))

    def get(self, column: str) -> tuple[str, Any]:
        """The column's name and its value."""
        for name in column.split("|"):
            if (value := self.values.get(name)) is not None:
                return name, value
        raise DataError(
            f"{self.source}: the row has no {_either(column)}, as the first row has; its columns are "
            f"{_columns(self)}. Fill it in, or take the row out."
        )

    def text(self, column: str) -> Text:
        return self._text(*self.get(column))

    def texts(self, column: str) -> list[Text]:
        """A list of texts, or a single one."""
        name, value = self.get(column)
        return [self._text(name, each) for each in value] if _is_several(value) else [self._text(name, value)]

    def string(self, column: str) -> str:
        name, value = self.get(column)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def numbers(self, column: str) -> list[float]:
        """A list of numbers, or a single one."""
        name, value = self.get(column)
        values = value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
                raise self.wrong(name, each, "a finite number")
        return [float(each) for each in values]

    def label(self, column: str) -> bool:
        name, value = self.get(column)
        if value not in (True, False):  # 1 and 0 are equal to these
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def inner(self, column: str) -> "Record":
        """The object in a column, as a record of its own."""
        name, value = self.get(column)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Record(value, self.source)

    def wrong(self, name: str, value: object, needed: str) -> DataError:
        return DataError(f"{self.source}: `{name}` holds {_shown(value)}, but needs {needed}. Mend it or drop the row.")

    def _text(self, name: str, value: object) -> Text:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise self.wrong(name, value, 'text, or messages like {"role": "user", "content": "…"}')
        return [self._message(name, each) for each in value]

    def _message(self, name: str, value: object) -> Message:
        if isinstance(value, dict):
            if value.get("tool_calls") or value.get("function_call"):
                raise _Skip(_TOOLS)
            role, content = value.get("role"), value.get("content")
            if isinstance(role, str) and isinstance(content, str):
                return {"role": role, "content": content}
        raise self.wrong(name, value, 'messages with text in both keys, like {"role": "user", "content": "…"}')


class _Skip(Exception):
    """The row is left out, and counted under this reason."""


_TOOLS = "rows with tools or tool calls, which are not read"


# --- from a record to a row, format by format ---


def _text_row(record: Record) -> Row:
    return Row("", (record.string("text"),), source=record.source)


def _prompt_row(record: Record) -> Row:
    return Row(record.text("prompt"), source=record.source)


def _chat_row(record: Record) -> Row:
    chat = record.text("messages")
    if isinstance(chat, str):
        raise record.wrong("messages", chat, "a list of messages")
    if chat[-1]["role"] != "assistant":
        return Row(chat, source=record.source)
    return _row(record, None, [chat])


def _completion_row(record: Record) -> Row:
    return _row(record, record.text("prompt"), [record.text("completion|response")])


def _labelled_row(record: Record) -> Row:
    return replace(_completion_row(record), labels=(record.label("label"),))


def _explicit_pair(record: Record) -> Row:
    return _pair(record, record.text("prompt"))


def _implicit_pair(record: Record) -> Row:
    _check_prompt_is_shared(record)
    return _pair(record, None)


_QUESTION = ("question", "query", "instruction", "input", "context", "problem")


def _check_prompt_is_shared(record: Record) -> None:
    """Make sure that no other column holds what the responses answer: what they share would be taken for it."""
    answers = [record.text("chosen"), *record.texts("rejected")]
    spoken = [text if isinstance(text, str) else "\n\n".join(each["content"] for each in text) for text in answers]
    for name in _QUESTION:
        value = record.values.get(name)
        if isinstance(value, str) and not all(value.strip() in text for text in spoken):
            raise DataError(
                f"{record.source}: `{name}` holds {_shown(value)}, but there is no `prompt`, and the responses do not "
                f"repeat it. Rename `{name}` to `prompt`, or take the column out."
            )


def _pair(record: Record, prompt: Text | None) -> Row:
    row = _row(record, prompt, [record.text("chosen"), *record.texts("rejected")])
    if not (record.has(_CHOSEN_REWARD) or record.has(_REJECTED_REWARD)):
        return row
    if not record.has(_CHOSEN_REWARD) or not record.has(_REJECTED_REWARD):
        name, value = record.get(f"{_CHOSEN_REWARD}|{_REJECTED_REWARD}")
        raise DataError(
            f"{record.source}: `{name}` holds {_shown(value)}, but the other side of the pair has no number. Give both "
            "or neither."
        )
    return replace(row, rewards=_one_each(record, row, _CHOSEN_REWARD, _REJECTED_REWARD))


_CHOSEN_REWARD = "score_chosen|chosen_score|chosen-rating|reward_chosen"
_REJECTED_REWARD = "score_rejected|rejected_score|rejected-rating|reward_rejected"


def _ranked_row(record: Record) -> Row:
    """The responses in order of their rewards, the best first; a rank stands for the reward −rank."""
    row = _row(record, record.text("prompt"), record.texts("responses|completions"))
    if record.has("rewards|scores"):
        rewards = _one_each(record, row, "rewards|scores")
    else:
        rewards = tuple(-rank for rank in _one_each(record, row, "ranks"))
    order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
    return replace(row, responses=tuple(row.responses[k] for k in order), rewards=tuple(rewards[k] for k in order))


def _transcript_pair(record: Record) -> Row:
    """Anthropic's HH: whole dialogues as text, each turn opened by a blank line and its speaker."""
    answers = [_dialogue(record.string(column)) for column in ("chosen", "rejected")]
    _check_prompt_is_shared(record)
    return _row(record, None, answers)


def _post_row(record: Record) -> Row:
    """A Reddit post in the form of the TL;DR papers (Stiennon et al., arXiv 2009.01325)."""
    post = record if record.has("post") else record.inner("info")
    summary = record.values.get("summary")
    responses = (_behind(summary),) if isinstance(summary, str) else ()
    return Row(_post(post), responses, source=record.source)


def _comparison_row(record: Record) -> Row:
    """OpenAI's summarize_from_feedback: a post, two summaries, and which one a person chose."""
    name, summaries = record.get("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise record.wrong(name, summaries, "a list of two summaries")
    texts = [
        _behind(Record({"summaries": each}, record.source).inner("summaries").string("text")) for each in summaries
    ]
    name, choice = record.get("choice")
    if choice not in (0, 1):
        raise record.wrong(name, choice, "0 or 1")
    return Row(_post(record.inner("info")), (texts[choice], texts[1 - choice]), source=record.source)


@dataclass(frozen=True)
class Format:
    """A layout of columns.

    Args:
        name: Says on the screen what was detected.
        columns: Columns that a row must have; `a|b` is either.
        kinds: What its rows can serve as.
        parse: Makes a row of a record.
        condition: What else the first record must be.
        is_whole: Whether its columns are all that the model is to read: `system` and `tools` beside them are not.
    """

    name: str
    columns: tuple[str, ...]
    kinds: frozenset[Kind]
    parse: Callable[[Record], Row]
    condition: Callable[[Record], bool] = lambda record: True
    is_whole: bool = False

    def matches(self, record: Record) -> bool:
        return all(record.has(column) for column in self.columns) and self.condition(record)


_PAIRS: frozenset[Kind] = frozenset({"prompts", "preferences", "labelled", "texts"})
_IMITATION: frozenset[Kind] = frozenset({"prompts", "texts"})

FORMATS = (
    Format("TL;DR comparisons", ("info", "summaries", "choice"), _PAIRS, _comparison_row, is_whole=True),
    Format(
        "ranked responses with rewards",
        ("prompt", "responses|completions", "rewards|scores"),
        frozenset({"prompts", "preferences", "texts"}),
        _ranked_row,
    ),
    Format(
        "ranked responses, rank 1 the best",
        ("prompt", "responses|completions", "ranks"),
        frozenset({"prompts", "preferences", "texts"}),
        _ranked_row,
    ),
    Format(
        "preferences with several rejected responses",
        ("prompt", "chosen", "rejected"),
        _PAIRS,
        _explicit_pair,
        lambda record: _is_several(record.values["rejected"]),
    ),
    Format("preference pairs with an explicit prompt", ("prompt", "chosen", "rejected"), _PAIRS, _explicit_pair),
    Format(
        "preference pairs in Human/Assistant transcripts",
        ("chosen", "rejected"),
        _PAIRS,
        _transcript_pair,
        lambda record: all(_is_dialogue(record.values[name]) for name in ("chosen", "rejected")),
    ),
    Format("preference pairs with an implicit prompt", ("chosen", "rejected"), _PAIRS, _implicit_pair),
    Format(
        "labelled responses",
        ("prompt", "completion|response", "label"),
        frozenset({"prompts", "labelled"}),
        _labelled_row,
    ),
    Format("prompts with a response", ("prompt", "completion|response"), _IMITATION, _completion_row),
    Format("chats", ("messages",), _IMITATION, _chat_row),
    Format("prompts", ("prompt",), frozenset({"prompts"}), _prompt_row),
    Format("TL;DR posts", ("post|info",), _IMITATION, _post_row, is_whole=True),
    Format("texts", ("text",), frozenset({"texts"}), _text_row, is_whole=True),
)


def _detect(first: Record, kind: Kind) -> Format:
    fitting = [format for format in FORMATS if kind in format.kinds]
    for format in fitting:
        if format.matches(first):
            return format
    forms = dict.fromkeys(" + ".join(_either(column) for column in format.columns) for format in fitting)
    raise DataError(
        f"{first.source}: no {kind} can be read from the columns {_columns(first)}. Rename them to one of "
        f"these forms: {'; '.join(forms)}."
    )


def _parsed(format: Format, records: Iterator[Record], skipped: Counter[str]) -> Iterator[Row]:
    for record in records:
        try:
            yield format.parse(record) if format.is_whole else _with_system(format.parse(record), record, skipped)
        except _Skip as reason:
            skipped[str(reason)] += 1


def _with_system(row: Row, record: Record, skipped: Counter[str]) -> Row:
    """The row with the system message that stands in a column of its own at the head of its chat."""
    if record.values.get("tools") not in (None, "", "[]", "{}", [], {}):
        raise _Skip(_TOOLS)
    for name in ("system", "system_prompt"):
        value = record.values.get(name)
        if not isinstance(value, str) or not value.strip():
            continue
        if isinstance(row.prompt, str):
            if value.strip() in row.prompt:
                continue
            raise DataError(
                f"{record.source}: `{name}` holds {_shown(value)}, but the prompt is plain text, which has no system "
                'message. Make `prompt` messages like {"role": "user", "content": "…"}, write it into `prompt`, or '
                "take the column out."
            )
        first = row.prompt[0]
        if first["role"] != "system":
            skipped[f"chats that now open with their `{name}`"] += 1
            row = replace(row, prompt=[{"role": "system", "content": value}, *row.prompt])
        elif first["content"].strip() != value.strip():
            raise DataError(
                f"{record.source}: `{name}` holds {_shown(value)}, but the chat opens with the system message "
                f"{_shown(first['content'])}. Keep one of them."
            )
    return row


# --- what each kind takes of a row ---


def _select_prompts(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Prompts; one that stands in several rows because each has another response is taken once."""
    seen: set[str] = set()
    for row in rows:
        key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt)
        if row.responses and key in seen:
            skipped["repeated prompts"] += 1
            continue
        seen.add(key)
        yield Row(row.prompt, source=row.source)


def _select_preferences(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Rows with a best response and others that differ from it."""
    for row in rows:
        texts = row.responses
        kept = [k for k, text in enumerate(texts) if text.strip() and text not in texts[:k]]
        if len(kept) < 2 or kept[0] != 0:
            skipped["rows with equal or empty responses"] += 1
            continue
        rewards = tuple(row.rewards[k] for k in kept) if row.rewards else None
        if rewards and rewards[0] < max(rewards):
            skipped["rows whose chosen response has not the highest reward"] += 1
            continue
        if len(kept) < len(texts):
            skipped["repeated or empty responses"] += len(texts) - len(kept)
        yield replace(row, responses=tuple(texts[k] for k in kept), rewards=rewards)


def _select_labelled(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Rows with labels; the first response of a preference is desirable, the others are not."""
    for row in rows:
        if row.labels is None:
            for pair in _select_preferences(iter([row]), skipped):
                yield replace(pair, labels=(True, *[False] * (len(pair.responses) - 1)))
        elif row.responses[0].strip():
            yield row
        else:
            skipped["rows with an empty response"] += 1


def _select_texts(rows: Iterator[Row], skipped: Counter[str]) -> Iterator[Row]:
    """Prompts with the one response to imitate."""
    for row in rows:
        if row.responses and row.responses[0].strip():
            yield Row(row.prompt, row.responses[:1], source=row.source)
        else:
            skipped["rows without a response"] += 1


_SELECT: dict[Kind, Callable[[Iterator[Row], Counter[str]], Iterator[Row]]] = {
    "prompts": _select_prompts,
    "preferences": _select_preferences,
    "labelled": _select_labelled,
    "texts": _select_texts,
}


# --- telling prompt and response apart ---


def _row(record: Record, prompt: Text | None, answers: Sequence[Text]) -> Row:
    """A row of responses, each alone or behind the prompt it answers.

    Args:
        prompt: None if it is only to be had as what the answers share.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) == len(answers):
        if prompt is None:
            prompt, texts = _shared_words(texts)
        return Row(prompt, tuple(texts), source=record.source)
    if texts:
        raise DataError(f"{record.source}: one response is text, another a list of messages. Make them all the same.")
    chats = [answer for answer in answers if isinstance(answer, list)]
    if any(chat[-1]["role"] != "assistant" for chat in chats):
        raise _Skip("rows whose last turn is not the assistant's")
    shared = chats[0][:-1]
    if any(chat[:-1] != shared for chat in chats):
        raise _Skip("rows whose responses differ before their last turn")
    if isinstance(prompt, str):
        opened = any(message["role"] == "user" for message in shared)  # then `prompt` is among them (UltraFeedback)
        shared = shared if opened else [{"role": "user", "content": prompt}, *shared]
    elif prompt is not None and shared[: len(prompt)] != prompt:
        shared = [*prompt, *shared]
    if not shared:
        raise _Skip("rows without a prompt")
    return Row(shared, tuple(chat[-1]["content"] for chat in chats), source=record.source)


def _shared_words(texts: list[str]) -> tuple[str, list[str]]:
    """The words with which all texts begin, and what follows in each, from the space before a word on."""
    if len(set(texts)) == 1:
        raise _Skip("rows with equal or empty responses")
    shared = os.path.commonprefix(texts)  # noqa: RUF071  # character by character is what is meant
    if not all(text[len(shared) : len(shared) + 1].isspace() for text in texts):  # it ends within a word
        shared = shared[: len(shared) - len(re.split(r"\s", shared)[-1])].removesuffix(" ")
    if not shared.strip():
        raise _Skip("rows without a shared prompt")
    return shared, [text[len(shared) :] for text in texts]


_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_dialogue(value: object) -> bool:
    return isinstance(value, str) and _TURN.match(value) is not None


def _dialogue(transcript: str) -> list[Message]:
    before, *turns = _TURN.split(transcript)
    if before.strip() or not turns:
        raise _Skip("rows that are no transcript")
    return [
        {"role": _SPEAKERS[speaker], "content": words.strip()}
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]


def _post(record: Record) -> str:
    """SUBREDDIT, TITLE and POST, as far as given, ending with the TL;DR: that a summary follows."""
    heads = {
        "subreddit": "SUBREDDIT: r/{}",
        "title": "TITLE: {}",
        "post": "POST: {}",
        "article": "ARTICLE: {}",
    }
    if not record.has("post|article"):
        record.string("post")
    parts = [head.format(record.string(column).strip()) for column, head in heads.items() if record.has(column)]
    return "\n\n".join([*parts, "TL;DR:"])


def _behind(words: str) -> str:
    """A summary as it follows `TL;DR:`, one space between them."""
    return f" {words.strip()}" if words.strip() else ""


def _one_each(record: Record, row: Row, *columns: str) -> tuple[float, ...]:
    numbers = [number for column in columns for number in record.numbers(column)]
    if len(numbers) != len(row.responses):
        raise DataError(
            f"{record.source}: {len(row.responses)} responses, but {len(numbers)} numbers in "
            f"{_listing(map(_either, columns))}. Give one number per response."
        )
    return tuple(numbers)


def _is_several(value: object) -> bool:
    """A list of texts, not a chat, which is a list of objects."""
    return isinstance(value, list) and all(isinstance(each, str | list) for each in value)


# --- sources ---


def _records(source: str, split: str | None, skipped: Counter[str]) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        return _round_records(path, split) if find_rounds(path) else _saved_records(path, split)
    reader = _READERS.get(path.suffix)
    is_path = len(path.parts) == 2 and path.parent.is_dir()  # it looks like a hub name, but its folder is here
    if reader is None and not is_path and not path.exists() and _HUB_NAME.fullmatch(source):
        return _hub_records(source, split)
    if not path.is_file():
        raise DataError(f"{source}: there is no such file. Give {_SOURCES}.")
    if reader is None:
        raise DataError(f"{source}: a {path.suffix or 'nameless'} file cannot be read. Give {_SOURCES}.")
    if split is not None:
        raise DataError(f"{source}: split={split!r} has no effect, for a file has no splits. Leave it out.")
    return reader(path, skipped)


def _read_json(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """One object per line, or a list of objects."""
    with path.open("rb") as file:
        is_list = path.suffix == ".json" and file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        file.seek(0)
        if is_list:
            numbered = enumerate(_loads(file.read(), path.name, 1, skipped), 1)
        else:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            numbered = ((number, _loads(line, path.name, number, skipped)) for number, line in lines)
        for number, values in numbered:
            if not isinstance(values, dict):
                raise DataError(
                    f"{path.name}:{number}: the row is {_shown(values)}, but needs to be an object such as "
                    '{"prompt": "…"}.'
                )
            yield Record(values, f"{path.name}:{number}")


def _loads(data: bytes, name: str, line: int, skipped: Counter[str]) -> Any:
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{name}:{line}: this line is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line + error.lineno - 1}: this line is no JSON ({error.msg}, column {error.colno}): "
            f"{_shown(error.doc[error.doc.rfind(chr(10), 0, error.pos) + 1 :])}. A file holds one object per "
            "line, or (.json) one list of objects."
        ) from error
    return _without_surrogates(value, skipped) if _SURROGATE.search(data) else value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def _without_surrogates(value: Any, skipped: Counter[str]) -> Any:
    """Half a surrogate pair is no character: no tokenizer takes it, no file can hold it. It becomes �."""
    if isinstance(value, dict):
        return {key: _without_surrogates(each, skipped) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(each, skipped) for each in value]
    if not isinstance(value, str):
        return value
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole != value:
        skipped["texts with half a surrogate pair, now �"] += 1
    return whole


def _read_parquet(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: this is no Parquet file ({_line(error)}). Write it anew.") from error
    rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
    return (Record(row, f"{path.name}:{number}") for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}
_SOURCES = "a .jsonl, .json or .parquet file, a folder saved by `datasets`, a run's rounds, or a hub name"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def _round_records(path: Path, scorer: str | None) -> Iterator[Record]:
    """Rounds that were sampled on-policy: prompts, responses as text, and the rewards of one scorer."""
    for stored in read_rounds(path, scorer):
        for row in stored.rows:
            values = {"prompt": row["prompt"], "responses": row["responses"], "rewards": row["scores"]}
            yield Record(values, f"{stored.path.name}/{row['source']}")


def _saved_records(path: Path, split: str | None) -> Iterator[Record]:
    from datasets import Dataset, load_from_disk  # takes seconds to import

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:  # the last where there is no row
        raise DataError(
            f"{path}: this folder is empty, damaged, or was not saved by `save_to_disk` ({_line(error)}). Give "
            f"{_SOURCES}."
        ) from error
    if isinstance(data, Dataset):
        if split is not None:
            raise DataError(f"{path}: split={split!r} has no effect, for the folder holds one data set. Leave it out.")
        return _dataset_records(data, path.name)
    name = split or (next(iter(data)) if len(data) == 1 else "train")
    if name not in data:
        raise DataError(f"{path}: there is no split {name!r}; set `split` to one of {_listing(map(str, data))}.")
    return _dataset_records(data[name], f"{path.name}[{name}]")


def _hub_records(source: str, split: str | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    split = split or "train"
    try:
        data = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: there is no such file or folder, and the hub gives no data set of that name with "
            f"split={split!r} ({_line(error)}). Give {_SOURCES}."
        ) from error
    return _dataset_records(data, f"{source}[{split}]")


def _dataset_records(data: "Dataset", name: str) -> Iterator[Record]:
    batches = data.with_format("arrow").iter(1024)
    rows = chain.from_iterable(cast(pa.Table, batch).to_pylist() for batch in batches)
    return (Record(row, f"{name}:{number}") for number, row in enumerate(rows, 1))


# --- words of messages ---


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def _columns(record: Record) -> str:
    return _listing(name for name, value in record.values.items() if value is not None) or "(none)"


def _either(column: str) -> str:
    return column.replace("|", " or ")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
