"""A tokenizer's chat template: the messages as text, or one message that says what the template refuses."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from jinja2 import TemplateError

from lit_align.data.formats.messages import ROLES
from lit_align.data.formats.rows import Message, Row
from lit_align.errors import UserError, first_line

_REFUSALS = (TemplateError, ValueError, TypeError, KeyError, AttributeError)
"""How templates refuse messages: by raising an exception, or by reading what is not there."""


CLOCK = "strftime_now"
"""The function by which templates write today's date; as an argument, the date that it gives (2026-11-26)."""
_WITH_DATE = """\
{% macro strftime_now(format) %}
{% set written = namespace(text=format) %}
{% for part, value in lit_align_date.items() %}
{% set written.text = written.text.replace(part, value) %}
{% endfor %}
{{ written.text }}
{%- endmacro %}
"""
"""Put before a template, it gives strftime_now the date in lit_align_date: transformers lets no function pass."""
_PARTS_OF_DATES = (*"aAbBcdeFGHIjmMpSuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-M", "-S", "-j")
MARK = "lit_align"
"""Placeholder for a response, used to find the template's own text around it."""

_BEFORE_ANSWER = """\
{{% set lit_align_opens = add_generation_prompt %}}
{{% if lit_align_opens %}}
{{% set messages = messages + {answer} %}}
{{% set add_generation_prompt = false %}}
{{% endif %}}
{{% set lit_align_chat %}}
{template}{{{{ '' }}}}{{% endset %}}
{{{{ lit_align_chat.rpartition('{mark}')[0].rstrip(' ') if lit_align_opens else lit_align_chat }}}}"""
"""A template around another one, which renders its generation prompt as it renders a chat before an answer."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "required": []}


class ChatTemplate:
    """Renders messages by a tokenizer's chat template.

    Args:
        arguments: Arguments of the template (enable_thinking, documents, …); a row's own take precedence.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._started = datetime.now()
        _moment(self.arguments.get(CLOCK))

    @property
    def name(self) -> str:
        return self.tokenizer.name_or_path

    def check(self, row: Row) -> None:
        """Check that there is a template, and that it reads the row's tools and all arguments.

        Raises:
            UserError: it does not.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{row.source}: the prompt is a chat, but {self.name!r} has no chat template. Set one "
                "(data.chat_template=FILE), take an instruct model's tokenizer (data.tokenizer), or give prompts of "
                "plain text."
            )
        if row.tools and not self._reads_tools:
            raise UserError(
                f"{row.source}: the row has tools, but the chat template of {self.name!r} does not read any. Set "
                "another template (data.chat_template), or take the column out."
            )
        _moment(row.template_args.get(CLOCK))
        for name in (*self.arguments, *row.template_args):
            if name not in self.tokenizer.get_chat_template(tools=row.tools):
                where = "the row's arguments" if name in row.template_args else "data.template_args"
                raise UserError(
                    f"{row.source}: {where} hold {name!r}, which the chat template of {self.name!r} does not read. "
                    "Take it out, or set another template (data.chat_template)."
                )

    @cached_property
    def _reads_tools(self) -> bool:
        """Whether the template writes the names of tools into the text."""
        name = "lit_align_tool"
        tool = {"type": "function", "function": {"name": name, "description": "", "parameters": _NO_PARAMETERS}}
        probe = Row([], source=self.name, tools=[tool])
        try:
            return name in self._rendered(probe, [{"role": "user", "content": "a"}], add_generation_prompt=True)
        except _REFUSALS:
            return "tools" in self.tokenizer.get_chat_template(tools=probe.tools)

    def render(self, row: Row, messages: list[Message], **options: Any) -> str:
        """The messages as text.

        Args:
            row: Its tools and template_args are read, and its source is named.
            options: Further arguments of the template.

        Raises:
            UserError: the template refuses them.
        """
        try:
            return self._rendered(row, messages, **options)
        except _REFUSALS as error:
            raise self._refusal(row, messages, error) from error

    def _rendered(self, row: Row, messages: list[Message], **options: Any) -> str:
        """The messages as the template renders them; the template's error if it refuses them."""
        refusal: Exception | None = None
        for chat in _with_arguments(_with_parts(messages, self._roles_in_parts)):
            try:
                return self._applied(chat, row.tools, {**self.arguments, **row.template_args, **options})
            except _REFUSALS as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _applied(self, chat: list[Message], tools: Any, arguments: dict[str, Any]) -> str:
        """The template's text; its function strftime_now gives the date of the arguments, or of the process's start."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if CLOCK in template:
            day = _moment(arguments.pop(CLOCK, None)) or self._started
            arguments["chat_template"] = _WITH_DATE + template
            arguments["lit_align_date"] = {f"%{part}": day.strftime(f"%{part}") for part in _PARTS_OF_DATES}
        return str(self.tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **arguments))

    def _refusal(self, row: Row, messages: list[Message], error: Exception) -> UserError:
        """The error for messages that the template refuses, with the first one at which it does."""
        which = next((n for n in range(1, len(messages)) if self.refuses(row, messages[:n])), len(messages))
        roles = ", ".join(str(message["role"]) for message in messages)
        has_system = messages[0]["role"] in ("system", "developer")
        change = "Put the system message into the first user's turn" if has_system else "Change them"
        end = "…" if str(error).rstrip().endswith("...") else "."
        return UserError(
            f"{row.source}: the chat template of {self.name!r} refuses the messages ({roles}) at message {which}: "
            f"{first_line(error)}{end} {change}, or set another template (data.chat_template)."
        )

    def refuses(self, row: Row, messages: list[Message]) -> bool:
        """Whether the template refuses the messages."""
        try:
            self._rendered(row, messages)
        except _REFUSALS:
            return True
        return False

    @property
    def before_answer(self) -> str:
        """The template, changed so that its generation prompt is all that it renders before an answer.

        The spaces that begin the answer are left out. All other renderings stay the same.
        """
        return _BEFORE_ANSWER.format(
            answer=_with_parts([{"role": "assistant", "content": MARK}], self._roles_in_parts),
            template=self._text.removesuffix("\n"),  # as jinja2 reads it
            mark=MARK,
        )

    @property
    def _text(self) -> str:
        """The template as one text; some tokenizers have another one for chats with tools."""
        given = self.tokenizer.chat_template
        if isinstance(given, str):
            return given
        default = given["default"]
        return (
            f"{{% if tools %}}{given['tool_use']}{{% else %}}{default}{{% endif %}}" if "tool_use" in given else default
        )

    def writes_date(self, row: Row, messages: list[Message]) -> bool:
        """Whether the template writes today's date into the text, which no argument sets."""
        if CLOCK in {**self.arguments, **row.template_args}:
            return False
        first, second = (self._rendered(row, messages, **{CLOCK: day}) for day in ("2001-02-03", "2010-11-12"))
        return first != second

    @property
    def today(self) -> str:
        """The date that the template may write into the text; empty if it does not read one, or an argument sets it."""
        reads_date = CLOCK in str(self.tokenizer.chat_template) and CLOCK not in self.arguments
        return str(self._started.date()) if reads_date else ""

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        """The roles whose content the template reads as a list of parts only, as some templates for images do."""
        texts = {"user": "lit_align's question", "assistant": "lit_align's answer"}
        chat: list[Message] = [{"role": role, "content": text} for role, text in texts.items()]
        for roles in (frozenset[str](), frozenset(ROLES.values()), frozenset({"user"})):
            try:
                whole = self._applied(_with_parts(chat, roles), None, {**self.arguments})
            except _REFUSALS:
                continue
            if all(text in whole for text in texts.values()):
                return roles
        return frozenset()


