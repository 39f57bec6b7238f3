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
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of the texts; 0 without any."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text against all others; 0 for fewer than two texts.

    Takes time linear in the number of words: for each n-gram, the two largest counts in one sentence give the largest
    count among the other sentences.
    """
    sentences = [tokens for text in texts if (tokens := words(text))]
    if len(sentences) < 2:
        return 0.0
    counts = [[ngrams(tokens, n) for n in range(1, order + 1)] for tokens in sentences]
    best: dict[tuple[str, ...], tuple[int, int]] = {}  # the two largest counts in one sentence
    for sentence in counts:
        for each in sentence:
            for gram, count in each.items():
                best[gram] = tuple(sorted((*best.get(gram, (0, 0)), count))[:0:-1])  # type: ignore[assignment]
    lengths = sorted(map(len, sentences))
    return sum(_bleu(sentence, best, lengths) for sentence in counts) / len(sentences)


def _bleu(
    counts: list[Counter[tuple[str, ...]]], best: dict[tuple[str, ...], tuple[int, int]], all: list[int]
) -> float:
    """BLEU of one sentence; `all` holds the sorted lengths of all sentences, its own included."""
    length = counts[0].total()
    logarithms = []
    for n, each in enumerate(counts):
        matches = sum(min(count, best[gram][best[gram][0] == count]) for gram, count in each.items())
        if matches == 0 and n == 0:
            return 0.0
        total = each.total() + (n > 0)
        logarithms.append(math.log((matches + (n > 0)) / total))
    place = bisect_left(all, length)  # its own length, or an equal one
    neighbours = all[max(0, place - 1) : place] + all[place + 1 : place + 2]
    closest = min(neighbours, key=lambda other: (abs(other - length), other))
    penalty = min(0.0, 1 - closest / length)
    return math.exp(penalty + sum(logarithms) / len(logarithms))
