"""Encoding of many texts at once; the text of a prompt is encoded once for all its responses.

A byte-level BPE tokenizer (GPT-2's, Llama 3's, Qwen's) first splits a text into words and encodes each of them alone.
No word reaches across the place before a space that follows a letter or digit. So the tokens of prompt + response are
those of the prompt up to the last such place, followed by those of the rest:

    Write a post about birds.| ... TL;DR:  + response
                      └ encoded again for each response

`Encoder` proves the property on the tokenizer before it uses it, and on the rows that are checked. With any other
tokenizer it encodes every text whole.
"""

import hashlib
import json
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, islice, product
from typing import Any, TypeVar

from tokenizers.models import BPE

from lit_align.data.rendering import Rendering
from lit_align.running import usable_cores

AT_ONCE, CHARACTERS_AT_ONCE = 256, 1 << 20
"""Renderings whose texts are encoded together, and how many characters they may have until no more are added: a token
takes about a hundred bytes while it is encoded."""

REMEMBERED = 1 << 16
"""Words whose tokens a BPE tokenizer remembers, in 20 MB; with its usual 10,000, English takes a quarter longer."""

T = TypeVar("T")
Ids = array  # of C's ints: a thousandth of the objects of a list, and copied at once
_Found = Callable[[], dict[str, Ids]]
"""Waits for the tokens of some texts."""

_CUT = re.compile(r"(?<=[^\W_]) (?=[^\W\d_])")
"""A space between a letter or digit and a letter."""
_SEARCHED = (50, 1000)
"""Characters at the end of a prompt in which the cut is searched, first in a few."""
_BEFORE = ("a", "Z", "é", "中", "م", "न", "7", "'s", "’s", "\na", ".a", "_a", "\u0301a", "a1", "-a")
_AFTER = ("a", "Zz", "é", "中", "م", "न", "s'", "tion.", "a\n\n", "ll", "a 1")


class Encoder:
    """Encodes texts with a tokenizer, without special tokens at their beginning and end."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if tokenizer.is_fast and isinstance(model := tokenizer.backend_tokenizer.model, BPE):
            model._resize_cache(REMEMBERED)
        self._encoded: Mapping[str, Ids] = {}  # texts of the rows at work

    def __call__(self, text: str) -> Ids:
        return self._encoded.get(text) or ids_of(self.tokenizer(text, add_special_tokens=False).input_ids)

    def ahead(self, renderings: Iterable[tuple[T, Rendering]]) -> Iterator[tuple[T, Rendering]]:
        """The same renderings, whose texts have been encoded by then: many together, which is several times as fast.

        While some are used, threads encode the next.
        """
        self._settle()
        begun = ((some, self._begin([rendering for _, rendering in some])) for some in _batches(renderings))
        try:
            for some, found in _made_before(begun, 2):
                self._encoded = found()
                yield from some
        finally:
            self._encoded = {}

    def all(self, renderings: Sequence[Rendering]) -> dict[str, Ids]:
        """The tokens of each prompt, and of each prompt with a response after it."""
        self._settle()
        return self._begin(renderings)()

    def _settle(self) -> None:
        """Set padding, truncation and the treatment of special tokens as they are for a single text."""
        self("")

    def _begin(self, renderings: Sequence[Rendering]) -> _Found:
        """Begin to encode the texts of renderings."""
        wholes = [(each.prompt, each.prompt + text) for each in renderings for text in each.responses]
        prompts = dict.fromkeys(each.prompt for each in renderings)
        cuts = {prompt: self._cut(prompt) for prompt in prompts}
        ends = {prompt: prompt[cut:] for prompt, cut in cuts.items() if cut}
        parts = self._many([*prompts, *ends.values(), *(whole[cuts[prompt] :] for prompt, whole in wholes)])

        def joined() -> dict[str, Ids]:
            found = parts()
            tokens = {prompt: found[prompt] for prompt in prompts}
            for prompt, whole in wholes:
                rest = found[whole[cuts[prompt] :]]
                if prompt in ends:
                    ids = found[prompt]
                    rest = ids[: len(ids) - len(found[ends[prompt]])] + rest
                tokens[whole] = rest
            return tokens

        return joined

    @cached_property
    def identity(self) -> str:
        """Identifies the tokenizer and its chat template."""
        tokenizer = self.tokenizer
        words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        text = f"{type(tokenizer).__name__} {tokenizer.special_tokens_map} {tokenizer.chat_template} {words}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def prove(self, rendering: Rendering) -> None:
        """Encode every text whole from now on, unless a rendering has the same tokens either way."""
        if any(ids != self(text) for text, ids in self.all([rendering]).items()):
            self.splits_at_spaces = False

    def _many(self, texts: Iterable[str]) -> _Found:
        different = list(dict.fromkeys(texts))
        if not self.tokenizer.is_fast:
            return lambda: {text: self(text) for text in different}
        each = -(-len(different) // self._threads) or 1
        parts = [different[start : start + each] for start in range(0, len(different), each)]
        encoded = chain.from_iterable(self._pool.map(self._encode, parts))
        return lambda: dict(zip(different, encoded, strict=True))

    def _encode(self, texts: list[str]) -> list[Ids]:
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # without the GIL
        return [ids_of(one.ids) for one in encoded]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "tokenize")

    @property
    def _threads(self) -> int:
        return len(usable_cores())

    def _cut(self, prompt: str) -> int:
        """The last place in a prompt at which its text can be encoded in two parts; 0 if there is none."""
        if not self.splits_at_spaces:
            return 0
        for searched in _SEARCHED:
            start = max(0, len(prompt) - searched)
            if cut := max((found.start() for found in _CUT.finditer(prompt, start)), default=0):
                return cut
        return 0

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether the text before a space and the text from it on are encoded independently."""
        if not self.tokenizer.is_fast or self.tokenizer.backend_tokenizer.pre_tokenizer is None:
            return False
        backend = self.tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        parts = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
        return (
            (state["normalizer"] or {}).get("type") in (None, "NFC")
            and state["model"]["type"] == "BPE"
            and parts[-1]["type"] == "ByteLevel"
            and not any(part.get("add_prefix_space") for part in parts)
            and all(part["type"] in ("ByteLevel", "Split", "Digits") for part in parts)
            and not any(_reaches_over_a_space(token) for token in state["added_tokens"])
            and all(_splits(backend, before, after) for before, after in product(_BEFORE, _AFTER))
        )


def ids_of(tokens: Iterable[int]) -> Ids:
    return array("i", tokens)


def _batches(renderings: Iterable[tuple[T, Rendering]]) -> Iterator[list[tuple[T, Rendering]]]:
    some: list[tuple[T, Rendering]] = []
    characters = 0
    for value, rendering in renderings:
        some.append((value, rendering))
        characters += len(rendering.prompt) + sum(map(len, rendering.responses))
        if len(some) == AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _made_before(values: Iterator[T], count: int) -> Iterator[T]:
    """The values, each when `count` more have been made."""
    made = deque(islice(values, count))
    for value in values:
        made.append(value)
        yield made.popleft()
    yield from made


def _reaches_over_a_space(token: dict[str, Any]) -> bool:
    return " " in token["content"] or (token["rstrip"] and token["content"][-1:].isalnum())


def _splits(backend: Any, before: str, after: str) -> bool:
    """Whether a word begins at the space between two texts."""
    words = backend.pre_tokenizer.pre_tokenize_str(f"{before} {after}")
    return any(start == len(before) for _, (start, _) in words)
