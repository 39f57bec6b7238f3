"""How varied responses are, on lower-case words and punctuation marks.

    distinct-n    different n-grams / all n-grams of all responses together         (Li et al., arXiv 1510.03055)
    Self-BLEU     mean over responses of BLEU-4 against all the others as references  (Zhu et al., arXiv 1802.01886)

Near 1 in distinct-n is varied, near 1 in Self-BLEU is repetitive. Both depend on how many and how long the responses
are: compare only equal numbers of prompts. BLEU has the closest reference's length in its brevity penalty (of two
equally close the shorter) and Lin and Och's smoothing, (matches + 1) / (n-grams + 1) for n > 1. Responses without a
word are left out of Self-BLEU.
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
    """Share of different n-grams among all of the texts'; 0 where there is none."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text against all the others; 0 for fewer than two.

    In time linear in the number of words: for each n-gram, the largest and second largest counts say what the largest
    count among the others is.
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
    """BLEU of one of the sentences; `all` are the sorted lengths of all of them, its own included."""
    length = counts[0].total()
    logarithms = []
    for n, each in enumerate(counts):
        matches = sum(min(count, best[gram][best[gram][0] == count]) for gram, count in each.items())
        if matches == 0 and n == 0:
            return 0.0
        total = each.total() + (n > 0)
        logarithms.append(math.log((matches + (n > 0)) / total))
    place = bisect_left(all, length)  # of itself, or of an equal
    neighbours = all[max(0, place - 1) : place] + all[place + 1 : place + 2]
    closest = min(neighbours, key=lambda other: (abs(other - length), other))
    penalty = min(0.0, 1 - closest / length)
    return math.exp(penalty + sum(logarithms) / len(logarithms))
