"""From texts to token ids, within configured limits; rows that do not fit are counted.

Prompt + response is tokenized as one text and cut where the response begins, so the model reads the tokens that its
tokenizer gives for the whole. If a token would span both, prompt and response are tokenized separately, and together
they spell the same text. Plain prompts begin with the tokenizer's initial special tokens, only once even if the text
contains them. A response ends with one token that ends the assistant's turn (or the text), so the policy learns to
stop. Special tokens in the text of a chat or a response act as special tokens; they are counted.
"""

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_align.data.encoding import Encoder, Ids, ids_of
from lit_align.data.formats.rows import Row
from lit_align.data.rendering import ChatRenderer, Form, PromptEnd, Rendering, around, squeezed
from lit_align.data.sampling_prompt import SeenEnd
from lit_align.data.template import special_tokens
from lit_align.errors import UserError, amount

LongPrompts = Literal["error", "drop", "truncate_left"]
_SECOND_BLOCK = re.compile(r"<(\w+)>\s*</\1>\s*<\1>")
"""An empty block of thoughts, and the beginning of another."""


class TokenizedRow(NamedTuple):
    """Tokens of a prompt and of each of its responses."""

    prompt_ids: list[int]
    response_ids: list[list[int]]


class RowIds(NamedTuple):
    """The same as arrays."""

    prompt: Ids
    responses: list[Ids]

    def in_python(self) -> TokenizedRow:
        return TokenizedRow(self.prompt.tolist(), [ids.tolist() for ids in self.responses])


