"""Scorers: one number for each response to a prompt, higher is better. `score` is how the package asks them."""

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_align.data.formats import Message, Text
from lit_align.errors import UserError


class ScorerError(UserError):
    """A scorer failed. Names the scorer, the first prompt and response concerned, and the mend."""


class Scorer(ABC):
    """Gives each response its reward. Subclass it, set `batch_size`, and say who you are."""

    batch_size: int  # most responses per call

    @property
    @abstractmethod
    def identity(self) -> str:
        """Name and version, recorded with each score: it changes whenever the scores may."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        """The reward of each response to the prompt of the same place, [N]."""

    def start(self) -> None:
        """Load what is needed to score; may be called again."""

    def release(self) -> None:
        """Free it, as between rounds; the next call loads it again."""


def score(
    scorer: Scorer,
    prompts: Sequence[Text],
    responses: Sequence[str],
    advance: Callable[[int], object] | None = None,
) -> list[float]:
    """The reward of each response, [N], in batches of like length (the longest first).

    Args:
        advance: Called with the number of responses of each finished batch.

    Raises:
        ScorerError: the scorer raises, or gives the wrong number of scores, or one that is no finite number.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses: give one prompt per response.")
    order = sorted(range(len(responses)), key=lambda i: -len(_joined(prompts[i])) - len(responses[i]))
    scores = [math.nan] * len(responses)
    for start in range(0, len(order), scorer.batch_size):
        places = order[start : start + scorer.batch_size]
        batch = _score_batch(scorer, [prompts[i] for i in places], [responses[i] for i in places])
        for i, value in zip(places, batch, strict=True):
            scores[i] = value
        if advance is not None:
            advance(len(places))
    return scores


def _score_batch(scorer: Scorer, prompts: list[Text], responses: list[str]) -> list[float]:
    def failed(what: str, mend: str, first: int = 0) -> ScorerError:
        return ScorerError(
            f"scorer {scorer.identity}: {what}; prompt {_shown(prompts[first])}, response "
            f"{_shown(responses[first])}. {mend}"
        )

    try:
        values = scorer(prompts, responses)
    except UserError:
        raise
    except Exception as error:
        mend = "Mend the scorer; these texts show the failure."
        if isinstance(error, torch.OutOfMemoryError):
            mend = f"Lower its batch_size={scorer.batch_size}."
        what = f"raised {type(error).__name__}: {error}; a batch of {len(responses)} that begins with"
        raise failed(what, mend) from error
    if isinstance(values, Tensor) or hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()  # type: ignore[union-attr]
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(responses):
        got = f"{len(values)} scores" if isinstance(values, Sequence) else f"a {type(values).__name__}"
        raise failed(f"gave {got} for {len(responses)} responses", "Return a list with one number per response.")
    for place, value in enumerate(values):
        if not isinstance(value, numbers.Real):
            raise failed(f"gave {value!r}, which is no number", "Return one number per response.", place)
        if not math.isfinite(value):
            raise failed(f"gave {value}", "Return a finite number; rewards that are missing must be decided on.", place)
    return [float(value) for value in values]


class FunctionScorer(Scorer):
    """A Python function, called as `function(prompts, responses)`, that returns one number per response.

    A prompt is a string, or a list of messages with `role` and `content`.

    Args:
        function: Where it is: package.module.function, or path/to/file.py:function.
        batch_size: Most responses per call.
    """

    def __init__(self, function: str, batch_size: int = 256):
        _check_batch_size(batch_size)
        self.batch_size = batch_size
        self._function = _import_function(function)
        self._name = function

    @cached_property
    def identity(self) -> str:
        """The path, and a fingerprint of the file that holds the function."""
        file = inspect.getsourcefile(inspect.unwrap(self._function)) if callable(self._function) else None
        return f"{self._name}@{_digest([Path(file)])}" if file else self._name

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        return self._function(prompts, responses)


def _import_function(path: str) -> Callable[..., Sequence[float]]:
    """Import `package.module.function` or `file.py:function`."""
    file, colon, name = path.rpartition(":")
    module, dot, last = path.rpartition(".")
    ...
