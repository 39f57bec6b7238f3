"""Texts that are encoded together have the tokens that each has by itself."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import tiny_tokenizers
from tiny import byte_tokenizer
from tokenizers import Regex, pre_tokenizers

from lit_align.data.encoding import AT_ONCE, Encoder
from lit_align.data.rendering import Rendering

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> Any:
    """A byte-level tokenizer whose words are the matches of a pattern."""
    made = tiny_tokenizers.byte_level()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def marked(**options: Any) -> Any:
    """A tokenizer with an added token that takes the space after it."""
    from transformers import AddedToken

    made = tiny_tokenizers.byte_level()
    made.add_tokens([AddedToken("bird", **options)])
    return made


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "GPT-2": tiny_tokenizers.byte_level,
    "Llama 3": lambda: split_by(LLAMA_3),
    "prefix space": lambda: tiny_tokenizers.byte_level(prefix_space=True),
    "SentencePiece": tiny_tokenizers.llama_legacy,
    "metaspace": lambda: tiny_tokenizers.metaspace_bpe("first", split=False),
    "unigram": lambda: tiny_tokenizers.metaspace_unigram("always", split=True),
    "words across spaces": lambda: split_by(r"\p{N}+|[^\p{N}]+"),
    "token that takes a space": lambda: marked(rstrip=True),
    "token": marked,
}
PIECES = (
    *(
        "ab",
        "é",
        "中",
        "1",
        "23",
        ".",
        ",",
        "'",
        "\n",
        "\n\n",
        "\t",
        "!",
        "?",
        "A",
        "\r\n",
        "_x",
        "🐦",
        "tion",
        "hello",
    ),
    *(
        "’s",
        "'ll",
        "e\u0301",
        " \u0301",
        "\u00a0",
        "bird",
        "TL;DR:",
        "<|im_end|>",
        " hello",
        " bird",
        " the",
        " a",
        " 1",
    ),
    *(" ", " ", " ", "  "),
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_encoded_together_have_their_own_tokens(name):
    tokenizer = TOKENIZERS[name]()
    draw = random.Random(0)

    def text(longest: int) -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(0, longest)))

    renderings = [Rendering(text(40), (text(12), text(12))) for _ in range(600)]
    encoder = Encoder(tokenizer)
    together = encoder.all(renderings)
    alone = Encoder(TOKENIZERS[name]())
    for prompt, responses, *_ in renderings:
        for whole in (prompt, *(prompt + response for response in responses)):
            assert together[whole] == alone(whole), repr(whole)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_tokenizers_of_words_encode_a_prompt_once(name):
    assert Encoder(TOKENIZERS[name]()).splits_at_spaces == (name in ("bytes", "GPT-2", "Llama 3", "token"))


def test_a_prompt_is_not_encoded_again_for_each_response():
    tokenizer = tiny_tokenizers.byte_level()
    encoder = Encoder(tokenizer)
    seen: list[str] = []
    many = encoder._many

    def counted(texts: Iterable[str]) -> Any:
        seen.extend(texts)
        return many(seen)

    encoder._many = counted  # type: ignore[method-assign]
    encoder.all([Rendering("the bird " * 50 + "TL;DR:", (" a", " b"))])
    assert sum(map(len, seen)) < 500


def test_a_tokenizer_that_fails_the_proof_encodes_whole_texts():
    encoder = Encoder(split_by(r"\p{N}+|[^\p{N}]+"))
    encoder.splits_at_spaces = True  # claimed
    rendering = Rendering("hello the bird", (" hello the bird",))
    encoder.prove(Rendering("12", ("3",)))
    assert encoder.splits_at_spaces
    broken = Encoder(split_by(r"\p{N}+|[^\p{N}]+"))
    broken.splits_at_spaces = True
    broken.all = lambda renderings: {"hello": [0]}  # type: ignore[method-assign]
    broken.prove(rendering)
    assert not broken.splits_at_spaces


@pytest.mark.parametrize(("count", "size", "most"), [(700, 10, 256), (6, 400_000, 3), (0, 1, 0)])
def test_batches_are_limited_in_renderings_and_characters(count, size, most):
    encoder = Encoder(byte_tokenizer())
    begun: list[int] = []
    encoder._begin = lambda some: begun.append(len(some)) or dict  # type: ignore[method-assign]
    given = [(n, Rendering("a" * size, ("",))) for n in range(count)]
    assert list(encoder.ahead(iter(given))) == given
    assert (max(begun, default=0), sum(begun)) == (most, count)


def test_the_next_texts_are_begun_before_the_first_are_used():
    encoder = Encoder(byte_tokenizer())
    texts = encoder.ahead((n, Rendering(f"text {n}", (" a",))) for n in range(AT_ONCE * 3 + 1))
    begin, begun = encoder._begin, []
    encoder._begin = lambda some: begun.append(len(some)) or begin(some)  # type: ignore[method-assign]
    number, rendering = next(texts)
    assert (number, begun) == (0, [AT_ONCE] * 3)
    assert encoder("text 0 a").tolist() == encoder.tokenizer("text 0 a", add_special_tokens=False).input_ids
    assert [number for number, _ in texts] == list(range(1, AT_ONCE * 3 + 1))
    assert rendering.prompt not in encoder._encoded