class PreferenceTokenizer:
    """Turns rows into tokens within the limits, and counts the rows that do not fit.

    Args:
        max_prompt_length: Longest prompt, in tokens.
        max_response_length: Longest response, in tokens, its end token included; longer ones are cut at the end.
        long_prompts: Treatment of a longer prompt, and of a row longer than `positions`: an error, drop the row, or cut
            the prompt's beginning, but not the token that begins a text (truncate_left).
        template_args: Arguments of the chat template.
        wraps_prompts: Make a plain prompt the user's turn of a chat.
        positions: The model's maximum number of tokens, prompt and response together; None without a limit.
        model_ends: Gives further tokens at which sampling ends, if they are special tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int = sys.maxsize,
        max_response_length: int = sys.maxsize,
        long_prompts: LongPrompts = "error",
        template_args: Mapping[str, Any] | None = None,
        wraps_prompts: bool = False,
        positions: int | None = None,
        model_ends: Callable[[], Iterable[int]] = tuple,
    ):
        self.tokenizer: Any = tokenizer  # the stubs' union types are too wide to be useful
        self.renderer = ChatRenderer(tokenizer, template_args)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.long_prompts = long_prompts
        self.wraps_prompts = wraps_prompts
        self.positions = positions
        self._model_ends = model_ends
        self.counts: Counter[str] = Counter()
        self.prompt_ends: dict[PromptEnd, SeenEnd] = {}
        self.encoder = Encoder(tokenizer)
        self._begin = _begin(tokenizer)
        specials = special_tokens(tokenizer)
        self._special_ids = specials.keys()
        self._special = re.compile("|".join(map(re.escape, specials.values())) or r"(?!)")

    # --- a row ---

    def prompt_ids(self, row: Row) -> list[int] | None:
        """Tokens of the prompt, as in sampling; None if the row is dropped.

        Raises:
            UserError: the prompt is too long (under the rule `error`), or it is a chat, and the chat template is
                missing or rejects the messages.
        """
        row = self.as_chat(row)
        self._count_specials(row)
        form = Form.PLAIN if isinstance(row.prompt, str) else Form.CHAT
        _, ids = self._opening(self._prompt_text(row), form)
        ids = self._limited(ids, self.max_prompt_length, f"max_prompt_length={self.max_prompt_length}", row)
        return None if ids is None else ids.tolist()

    def prompts(self, rows: Iterable[Row]) -> Iterator[tuple[Row, list[int]]]:
        """The rows that are kept, with the tokens of their prompts; texts are encoded together, as in `rows`."""
        rendered = ((row, Rendering(self._prompt_text(row), ())) for row in rows)
        return ((row, ids) for row, _ in self.encoder.ahead(rendered) if (ids := self.prompt_ids(row)) is not None)

    def _prompt_text(self, row: Row) -> str:
        row = self.as_chat(row)
        return row.prompt if isinstance(row.prompt, str) else self.renderer.prompt(row)

    def row(self, row: Row) -> TokenizedRow | None:
        """Tokens of the prompt and its responses, end tokens included unless cut; None if the row is dropped.

        Raises:
            UserError: as for `prompt_ids`; or the template renders the prompt differently for different responses; or
                the row is longer than the model can read (under the rule `error`).
        """
        row = self.as_chat(row)
        ids = self._row(row, self.rendering(row))
        return None if ids is None else ids.in_python()

    def rows(self, rows: Iterable[Row]) -> Iterator[tuple[Row, RowIds | None]]:
        """The same for many rows, whose texts are encoded together: several times as fast."""
        rendered = ((row, self.rendering(row)) for row in map(self.as_chat, rows))
        return ((row, self._row(row, rendering)) for row, rendering in self.encoder.ahead(rendered))

    def _row(self, row: Row, rendering: Rendering) -> RowIds | None:
        self._count_specials(row)
        if rendering.end is not None and rendering.end not in self.prompt_ends:
            self.prompt_ends[rendering.end] = SeenEnd.of(row.source, rendering)
        tokens = self.tokens(rendering)
        if tokens is None:
            reason = "whose tokens span prompt and response" if rendering.prompt else "of one token without a prompt"
            self.counts[f"rows {reason}, dropped"] += 1
            return None
        most, limit = self.max_prompt_length, f"max_prompt_length={self.max_prompt_length}"
        responses = [self._cut(ids) for ids in tokens.responses]
        if self.positions is not None:
            room = self.positions - max(map(len, responses))
            if room < 1 and self.long_prompts != "drop":
                raise UserError(
                    f"{row.source}: a response of {self.positions - room} tokens leaves no room for its prompt: the "
                    f"model {self.tokenizer.name_or_path!r} reads {self.positions}. Lower data.max_response_length."
                )
            if room < most:
                most = room
                limit = f"the model {self.tokenizer.name_or_path!r} reads {self.positions} with its response"
        prompt_ids = self._limited(tokens.prompt, most, limit, row)
        return None if prompt_ids is None else RowIds(prompt_ids, responses)

    def response_ids(self, row: Row) -> list[list[int]]:
        """Tokens of the responses alone, without limits.

        Raises:
            UserError: as for `row`, or no tokens of a response spell its text after the prompt.
        """
        row = self.as_chat(row)
        tokens = self.tokens(self.rendering(row))
        if tokens is None:
            raise UserError(
                f"{row.source}: no tokens of the response spell its text after the prompt. Leave the row out, or begin "
                "the response with a space or a new line."
            )
        return [ids.tolist() for ids in tokens.responses]

    def rendering(self, row: Row) -> Rendering:
        """The text of the prompt and of each response, as the chat template renders them; plain text is unchanged."""
        if not isinstance(row.prompt, str):
            return self.renderer.rendering(row)
        texts = [text for text in row.responses if isinstance(text, str)]
        if len(texts) < len(row.responses):
            raise UserError(
                f"{row.source}: a response is a message, but the prompt is plain text. Give the prompt as messages."
            )
        return Rendering(row.prompt, tuple(texts), Form.VERBATIM if row.is_verbatim else Form.PLAIN, cut=row.cut)

    def as_chat(self, row: Row) -> Row:
        """The row, with a plain prompt as a chat if `wraps_prompts` is set."""
        if not self.wraps_prompts or not isinstance(row.prompt, str) or not row.prompt or row.is_verbatim:
            return row
        return replace(row, prompt=[{"role": "user", "content": row.prompt}])

    def end_ids(self) -> list[int]:
        """Tokens at which sampling ends a response."""
        own = [token for token in self._model_ends() if token in self._special_ids]
        return list(dict.fromkeys([self._eos, self._turn_end, *own]))

    # --- text to tokens ---

    def tokens(self, rendering: Rendering) -> RowIds | None:
        """Tokens of a rendering, without limits; each response that is not cut ends with a token that ends sampling.

        A verbatim text has no other tokens than its own; if it is trained on from its beginning, its first token is the
        prompt. None if no tokens of a response, after those of the prompt, spell the text of both.
        """
        begin, prompt_ids = self._opening(rendering.prompt, rendering.form)
        wholes = [begin + self._encode(rendering.prompt + text, begin) for text in rendering.responses]
        if not prompt_ids:
            prompt_ids = wholes[0][:1]
            if wholes[0] == prompt_ids:
                return None
        if not all(_begins(whole, prompt_ids) for whole in wholes):
            prompt_ids = self._prompt_within(rendering, begin, wholes, prompt_ids) or prompt_ids
        responses = []
        for text, whole, is_ended in zip(rendering.responses, wholes, rendering.is_ended, strict=True):
            is_clean = _begins(whole, prompt_ids)
            ids = whole[len(prompt_ids) :] if is_clean else self._continuation(prompt_ids, text, whole)
            if ids is None:
                return None
            responses.append(self._ended(ids, rendering.form) if is_ended else ids)
        return RowIds(prompt_ids, responses)

    def _opening(self, prompt: str, form: Form) -> tuple[Ids, Ids]:
        """The tokens that begin a text, and the prompt's tokens including them; at least one unless it is verbatim."""
        begin = self._begin if form is Form.PLAIN else ids_of(())
        ids = begin + self._encode(prompt, begin)
        if not ids and form is not Form.VERBATIM:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            begin = ids = ids_of([start for start in starts if start is not None][:1])
        return begin, ids

    def _encode(self, text: str, begin: Ids | None = None) -> Ids:
        """Tokens of a text; a beginning-of-sequence token in the text is left out if `begin` has one."""
        ids = self.encoder(text)
        is_doubled = begin and ids and ids[0] == begin[-1] == self.tokenizer.bos_token_id
        return ids[1:] if is_doubled else ids

    def _prompt_within(self, rendering: Rendering, begin: Ids, wholes: list[Ids], prompt_ids: Ids) -> Ids | None:
        """The prompt's tokens that all wholes share, if they differ from the tokens of the prompt alone."""
        if not self.tokenizer.is_fast:
            return None
        prompts = []
        for text, whole in zip(rendering.responses, wholes, strict=True):
            encoded = self.tokenizer(
                rendering.prompt + text, add_special_tokens=False, return_offsets_mapping=True
            ).offset_mapping
            inside = sum(end <= len(rendering.prompt) for _, end in encoded)
            skipped = len(encoded) + len(begin) - len(whole)  # a doubled beginning of the sequence
            prompts.append(whole[: len(begin) + inside - skipped])
        first = prompts[0]
        same = all(prompt == first for prompt in prompts) and self._decode(first) == self._decode(prompt_ids)
        return first if same else None

    def _continuation(self, prompt_ids: Ids, text: str, whole: Ids) -> Ids | None:
        """Tokens of a response that spell it after the prompt, for a whole with a token that spans both.

        Tokenizers such as SentencePiece's add a space at the beginning of a text, but not after another text.
        """
        expected = unicodedata.normalize("NFC", self._decode(whole))
        for before in ("", "\n", "a", ".", "0", "|", " "):
            start = self._encode(before) if before else ids_of(())
            ids = self._encode(before + text)
            if _begins(ids, start):
                ids = ids[len(start) :]
                if unicodedata.normalize("NFC", self._decode(prompt_ids + ids)) == expected:
                    return ids
        return None

    def _ended(self, ids: Ids, form: Form) -> Ids:
        if form is Form.VERBATIM:
            return ids
        if form is Form.PLAIN:
            return ids if ids and ids[-1] == self._eos else ids + ids_of([self._eos])
        ends = self._special_ids if self.renderer.turn_end else self.end_ids()  # a tool call may end differently
        return ids if ids and ids[-1] in ends else ids + ids_of([self._turn_end])

    def _decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def check(self, row: Row) -> None:
        """Check that the row's tokens decode to the same text as the tokenizer's tokens of prompt + response.

        Texts that the tokenizer itself changes (to lower case, for example) and second blocks of thoughts are counted.

        Raises:
            UserError: the texts differ.
        """
        row = self.as_chat(row)
        rendering = self.rendering(row)
        self.encoder.prove(rendering)
        if (tokens := self.tokens(rendering)) is None:
            return
        begin, _ = self._opening(rendering.prompt, rendering.form)
        ends = [ids_of(()), *(ids_of([end]) for end in self.end_ids())]
        found = set[str]()
        for text, ids in zip(rendering.responses, tokens.responses, strict=True):
            whole = rendering.prompt + text
            own_ids = begin + self._encode(whole, begin)
            own = self._decode(own_ids)
            decoded = self._decode(tokens.prompt + ids)
            if decoded not in [self._decode(own_ids + end) for end in ends]:
                place = len(os.path.commonprefix([decoded, own]))  # noqa: RUF071
                raise UserError(
                    f"{row.source}: the tokens of prompt and response do not spell their text:\n"
                    f"  text:   {around(own, place)}\n"
                    f"  tokens: {around(decoded, place)}\n"
                    "Use another tokenizer (data.tokenizer), and please report this."
                )
            found |= {*_remarks(whole, len(rendering.prompt), own)}
        self.counts.update(f"of the rows looked at {remark}" for remark in found)

    # --- limits ---

    def _limited(self, ids: Ids, most: int, limit: str, row: Row) -> Ids | None:
        """The prompt, cut if it is too long and the rule says so; None if the row is dropped."""
        if len(ids) <= most:
            return ids
        if self.long_prompts == "error":
            raise UserError(
                f"{row.source}: the prompt has {len(ids)} tokens, but {limit}. Raise the limit, or set "
                "data.long_prompts=truncate_left (cut the prompt's beginning) or drop (leave such rows out)."
            )
        self.counts[f"prompts too long, {'cut' if self.long_prompts == 'truncate_left' else 'dropped'}"] += 1
        if self.long_prompts == "drop":
            return None
        start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else ids_of(())  # models are trained with it
        return start + ids[len(ids) - max(0, most - len(start)) :]

    def _cut(self, ids: Ids) -> Ids:
        if not {self._turn_end, self._eos}.isdisjoint(ids[:-1]):
            self.counts["responses with an end token before their end"] += 1
        if len(ids) > self.max_response_length:
            self.counts["responses too long, cut"] += 1
        return ids[: self.max_response_length]

    def _count_specials(self, row: Row) -> None:
        if not isinstance(row.prompt, str):
            texts = (message.get("content") for message in row.prompt)
            if any(isinstance(text, str) and self._special.search(text) for text in texts):
                self.counts["chats with special tokens in their text"] += 1

    @cached_property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {self.tokenizer.name_or_path!r} has no eos_token. Set data.tokenizer.")
        return self.tokenizer.eos_token_id

    @cached_property
    def _turn_end(self) -> int:
        """The token that ends the assistant's turn; without one or without a template, the end-of-sequence token."""
        end = self.renderer.turn_end if self.tokenizer.chat_template else ""
        return self.tokenizer.convert_tokens_to_ids(end) if end else self._eos


