"""Chats as text: the chat template renders prompt and response as one text, which is then cut between them.

The response is the text that the template puts after the prompt, up to and including the token that ends the
assistant's turn (a newline after it, for example, is not trained on). The prompt is the first of these texts that the
renderings of all responses begin with:

1. the prompt as in sampling: with the generation prompt, or up to the message that is to be continued. An empty
   block of thoughts that the template puts before an answer without thoughts then belongs to the response (Qwen3).
2. the prompt as the template renders it before an answer, where that differs from the generation prompt, as with models
   whose generation prompt opens a block of thoughts that an answer without thoughts does not have (Nemotron 3).
3. the part of the prompt as in sampling that all renderings share, if it reaches into the generation prompt.

If a template has no generation prompt, sampling uses the prompt of 2, and spaces before the answer belong to the
response. If such a template writes more into the prompt alone than before an answer (Mistral's later ones: the system
message), sampling and training use that longer prompt, and the response is the text after the prompt in the rendering
of both.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from lit_align.data.formats.rows import Answer, Message, Row
from lit_align.data.template import MARK, ChatTemplate, special_tokens
from lit_align.errors import UserError

THOUGHTS = ("thinking", "reasoning_content", "reasoning")
"""Keys of an assistant's message that hold thoughts."""
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
_EMPTY_BLOCK = re.compile(rf"\s*({_TAG})\s*\w*\s*(?:{_TAG})\s*")
"""A block of thoughts without any, such as <think></think>."""


class PromptEnd(StrEnum):
    """How a chat's prompt ends in training."""

    GENERATION = "generation"
    """As in sampling: with the template's generation prompt."""
    ANSWER = "answer"
    """As the template renders it before an answer."""
    SHARED = "shared"
    """Before the place where its responses begin in different ways."""


class Form(Enum):
    """Which special tokens a text has and which are added."""

    CHAT = "chat"
    """The text has those of the chat template; the token that ends a turn is added if it is missing."""
    PLAIN = "plain"
    """The tokenizer's own are put at the beginning and the end."""
    VERBATIM = "verbatim"
    """None is added."""


class Rendering(NamedTuple):
    """A prompt and its responses as text; prompt + response is the rendering of both."""

    prompt: str
    responses: tuple[str, ...]
    form: Form = Form.CHAT
    end: PromptEnd | None = None
    """None for plain text, and where the response continues a message."""
    generation_prompt: str = ""
    """The prompt as in sampling, if that of training ends in another way."""
    cut: tuple[bool, ...] | None = None
    """Whether each response was cut at a limit: its text has no end, and none is added. None: no response was."""

    @property
    def is_ended(self) -> list[bool]:
        """Whether each response ends with an end token."""
        return [not cut for cut in self.cut or [False] * len(self.responses)]


