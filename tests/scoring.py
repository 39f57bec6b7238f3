"""Scorers and texts that the tests of scorers share."""

from collections.abc import Sequence

import pytest

from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import Scorer
from lit_align.errors import UserError

CODE = """
from dataclasses import dataclass

@dataclass  # looks its module up in sys.modules
class Weights:
    length: float = 1.0

def length(prompts, responses):
    return [Weights().length * (len(p) + len(r)) for p, r in zip(prompts, responses)]

def of_one(text):
    return 1.0

def lexicon(prompts, responses):
    raise KeyError("lexicon")

nothing = 3
"""


class Given(Scorer):
    """Returns what a test gives it."""

    identity = "given@1"  # type: ignore[assignment]
    batch_size = 2

    def __init__(self, returned: object):
        self.returned = returned
        self.seen: list[list[str]] = []

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        self.seen.append(list(responses))
        return self.returned(prompts, responses) if callable(self.returned) else self.returned  # type: ignore[return-value]


def message_of(error: type[UserError], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text, "one paragraph"
    return text


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
    return [len(response) for response in responses]
