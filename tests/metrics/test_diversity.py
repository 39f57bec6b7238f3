"""Diversity against independent code: torchmetrics' BLEU, scikit-learn's n-gram counts."""

import math
import random

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from torchmetrics.functional.text import bleu_score

from lit_align.metrics import distinct_n, self_bleu
from lit_align.metrics.diversity import words

VOCABULARY = ["the", "film", "is", "a", "slow", "moving", "tale", "of", "love", ",", "loss", ".", "films"]


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(VOCABULARY, k=generator.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_the_share_of_different_n_grams(n):
    texts = sentences(40, seed=n)
    counted = CountVectorizer(ngram_range=(n, n), token_pattern=r"(?u)\w+|[^\w\s]").fit_transform(texts)
    assert distinct_n(texts, n) == pytest.approx(counted.shape[1] / counted.sum())


def test_distinct_n_of_texts_by_hand():
    assert distinct_n(["A good film", "a GOOD film."], 1) == 4 / 7
    assert distinct_n(["one", "two"], 2) == 0
    assert distinct_n([], 1) == 0


@pytest.mark.parametrize("seed", range(5))
def test_self_bleu_is_the_mean_of_torchmetrics_bleu_against_the_others(seed):
    """Texts of four words always share some 4-gram; without one, torchmetrics gives 0 even with smoothing."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices("abcd", k=generator.randint(8, 20))) for _ in range(25)]
    expected = []
    for place, text in enumerate(texts):
        others = sorted(texts[:place] + texts[place + 1 :], key=lambda each: len(words(each)))
        expected.append(bleu_score([text], [others], n_gram=4, smooth=True).item())
    assert min(expected) > 0
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_self_bleu_by_hand():
    """ "a b c d" against "a b x": 2 of 4 words, (1+1)/(3+1) pairs, (0+1)/(2+1) triples, (0+1)/(1+1) fours; no penalty.

    "a b x" against it: 2 of 3, (1+1)/(2+1), (0+1)/(1+1), (0+1)/(0+1); penalty exp(1 - 4/3).
    """
    first = (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    second = math.exp(1 - 4 / 3) * (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25
    assert self_bleu(["a b c d", "a b x"]) == pytest.approx((first + second) / 2)


def test_copies_have_self_bleu_one_and_texts_without_a_common_word_zero():
    assert self_bleu(["it is a very fine film indeed"] * 3) == pytest.approx(1)
    assert self_bleu(["one two three", "four five six", "seven eight nine"]) == 0
    assert self_bleu(["alone"]) == 0
    assert self_bleu(["same old words here", "same old words here", "", "  "]) == pytest.approx(1)