class ChatRenderer:
    """Renders chats by a tokenizer's chat template.

    Args:
        template_args: Arguments of the template (enable_thinking, documents, …); a row's own take precedence.
    """

    def __init__(self, tokenizer: Any, template_args: Mapping[str, Any] | None = None):
        self.template = ChatTemplate(tokenizer, template_args)
        self._eos = tokenizer.eos_token
        self._specials = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())) or r"(?!)")

    def prompt(self, row: Row) -> str:
        """The prompt as in sampling.

        Raises:
            UserError: the chat template is missing, or it rejects the messages.
        """
        messages = _chat(row)
        self.template.check(row)
        if _continues(row):
            prompt = self.template.render(row, messages, continue_final_message=True)
        elif self._opens_turns:
            prompt = self.template.render(row, messages, add_generation_prompt=True)
        else:
            prompt = self._unopened(row)
        self._check_messages(row, prompt)
        return prompt

    def rendering(self, row: Row) -> Rendering:
        """The prompt and its responses.

        Raises:
            UserError: the template refuses the messages, leaves out a part of a response, or renders the prompt
                differently with different responses.
        """
        self.template.check(row)
        answers = [self._without_end(answer) for answer in row.responses]
        wholes = [self.template.render(row, _joined(row, answer)) for answer in answers]
        sampled = self.prompt(row)
        prompt, start, end = self._common_prompt(row, sampled, wholes)
        for answer, whole in zip(answers, wholes, strict=True):
            self._check_complete(row, answer, whole, start)
        cuts = row.cut or [False] * len(wholes)
        responses = tuple(self._until_end(whole[start:], is_cut=cut) for whole, cut in zip(wholes, cuts, strict=True))
        if _continues(row):
            return Rendering(prompt, responses, cut=row.cut)
        return Rendering(prompt, responses, Form.CHAT, end, "" if end is PromptEnd.GENERATION else sampled, row.cut)

    def notes(self, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
        """Lines of the run's header about what the template does with these chats."""
        if not self._ends and (end := re.search(_TAG, self._after_answer)):
            yield (
                "turn's end",
                f"the chat template writes {end.group()}, which the tokenizer does not have as a special token; the "
                "end-of-sequence token is added",
            )
        if any(self.template.writes_date(row, _chat(row)) for row in rows):
            yield (
                "date",
                "the chat template writes today's date into prompts, so a run cannot be resumed on another day, unless "
                "data.template_args={strftime_now: 2026-11-26} sets the date",
            )

    @cached_property
    def ends_alike(self) -> bool:
        """Whether the template ends a prompt before an answer without thoughts as in sampling."""
        probe = Row([{"role": "user", "content": "a"}], (MARK,), source=self.template.name)
        return self.rendering(probe).end is PromptEnd.GENERATION

    @cached_property
    def turn_end(self) -> str:
        """The special token that ends the assistant's turn; empty if the template has none."""
        ends = self._ends
        return ends[0] if ends else ""

    # --- where the prompt ends ---

    def _common_prompt(self, row: Row, sampled: str, wholes: Sequence[str]) -> tuple[str, int, PromptEnd]:
        """The prompt, where the response begins in the renderings of both, and how the prompt ends.

        Args:
            sampled: The prompt as in sampling.
            wholes: The renderings of prompt and response.
        """

        def all_begin_with(text: str) -> bool:
            return all(whole.startswith(text) for whole in wholes)

        if all_begin_with(sampled):
            return sampled, len(sampled), PromptEnd.GENERATION
        if not _continues(row):
            header = self._header(row)
            if all_begin_with(header):
                if self._opens_turns and not self._ends_with_empty_block(sampled, header, wholes):
                    return header, len(header), PromptEnd.ANSWER
                return sampled, len(header), PromptEnd.GENERATION
            common = _before_tag(os.path.commonprefix([sampled, *wholes]), sampled)  # noqa: RUF071
            closed = self.template.render(row, _chat(row))
            opened_at = len(os.path.commonprefix([sampled, closed]))  # noqa: RUF071
            if len(common) >= opened_at:
                return common, len(common), PromptEnd.SHARED
        different = next(whole for whole in wholes if not whole.startswith(sampled))
        place = len(os.path.commonprefix([sampled, different]))  # noqa: RUF071
        raise UserError(
            f"{row.source}: the chat template of {self.template.name!r} renders the prompt differently when a response "
            "follows:\n"
            f"  alone:           {around(sampled, place)}\n"
            f"  with a response: {around(different, place)}\n"
            "Set another template (data.chat_template), other arguments (data.template_args), or take the row out."
        )

    def _header(self, row: Row) -> str:
        """The prompt as rendered before an answer, without the spaces that begin the answer."""
        before, mark, whole = self.template.render(row, _joined(row, MARK)).rpartition(MARK)
        return before.rstrip(" ") if mark else whole  # a template that leaves answers out

    def _unopened(self, row: Row) -> str:
        """The prompt as in sampling, by a template without a generation prompt.

        It is the rendering of the prompt alone if that ends as before an answer, or if the template adds words to it
        (an empty block of thoughts). Otherwise it is the prompt as rendered before an answer.
        """
        alone, header = self.template.render(row, _chat(row)), self._header(row)
        last = (_chat(row)[-1]["content"] or "").strip()
        more, end = (text.rpartition(last)[2].rstrip(" ") if last else "" for text in (alone, header))
        is_longer = more.startswith(end) and self._specials.sub("", more[len(end) :]).strip()
        return alone.rstrip(" ") if more == end or is_longer else header

    def _ends_with_empty_block(self, sampled: str, header: str, wholes: Sequence[str]) -> bool:
        """Whether only the prompt in sampling ends with an empty block of thoughts, and no answer has a block."""
        start = _before_tag(os.path.commonprefix([sampled, header]), sampled)  # noqa: RUF071
        rest = header[len(start) :]
        tags = _EMPTY_BLOCK.fullmatch(sampled[len(start) :].removesuffix(rest))
        return (
            bool(tags)
            and tags[1] not in rest
            and not any(whole[len(header) :].lstrip().startswith(tags[1]) for whole in wholes)
        )

    @cached_property
    def _opens_turns(self) -> bool:
        """Whether the template has a generation prompt."""
        probe = Row([{"role": "user", "content": "a"}], source=self.template.name)
        return self.template.render(probe, _chat(probe), add_generation_prompt=True) != self.template.render(
            probe, _chat(probe)
        )

    # --- where the response ends ---

    @cached_property
    def _after_answer(self) -> str:
        """The text that follows the last answer of a chat."""
        probe = Row([{"role": "user", "content": "a"}], source=self.template.name)
        return self.template.render(probe, _joined(probe, MARK)).rpartition(MARK)[2]

    @cached_property
    def _ends(self) -> tuple[str, str] | None:
        """The token that ends a turn, and the text from an answer's end up to and including it.

        It is the tokenizer's end token, or else the last of the special tokens directly after an answer: of those that
        follow both within a chat and at its end, or else of those at its end (gpt-oss ends the last turn in its own
        way).
        """
        last = self._after_answer
        chat = [("user", "a"), ("assistant", MARK), ("user", "b")]
        probe = Row([{"role": role, "content": content} for role, content in chat], source=self.template.name)
        try:
            within = self.template.render(probe, _chat(probe)).rpartition(MARK)[2]
        except UserError:
            within = last
        run = re.compile(rf"\s*(?:{self._specials.pattern})+")
        for text in (os.path.commonprefix([last, within]), last):  # noqa: RUF071
            if self._eos and self._eos in text:
                return self._eos, text.partition(self._eos)[0] + self._eos
            if found := run.match(text):
                ends = list(self._specials.finditer(found.group()))
                while len(ends) > 1 and ends[-1].group() in self._openers:
                    ends.pop()
                return ends[-1].group(), found.group()[: ends[-1].end()]
        return None

    @cached_property
    def _openers(self) -> set[str]:
        """The special tokens that open a user's turn, which Command A's template puts after an answer."""
        probe = Row([{"role": "user", "content": MARK}], source=self.template.name)
        before = self.template.render(probe, _chat(probe)).partition(MARK)[0]
        return {found.group() for found in self._specials.finditer(before)}

    def _without_end(self, answer: Answer) -> Answer:
        """The answer without an end token that it spells out itself, since the template adds one."""
        return answer.removesuffix(self.turn_end) if isinstance(answer, str) else answer

    def _until_end(self, response: str, *, is_cut: bool) -> str:
        """The response without what follows its end; if it was cut, without its end, too."""
        after = self._after_answer
        if response.endswith(after):
            end = self._ends[1] if self._ends else after
            return response[: len(response) - len(after)] + ("" if is_cut else end)
        run = re.search(rf"(?:{self._specials.pattern}|\s)*$", response)
        start = run.start() if run else 0
        if is_cut:
            return response[:start]
        ends = list(self._specials.finditer(response, start))
        own = [found for found in ends if found.group() == self.turn_end]
        return response[: (own or ends[-1:])[0].end()] if ends else response

    # --- completeness ---

    def _check_messages(self, row: Row, prompt: str) -> None:
        """Check that the template leaves out no message of the prompt, nor the calls of tools in one.

        Raises:
            UserError: it leaves out a message, whatever its text, or the name of a function that is called.
        """
        chat, squeezed_prompt = _chat(row), ""
        for place, message in enumerate(chat):
            text = (message["content"] or "").rpartition("</think>")[2].strip()
            parts = [text, *_functions(message)]
            if all(part in prompt for part in parts):
                continue
            squeezed_prompt = squeezed_prompt or squeezed(prompt)
            lost = [part for part in parts if squeezed(part) not in squeezed_prompt]
            if lost[:1] == [text] and self._reads_text(row, place):
                lost = lost[1:]
            if lost:
                is_call = lost[0] != text
                fix = "Put the calls into its text" if is_call else "Put its text into a user's turn"
                raise UserError(
                    f"{row.source}: the chat template of {self.template.name!r} leaves out "
                    f"{'the tool_calls of ' * is_call}message {place + 1} ({message['role']}): {around(lost[0], 0)}\n"
                    f"{fix}, take it out, or set another template (data.chat_template)."
                )

    def _reads_text(self, row: Row, place: int) -> bool:
        """Whether the rendering depends on the text of the message at a place."""
        chat = _chat(row)
        other = [*chat[:place], {**chat[place], "content": MARK}, *chat[place + 1 :]]
        return self.template.refuses(row, other) or self.template.render(row, other) != self.template.render(row, chat)

    def _check_complete(self, row: Row, answer: Answer, whole: str, start: int) -> None:
        """Check that the template puts all of the answer's text into the response, but for white space."""
        rendered = squeezed(whole)
        for key, text in _texts(answer):
            place = rendered.rfind(squeezed(text))
            if place < 0 or place + len(squeezed(text)) < len(squeezed(whole[:start])):
                part = "a part of the response" if key == "content" else f"the response's `{key}`"
                raise UserError(
                    f"{row.source}: the chat template of {self.template.name!r} leaves out or changes {part}:\n"
                    f"  given:    {around(text, 0)}\n"
                    f"  rendered: {around(whole[start:], 0)}\n"
                    "Set another template (data.chat_template), or take that part out."
                )


def _chat(row: Row) -> list[Message]:
    assert not isinstance(row.prompt, str)
    return row.prompt


def continues_text(row: Row) -> bool:
    """Whether the responses continue the prompt's text: plain text, or the assistant's message at a chat's end."""
    return isinstance(row.prompt, str) or _continues(row)


def _continues(row: Row) -> bool:
    """Whether the responses continue the assistant's message with which the prompt ends."""
    return _chat(row)[-1]["role"] == "assistant" and not row.is_new_turn


def _joined(row: Row, answer: Answer) -> list[Message]:
    """The chat with the answer as one more message, or as the continuation of the assistant's last message."""
    messages = _chat(row)
    message: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    if not _continues(row):
        return [*messages, message]
    begun = messages[-1]
    content = (begun["content"] or "") + (message["content"] or "")
    return [*messages[:-1], {**begun, **message, "content": content}]


def _texts(answer: Answer) -> Iterator[tuple[str, str]]:
    """The texts that a response consists of, with their keys."""
    if isinstance(answer, str):
        yield "content", answer
        return
    for key in ("content", *THOUGHTS, "tool_plan"):
        if isinstance(value := answer.get(key), str):
            yield key, value
    for name in _functions(answer):
        yield "tool_calls", name


def _functions(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or []]


def _before_tag(start: str, text: str) -> str:
    """The start of a text, up to the token or tag that it would end within."""
    for found in re.finditer(_TAG, text):
        if found.start() < len(start) < found.end():
            return text[: found.start()]
    return start


def squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def around(text: str, place: int, width: int = 60) -> str:
    """The text around a place, on one line."""
    start, end = max(0, place - width), place + width
    return ("…" if start else "") + repr(text[start:end])[1:-1] + ("…" if end < len(text) else "")
