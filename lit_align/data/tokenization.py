"""From texts to token ids, within stated limits; what does not fit is counted."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_align.data.formats.rows import Message, Row, Text
from lit_align.errors import UserError

LongPrompts = Literal["error", "drop", "left"]


class Encoder:
    """Turns texts into tokens within stated limits, and counts what did not fit.

    Args:
        max_prompt_length: Longest prompt, in tokens.
        max_response_length: Longest response, in tokens, its end included; longer ones lose their end (and its token).
        long_prompts: What happens to a longer prompt: an error, the row is dropped, or its beginning (left) is cut,
            behind the token that begins a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        max_response_length: int,
        long_prompts: LongPrompts = "error",
    ):
        self.tokenizer: Any = tokenizer  # the stubs' unions of all that it can return help nobody
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.long_prompts = long_prompts
        self.counts: Counter[str] = Counter()
        self._turn_end = _turn_end(tokenizer)
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())) or r"(?!)")

    def prompt(self, text: Text, source: str) -> list[int] | None:
        """Tokens of a prompt; None where the row is to be dropped.

        Raises:
            UserError: the prompt is too long (by the rule `error`), or a chat without a chat template or of messages
                that the template refuses.
        """
        if isinstance(text, str):
            ids = list(self.tokenizer(text).input_ids)
            if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close the text
                ids.pop()
            if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:  # the text begins with it, too
                ids.pop(0)
            if not ids:
                starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
                ids = [start for start in starts if start is not None][:1]
        else:
            if not self.tokenizer.chat_template:
                raise UserError(
                    f"{source}: the prompt is a chat, but {self.tokenizer.name_or_path!r} has no chat template. Use "
                    "an instruct model's tokenizer, or prompts of plain text."
                )
            if any(self._special.search(message["content"]) for message in text):
                self.counts["chats with special tokens in their text"] += 1
            rendered = _rendered(self.tokenizer, text, source, add_generation_prompt=True)
            ids = list(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        if len(ids) <= self.max_prompt_length:
            return ids
        if self.long_prompts == "error":
            raise UserError(
                f"{source}: the prompt has {len(ids)} tokens, but max_prompt_length={self.max_prompt_length}. Raise "
                "it, or set long_prompts=left (cut the beginning) or long_prompts=drop (leave such rows out)."
            )
        self.counts[f"prompts too long, {'cut' if self.long_prompts == 'left' else 'dropped'}"] += 1
        if self.long_prompts == "drop":
            return None
        start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []  # without it a model reads what it never saw
        return start + ids[len(ids) - self.max_prompt_length + len(start) :]

    def prompts(self, rows: Iterable[Row]) -> tuple[list[tuple[Row, list[int]]], Counter[str]]:
        """The rows that are not dropped, with the tokens of their prompts; and how many were dropped, cut, noted."""
        self.counts.clear()
        encoded = [(row, self.prompt(row.prompt, row.source)) for row in rows]
        return [(row, ids) for row, ids in encoded if ids is not None], self.counts.copy()

    def response(self, text: str, *, chat: bool) -> list[int]:
        """Tokens of a response, its end included unless it is cut."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        end = self._turn_end if chat else self._eos
        if ids[-1:] != [end]:
            ids.append(end)
        if not {self._turn_end, self.tokenizer.eos_token_id}.isdisjoint(ids[:-1]):
            self.counts["responses with an end token before their end"] += 1
        if len(ids) > self.max_response_length:
            self.counts["responses too long, cut"] += 1
        return ids[: self.max_response_length]

    @property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no end-of-sequence token.")
        return self.tokenizer.eos_token_id

    def end_ids(self) -> list[int]:
        """Tokens at which sampling ends a response."""
        return list(dict.fromkeys([self._eos, self._turn_end]))


def listing(counts: Mapping[str, int]) -> str:
    """What was skipped, as a phrase: 3 prompts too long, dropped."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none was skipped"


def _turn_end(tokenizer: Any) -> int:
    """The special token that the chat template puts behind an assistant's message; the text's end if there is none."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "lit_align"}]
        rendered = _rendered(tokenizer, chat, tokenizer.name_or_path)
        behind = tokenizer(rendered.rpartition("lit_align")[2], add_special_tokens=False).input_ids
        specials = special_tokens(tokenizer)
        for token in behind:
            if token in specials:
                return token
    return tokenizer.eos_token_id


@lru_cache(maxsize=1)  # thousands, in some models, and asked for with each response
def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By their number, those of a role (eos_token) and those that are only marked as special (Phi-3's <|end|>).

    They are what `skip_special_tokens` skips.
    """
    marked = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: text for number, text in (marked | named).items() if text}


def _rendered(tokenizer: Any, chat: list[Message], source: str, **options: Any) -> str:
    """The chat in its template's words; an error where the template refuses a message names the source."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise UserError(
            f"{source}: the chat template of {tokenizer.name_or_path!r} refuses the messages ({roles}): {error}. "
            "Change them, or take another model's tokenizer."
        ) from error
