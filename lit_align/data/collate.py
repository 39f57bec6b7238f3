"""From text to batches: the one way in which prompts and responses become tokens, and the loader that serves them.

Prompt and response are tokenized apart, so that no token spans both. A plain prompt gets the special tokens that the
tokenizer begins a text with, once, even if the text spells them out; a chat goes through its template, once, with the
turn of the assistant opened. A response ends with the token that ends the assistant's turn (or the text), once, so that
the policy learns to stop. Special tokens spelled out within a chat or a response act as such; they are counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_align.data.formats import Message, Row, Text
from lit_align.errors import UserError
from lit_align.logprobs import PreferenceBatch
from lit_align.policy import Policy

LongPrompts = Literal["error", "drop", "left"]


@dataclass(frozen=True)
class Example:
    """One prompt with its K responses, as tokens; the best first where they are ordered."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    source: str
    reference_logps: list[float] | None = None
    sampler_logps: list[float] | None = None
    rewards: list[float] | None = None
    labels: float | list[float] | None = None
    win_probabilities: list[float] | None = None
    mismatched: bool = False
    # of groups that a pairing rule chooses from
    texts: list[str] | None = None
    preferences: list[list[float]] | None = None  # P(y_i ≻ y_j), [K, K]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and all its responses."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


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


def collate(examples: Sequence[Example], indices: Sequence[int]) -> PreferenceBatch:
    """Put examples of equal K into a batch; padding is on the right.

    Args:
        indices: Number of each example in its data set.
    """

    def column(name: str) -> Tensor | None:
        values = [getattr(example, name) for example in examples]
        return None if values[0] is None else torch.tensor(values, dtype=torch.float32)

    prompt_ids, prompt_mask = _pad([example.prompt_ids for example in examples])
    responses = [ids for example in examples for ids in example.response_ids]
    response_ids, response_mask = _pad(responses)
    shape = (len(examples), len(responses) // len(examples), response_ids.shape[1])
    return PreferenceBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids.view(shape),
        response_mask=response_mask.view(shape),
        index=torch.tensor(indices),
        reference_logps=column("reference_logps"),
        sampler_logps=column("sampler_logps"),
        rewards=column("rewards"),
        labels=column("labels"),
        win_probabilities=column("win_probabilities"),
        mismatched=examples[0].mismatched,
    )


@torch.no_grad()
def record_logps(
    of: Callable[[PreferenceBatch], Tensor], policy: Policy, examples: Sequence[Example], batch_size: int
) -> list[list[float]]:
    """Log-probabilities of every response of each example.

    Args:
        of: The policy itself, or a reference's `logps`.
        policy: In eval mode meanwhile; batches go to its device.
        batch_size: Examples that are computed at once.
    """
    logps: list[list[float]] = []
    with policy.evaluating():
        for start in range(0, len(examples), batch_size):
            some = examples[start : start + batch_size]
            logps += of(move_data_to_device(collate(some, range(len(some))), policy.device)).tolist()
    return logps


def _pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


class ExampleLoader:
    """Batches of examples in an order that is a function of (seed, epoch); resumes in the middle of an epoch.

    Every process takes every world_size-th example. With several processes what is left over after the last full
    batch of all is dropped (`dropped` examples of the epoch), so that none waits for another.

    Args:
        batch_size: Examples per batch and process.
        shuffle: Draw a new order each epoch.
        group_by_length: Then put examples of like length into one batch (of all processes together), within stretches
            of 32 batches, and shuffle the batches. An incomplete last one stays the last.
        epoch: Tells the current epoch; asked when iteration begins.
        length: Batches of an epoch, for which the examples are gone through again and again, or not to their end. None
            is once through all.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
        length: int | None = None,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        share = len(examples) // (batch_size * world_size) * batch_size if world_size > 1 else len(examples)
        self.share = share
        self.length = -(-share // batch_size) if length is None else length
        self.dropped = len(examples) - share * world_size
        self._served = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PreferenceBatch]:
        once = -(-self.share // self.batch_size)
        self._served, self._resume_at = self._resume_at, 0
        mine: dict[int, list[int]] = {}  # the examples of one passage, in order
        for number in range(self._served, self.length):
            passage, place = divmod(number, once)
            if passage not in mine:
                mine = {passage: self._order(passage)}
            indices = mine[passage][place * self.batch_size : (place + 1) * self.batch_size]
            self._served += 1
            yield collate([self.examples[i] for i in indices], indices)

    def _order(self, passage: int) -> list[int]:
        order = list(range(len(self.examples)))
        if self.shuffle:
            key = self.seed * 1_000_003 + self.epoch() + passage * 999_999_937
            generator = torch.Generator().manual_seed(key)
            order = torch.randperm(len(order), generator=generator).tolist()
            if self.group_by_length:
                order = self._grouped(order, generator)
        return order[self.rank :: self.world_size][: self.share]

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        size = self.batch_size * self.world_size
        full = len(order) // size * size
        batches: list[list[int]] = []
        for start in range(0, full, 32 * size):
            some = sorted(order[start : min(start + 32 * size, full)], key=lambda i: self.examples[i].tokens)
            batches += [some[first : first + size] for first in range(0, len(some), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [i for batch in shuffled for i in batches[batch]] + order[full:]

    def state_dict(self) -> dict[str, Any]:
        return {
            "served": self._served,
            "length": len(self),
            "examples_per_batch": self._examples_per_batch,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batches that were served; an epoch that was served whole begins anew.

        Raises:
            UserError: the data have changed, or batches were of another size, or more than there are now, so that their
                number does not tell which examples were served.
        """
        if state["served"] >= state["length"]:
            self._resume_at = 0
            return
        if state["examples_per_batch"] != self._examples_per_batch or state["served"] >= len(self):
            raise UserError(
                f"the checkpoint is from the middle of an epoch of {state['length']} batches of "
                f"{state['examples_per_batch']} examples, and now they are {len(self)} of {self._examples_per_batch} "
                f"(data.batch_size={self.batch_size} × {self.world_size} processes; of a stream of texts "
                "data.text_batch_size): some would be trained on twice, or never. Set what it was, or resume from the "
                "end of an epoch."
            )
        if state["tokens"] != self._tokens:
            raise UserError(
                f"the checkpoint is from the middle of an epoch over {state['tokens']} tokens of data, and now there "
                f"are {self._tokens}: the data have changed, and some would be trained on twice, or never. Give it the "
                "data of before, or resume from the end of an epoch."
            )
        self._resume_at = state["served"]

    @cached_property
    def _tokens(self) -> int:
        """Of all examples: what tells data from others."""
        return sum(example.tokens for example in self.examples)

    @property
    def _examples_per_batch(self) -> int:
        """Of all processes together: a checkpoint may move between one process and many."""
        return self.batch_size * self.world_size