def notes_on(tokenizer: PreferenceTokenizer, rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Lines of the run's header on the chat template: how it renders these rows, or that it is not used."""
    wrapped = [tokenizer.as_chat(row) for row in rows]
    chats = [row for row in wrapped if not isinstance(row.prompt, str)]
    if chats:
        yield from tokenizer.renderer.notes(chats)
    elif tokenizer.tokenizer.chat_template and any(row.prompt and not row.is_verbatim for row in wrapped):
        yield (
            "chat template",
            "not used, because the prompts are plain text"
            f"{', nor are its arguments in the rows' * any(row.template_args for row in wrapped)}; "
            "data.wrap_prompts_as_chat=true makes each a user's turn",
        )


def _remarks(whole: str, start: int, own: str) -> Iterator[str]:
    """What a reader of the header should know about a prompt and its response.

    Args:
        start: Where the response begins.
        own: The text as the tokenizer decodes it.
    """
    if squeezed(whole) not in squeezed(own):
        yield "have characters that the tokenizer changes"
    if _SECOND_BLOCK.search(whole, max(0, start - 100)):
        yield "have thoughts after the chat template's own empty block (give them as `reasoning_content`)"


def listing(counts: Mapping[str, int]) -> str:
    """The counts as a phrase: 3 prompts too long, dropped."""
    return ", ".join(amount(count, reason) for reason, count in counts.items()) or "none was skipped"


def in_place(tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """A response decoded after its prompt: some tokenizers drop a space at the beginning of a text."""
    prompt, whole = (tokenizer.decode(ids) for ids in (prompt_ids, [*prompt_ids, *response_ids]))
    return whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(response_ids)


def _begin(tokenizer: Any) -> Ids:
    """The special tokens that the tokenizer puts before a text."""
    bare, whole = list(tokenizer("a", add_special_tokens=False).input_ids), list(tokenizer("a").input_ids)
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return ids_of(whole[:place])


def _begins(ids: Ids, start: Ids) -> bool:
    return ids[: len(start)] == start
