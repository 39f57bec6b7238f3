"""Diversity of responses, computed on lower-case words and punctuation marks.

    distinct-n    distinct n-grams / all n-grams, over all responses together        (Li et al., arXiv 1510.03055)
    Self-BLEU     mean over responses of BLEU-4 against all the others as references  (Zhu et al., arXiv 1802.01886)

A distinct-n near 1 means varied responses; a Self-BLEU near 1 means repetitive ones. Both depend on the number and
length of the responses, so compare only equal numbers of prompts. BLEU's brevity penalty uses the length of the closest
reference (the shorter of two equally close ones), and its smoothing is Lin and Och's, (matches + 1) / (n-grams + 1) for
n > 1. Responses without a word are left out of Self-BLEU.
"""

import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of the texts; 0 without any."""
    grams = _numbered(texts).grams(n).numbers
    return len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def self_bleu(texts: Iterable[str], order: int = 4) -> float:
    """Mean BLEU of each text against all others; 0 for fewer than two texts.

    Takes time linear in the number of words, up to sorting: for each n-gram, the two largest counts in one text give
    the largest count among the other texts.
    """
    numbered = _numbered(texts)
    lengths = np.bincount(numbered.texts).tolist()
    if len(lengths) < 2:
        return 0.0
    matches = [_matches(numbered.grams(n), len(lengths)) for n in range(1, order + 1)]
    all_lengths = sorted(lengths)
    return sum(_bleu(*each, all_lengths) for each in zip(lengths, zip(*matches, strict=True), strict=True)) / len(
        lengths
    )


class _Numbered(NamedTuple):
    """Words or n-grams, one text after another: equal ones have equal numbers."""

    numbers: NDArray[np.int64]
    texts: NDArray[np.int64]  # the text that each is in, from 0; texts without words are left out

    def grams(self, n: int) -> "_Numbered":
        """The n-grams of words."""
        grams, texts = self
        for size in range(2, n + 1):
            last = self.numbers[size - 1 :]
            grams = np.unique(grams[: len(last)] * (self.numbers.max(initial=0) + 1) + last, return_inverse=True)[1]
            texts = self.texts[: len(last)]
        is_within = texts == self.texts[n - 1 :]
        return _Numbered(grams[is_within], texts[is_within])


def _numbered(texts: Iterable[str]) -> _Numbered:
    """The words of texts."""
    known: dict[str, int] = {}
    numbers, lengths = array("q"), array("q")
    for text in texts:
        if found := words(text):
            numbers.extend(known.setdefault(word, len(known)) for word in found)
            lengths.append(len(found))
    return _Numbered(np.array(numbers), np.repeat(np.arange(len(lengths)), np.array(lengths)))


def _matches(grams: _Numbered, count: int) -> list[int]:
    """How many n-grams of each of `count` texts are in another text, as often as there at most."""
    size = grams.numbers.max(initial=0) + 1
    keys, times = np.unique(grams.texts * size + grams.numbers, return_counts=True)
    texts, numbers = np.divmod(keys, size)
    order = np.lexsort((times, numbers))
    largest, second = np.zeros(size, np.int64), np.zeros(size, np.int64)
    before = order[:-1][numbers[order[:-1]] == numbers[order[1:]]]
    second[numbers[before]] = times[before]
    largest[numbers[order]] = times[order]
    elsewhere = np.where(largest[numbers] == times, second[numbers], largest[numbers])
    return np.bincount(texts, np.minimum(times, elsewhere), count).astype(int).tolist()


def _bleu(length: int, matches: Sequence[int], all: list[int]) -> float:
    """BLEU of one text; `all` holds the sorted lengths of all texts, its own included."""
    logarithms = []
    for n, found in enumerate(matches):
        if found == 0 and n == 0:
            return 0.0
        total = max(0, length - n) + (n > 0)
        logarithms.append(math.log((found + (n > 0)) / total))
    place = bisect_left(all, length)  # its own length, or an equal one
    neighbours = all[max(0, place - 1) : place] + all[place + 1 : place + 2]
    closest = min(neighbours, key=lambda other: (abs(other - length), other))
    penalty = min(0.0, 1 - closest / length)
    return math.exp(penalty + sum(logarithms) / len(logarithms))
