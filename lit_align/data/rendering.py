"""Chats as text: the chat template renders prompt and response as one text, which is then cut between them.

The response is the text that the template puts after the prompt, up to and including the token that ends the
assistant's turn (a newline after it, for example, is not trained on). The prompt is the first of these texts that the
renderings of all responses begin with:

1. the prompt as in sampling: with the generation prompt, or up to the message that is to be continued. An empty
   block of thoughts that the template puts before an answer without thoughts then belongs to the response (Qwen3).
2. the prompt as the template renders it before an answer, where that differs from the generation prompt, as with models
   whose generation prompt opens a block of thoughts that an answer without thoughts does not have (Nemotron 3).
3. the part of the prompt as in sampling that all renderings share, if it reaches into the generation prompt.

A template without a generation prompt is sampled from as in 2; spaces before the answer belong to the response.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lit_align.data.formats.rows import Answer, Message, Row
from lit_align.errors import UserError

MARK = "lit_align"
"""Placeholder for a response, used to find the template's own text around it."""
THOUGHTS = ("thinking", "reasoning_content", "reasoning")
"""Keys of an assistant's message that hold thoughts."""


class Rendering(NamedTuple):
    """A prompt and its responses as text; prompt + response is the rendering of both."""

    prompt: str
    responses: tuple[str, ...]


