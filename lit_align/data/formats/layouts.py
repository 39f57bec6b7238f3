"""Layouts of columns, and how each becomes a row."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_align.data.formats.rows import (
    DataError,
    Kind,
    Message,
    Record,
    Row,
    Skip,
    Text,
    either,
    is_several,
    listing,
)
from lit_align.errors import shown

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
                f"{record.source}: `{name}` holds {shown(value)}, but there is no `prompt`, and the responses do not "
                f"repeat it. Rename `{name}` to `prompt`, or take the column out."
            )


def _pair(record: Record, prompt: Text | None) -> Row:
    row = _row(record, prompt, [record.text("chosen"), *record.texts("rejected")])
    if not (record.has(_CHOSEN_REWARD) or record.has(_REJECTED_REWARD)):
        return row
    if not record.has(_CHOSEN_REWARD) or not record.has(_REJECTED_REWARD):
        name, value = record.get(f"{_CHOSEN_REWARD}|{_REJECTED_REWARD}")
        raise DataError(
            f"{record.source}: `{name}` holds {shown(value)}, but the other side of the pair has no number. Give both "
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
        lambda record: is_several(record.values["rejected"]),
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
        raise Skip("rows whose last turn is not the assistant's")
    shared = chats[0][:-1]
    if any(chat[:-1] != shared for chat in chats):
        raise Skip("rows whose responses differ before their last turn")
    if isinstance(prompt, str):
        opened = any(message["role"] == "user" for message in shared)  # then `prompt` is among them (UltraFeedback)
        shared = shared if opened else [{"role": "user", "content": prompt}, *shared]
    elif prompt is not None and shared[: len(prompt)] != prompt:
        shared = [*prompt, *shared]
    if not shared:
        raise Skip("rows without a prompt")
    return Row(shared, tuple(chat[-1]["content"] for chat in chats), source=record.source)


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


_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _is_dialogue(value: object) -> bool:
    return isinstance(value, str) and _TURN.match(value) is not None


def _dialogue(transcript: str) -> list[Message]:
    before, *turns = _TURN.split(transcript)
    if before.strip() or not turns:
        raise Skip("rows that are no transcript")
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
            f"{listing(map(either, columns))}. Give one number per response."
        )
    return tuple(numbers)
