"""Small tokenizers of the kinds that language models have: SentencePiece's with a word-initial ▁, and bytes' BPE."""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "TL;DR: yes, the answer is yes. no, the answer is no.",
    "Question: what is the best answer to the question?\nAnswer: yes it is",
    "user: hello world, how are you?\n\nassistant: I am well, thank you.",
    "the user said: 'hello'; the other said: 'no thanks'  and left\t(again)",
    "[INST] hello [/INST] yes well, numbers: 1 2 3 10 100 2024, äöü é ß",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _begun(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """As Llama's: each text begins with <s>."""
    start = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of words that begin with ▁, with a token for each byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=220, show_progress=False))  # type: ignore[call-arg]
    merged = _merges(backend)
    tokens = [*SPECIAL, *BYTES, *sorted(backend.get_vocab(), key=lambda token: backend.get_vocab()[token])]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merged


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def _byte_fallback_bpe() -> Tokenizer:
    vocab, merges = _bpe()
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(SPECIAL)
    return backend


def llama_legacy() -> Any:
    """Llama 2's: a normalizer puts ▁ before each stretch of text, after special tokens, too."""
    backend = _byte_fallback_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _begun(backend)


def metaspace_bpe(scheme: str, split: bool) -> Any:
    """A pre-tokenizer puts ▁ before every stretch of text (always), the first, or none (never)."""
    return _metaspace(_byte_fallback_bpe(), scheme, split)


def _metaspace(backend: Tokenizer, scheme: str, split: bool) -> Any:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)  # type: ignore[arg-type]
    stripped = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return _begun(backend)


@cache
def _unigram() -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)  # type: ignore[call-arg]
    backend.train_from_iterator(CORPUS, trainer)
    pieces = [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    return [*pieces[:3], *((byte, -20.0) for byte in BYTES), *pieces[3:]]


def metaspace_unigram(scheme: str, split: bool) -> Any:
    """As T5's and Gemma's kind: the likeliest pieces."""
    backend = Tokenizer(models.Unigram(_unigram(), unk_id=0, byte_fallback=True))
    backend.add_special_tokens(SPECIAL)
    return _metaspace(backend, scheme, split)


@cache
def _byte_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "\n\n\n\n", "a\n\nb\n\n\nc"], trainer)
    return backend.get_vocab(), _merges(backend)


def byte_level(prefix_space: bool = False, trim_offsets: bool = True) -> Any:
    """GPT-2's kind: bytes' BPE within words that begin with a space."""
    vocab, merges = _byte_bpe()
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def word_tokenizer(words: Sequence[str]) -> Any:
    """Whole words between spaces; it decodes a space before each token, the end token included."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["</s>", *words])}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="</s>")


KINDS: dict[str, Callable[[], Any]] = {
    "llama legacy": llama_legacy,
    **{
        f"{name}, {scheme}{', unsplit' * (not split)}": lambda build=build, scheme=scheme, split=split: build(
            scheme, split
        )
        for name, build in {"BPE": metaspace_bpe, "unigram": metaspace_unigram}.items()
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "bytes": byte_level,
    "bytes, prefix space": partial(byte_level, prefix_space=True),
    "bytes, offsets with spaces": partial(byte_level, trim_offsets=False),
}