class ChatRenderer:
    """Renders chats by a tokenizer's chat template.

    Args:
        template_args: Arguments of the template (enable_thinking, documents, …); a row's own take precedence.
    """

    def __init__(self, tokenizer: Any, template_args: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        self._specials = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())) or r"(?!)")

    def prompt(self, row: Row) -> str:
        """The prompt as in sampling.

        Raises:
            UserError: the chat template is missing, or it rejects the messages.
        """
        messages = _chat(row)
        self._check_template(row)
        if messages[-1]["role"] == "assistant":
            return self._render(row, messages, continue_final_message=True)
        if not self._opens_turns:
            self._render(row, messages)  # a refusal names the row's own messages
            return self._header(row)
        return self._render(row, messages, add_generation_prompt=True)

    def rendering(self, row: Row) -> Rendering:
        """The prompt and its responses.

        Raises:
            UserError: the template refuses the messages, leaves out a part of a response, or renders the prompt
                otherwise with one response than with another.
        """
        self._check_template(row)
        answers = [self._without_end(answer) for answer in row.responses]
        wholes = [self._render(row, _joined(_chat(row), answer)) for answer in answers]
        prompt = self._common_prompt(row, wholes)
        for answer, whole in zip(answers, wholes, strict=True):
            self._check_complete(row, answer, whole, len(prompt))
        return Rendering(prompt, tuple(self._until_end(whole[len(prompt) :]) for whole in wholes))

    @cached_property
    def turn_end(self) -> str:
        """The special token that ends the assistant's turn; none if the template puts none."""
        ends = self._ends
        return ends[0] if ends else ""

    # --- where the prompt ends ---

    def _common_prompt(self, row: Row, wholes: Sequence[str]) -> str:
        def all_begin_with(text: str) -> bool:
            return all(whole.startswith(text) for whole in wholes)

        sampled = self.prompt(row)
        if all_begin_with(sampled):
            return sampled
        if _chat(row)[-1]["role"] != "assistant":
            header = self._header(row)
            if all_begin_with(header):
                return header
            common = _before_tag(os.path.commonprefix([sampled, *wholes]), sampled)  # noqa: RUF071
            closed = self._render(row, _chat(row))
            opened_at = len(os.path.commonprefix([sampled, closed]))  # noqa: RUF071
            if len(common) >= opened_at:
                return common
        different = next(whole for whole in wholes if not whole.startswith(sampled))
        place = len(os.path.commonprefix([sampled, different]))  # noqa: RUF071
        raise UserError(
            f"{row.source}: the chat template of {self.name!r} renders the prompt otherwise when a response follows:\n"
            f"  alone:           {around(sampled, place)}\n"
            f"  with a response: {around(different, place)}\n"
            "Set another template (data.chat_template), other arguments (data.template_args), or take the row out."
        )

    def _header(self, row: Row) -> str:
        """The prompt as rendered before an answer, without the spaces that begin the answer."""
        before, mark, whole = self._render(row, _joined(_chat(row), MARK)).rpartition(MARK)
        return before.rstrip(" ") if mark else whole  # a template that leaves answers out

    @cached_property
    def _opens_turns(self) -> bool:
        """Whether the template has a generation prompt."""
        probe = Row([{"role": "user", "content": "a"}], source=self.name)
        return self._render(probe, _chat(probe), add_generation_prompt=True) != self._render(probe, _chat(probe))

    # --- where the response ends ---

    @cached_property
    def _after_answer(self) -> str:
        """The text that follows the last answer of a chat."""
        probe = Row([{"role": "user", "content": "a"}], source=self.name)
        return self._render(probe, _joined(_chat(probe), MARK)).rpartition(MARK)[2]

    @cached_property
    def _ends(self) -> tuple[str, str] | None:
        """The token that ends a turn, and what follows an answer up to and with it.

        It is the last of the special tokens that follow an answer at once, wherever in the chat the answer is, or else
        at the chat's end (gpt-oss ends the last turn in a way of its own).
        """
        last = self._after_answer
        chat = [("user", "a"), ("assistant", MARK), ("user", "b")]
        probe = Row([{"role": role, "content": content} for role, content in chat], source=self.name)
        try:
            within = self._render(probe, _chat(probe)).rpartition(MARK)[2]
        except UserError:
            within = last
        run = re.compile(rf"\s*(?:{self._specials.pattern})+")
        for text in (os.path.commonprefix([last, within]), last):  # noqa: RUF071
            if found := run.match(text):
                *_, end = self._specials.finditer(found.group())
                return end.group(), found.group()
        return None

    def _without_end(self, answer: Answer) -> Answer:
        """The answer without a turn's end that it spells out itself: the template puts one."""
        return answer.removesuffix(self.turn_end) if isinstance(answer, str) else answer

    def _until_end(self, response: str) -> str:
        """The response without what follows its end."""
        after = self._after_answer
        if response.endswith(after):
            return response[: len(response) - len(after)] + (self._ends[1] if self._ends else after)
        *_, last = [0, *(found.end() for found in self._specials.finditer(response))]
        return response[:last] if last and not response[last:].strip() else response

    # --- the template ---

    @property
    def name(self) -> str:
        return self.tokenizer.name_or_path

    def _check_template(self, row: Row) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{row.source}: the prompt is a chat, but {self.name!r} has no chat template. Set one "
                "(data.chat_template=FILE), take an instruct model's tokenizer (data.tokenizer), or give prompts of "
                "plain text."
            )
        if row.tools and "tools" not in self.tokenizer.get_chat_template(tools=row.tools):
            raise UserError(
                f"{row.source}: the row has tools, but the chat template of {self.name!r} does not read any. Set "
                "another template (data.chat_template), or take the column out."
            )

    def _render(self, row: Row, messages: list[Message], **options: Any) -> str:
        arguments = {**self.template_args, **row.template_args, **options}
        refusal: Exception | None = None
        for chat in _with_arguments(messages):
            try:
                return str(self.tokenizer.apply_chat_template(chat, tools=row.tools, tokenize=False, **arguments))
            except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
                refusal = refusal or error
        roles = ", ".join(str(message["role"]) for message in messages)
        has_system = messages[0]["role"] in ("system", "developer")
        change = "Put the system message into the first user's turn" if has_system else "Change them"
        raise UserError(
            f"{row.source}: the chat template of {self.name!r} refuses the messages ({roles}): "
            f"{str(refusal).rstrip('.')}. {change}, or set another template (data.chat_template)."
        ) from refusal

    def _check_complete(self, row: Row, answer: Answer, whole: str, start: int) -> None:
        """Check that the template puts all of the answer's text into the response, but for white space."""
        rendered = squeezed(whole)
        for text in _texts(answer):
            place = rendered.rfind(squeezed(text))
            if place < 0 or place + len(squeezed(text)) < len(squeezed(whole[:start])):
                raise UserError(
                    f"{row.source}: the chat template of {self.name!r} leaves out or changes a part of the response:\n"
                    f"  given:    {around(text, 0)}\n"
                    f"  rendered: {around(whole[start:], 0)}\n"
                    "Set another template (data.chat_template), or take that part out."
                )


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By their number, those of a role (eos_token) and those that are only marked as special (Phi-3's <|end|>).

    They are what `skip_special_tokens` skips.
    """
    marked = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: text for number, text in (marked | named).items() if text}


def _chat(row: Row) -> list[Message]:
    assert not isinstance(row.prompt, str)
    return row.prompt


def _joined(messages: list[Message], answer: Answer) -> list[Message]:
    """The chat with the answer: as one more message, or as what continues the assistant's last one."""
    message: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    if messages[-1]["role"] != "assistant":
        return [*messages, message]
    begun = messages[-1]
    content = (begun["content"] or "") + (message["content"] or "")
    return [*messages[:-1], {**begun, **message, "content": content}]


def _with_arguments(messages: list[Message]) -> Iterator[list[Message]]:
    """The chat with the arguments of its calls of tools as objects, as most templates read them; then as JSON text."""
    if not any(message.get("tool_calls") for message in messages):
        yield messages
        return
    for form in (_parsed, _dumped):
        chat = copy.deepcopy(messages)
        for message in chat:
            for call in message.get("tool_calls") or []:
                called = call.get("function") or call
                if "arguments" in called:
                    called["arguments"] = form(called["arguments"])
        yield chat


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _dumped(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _texts(answer: Answer) -> Iterator[str]:
    """The texts that a response consists of."""
    if isinstance(answer, str):
        yield answer
        return
    for key in ("content", *THOUGHTS):
        if isinstance(value := answer.get(key), str):
            yield value
    for call in answer.get("tool_calls") or []:
        yield str(call.get("function", call).get("name", ""))


def _before_tag(start: str, text: str) -> str:
    """The start of a text, up to the token or tag that it would end within."""
    for found in re.finditer(r"<[^<>\s]+>|\[[^\[\]\s]+\]", text):
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