def _moment(given: object) -> datetime | None:
    """The date that an argument of a template sets; None if it sets none.

    Raises:
        UserError: it is not a date.
    """
    try:
        return None if given is None else datetime.fromisoformat(str(given))
    except ValueError as error:
        raise UserError(f"{CLOCK}={given} of template_args must be a date such as 2026-11-26. Change it.") from error


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By their number, those of a role (eos_token) and those that are only marked as special (Phi-3's <|end|>).

    They are what `skip_special_tokens` skips.
    """
    marked = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: text for number, text in (marked | named).items() if text}


def _with_parts(messages: list[Message], roles: Collection[str]) -> list[Message]:
    """The chat with the texts of some roles as lists of parts."""

    def in_parts(content: str | None) -> Any:
        return content if content is None else [{"type": "text", "text": content}]

    return [{**each, "content": in_parts(each["content"])} if each["role"] in roles else each for each in messages]


def _with_arguments(messages: list[Message]) -> Iterator[list[Message]]:
    """The chat with the arguments of its calls of tools as objects, as most templates read them; then as JSON text.

    Beside calls the content may be missing; some templates read an empty one in its place, which comes last.
    """
    if not any(message.get("tool_calls") for message in messages):
        yield messages
        return
    for content, form in product((None, ""), (_parsed, _dumped)):
        chat = copy.deepcopy(messages)
        for message in chat:
            message["content"] = content if message["content"] is None else message["content"]
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
