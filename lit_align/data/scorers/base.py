"""Scorers: one number for each response to a prompt, the higher the better. `score` asks them, and checks."""

import hashlib
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_align.data.formats.rows import Text
from lit_align.errors import UserError


class ScorerError(UserError):
    """A scorer failed. Names the scorer, the first prompt and response concerned, and the mend."""


class BaseScorer(ABC):
    """What both kinds of scorers share: they say who they are, and load and free what they need."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Name and version, recorded with each score: it changes whenever the scores may."""

    def start(self) -> None:  # noqa: B027  # not every scorer has something to load
        """Load what is needed to score; calling it again does nothing."""

    def release(self) -> None:  # noqa: B027
        """Free it, as between rounds, and tell what it has cost; the next score loads it again."""


class Scorer(BaseScorer):
    """Gives each response its reward. Subclass it, set `batch_size`, and say who you are."""

    batch_size: int  # most responses per call

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        """The reward of each response to the prompt of the same place, [N]; `Scores` if it has parts."""


class PairwiseScorer(BaseScorer):
    """Compares the responses to a prompt with each other: a preference model, which need not be transitive."""

    @abstractmethod
    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> Sequence[Any]:
        """P(y_i ≻ y_j) among each prompt's responses, [N, K, K]; the diagonal is not read."""


class Scores(list[float]):
    """Rewards, [N], and what they are made of: `parts[name]`, [N], is kept and logged with them."""

    def __init__(self, rewards: Iterable[float], parts: Mapping[str, Sequence[float]] | None = None):
        super().__init__(rewards)
        self.parts = {name: list(values) for name, values in (parts or {}).items()}


def score(
    scorer: Scorer,
    prompts: Sequence[Text],
    responses: Sequence[str],
    advance: Callable[[int], object] | None = None,
) -> Scores:
    """The reward of each response, [N], asked for in batches of like length, the longest first.

    Args:
        advance: Called with the number of responses of each finished batch.

    Raises:
        ScorerError: the scorer raises, or gives the wrong number of scores or parts, or one that is no finite number.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses: give one prompt per response.")
    order = sorted(range(len(responses)), key=lambda i: -len(_joined(prompts[i])) - len(responses[i]))
    scores = Scores([math.nan] * len(responses))
    for start in range(0, len(order), scorer.batch_size):
        places = order[start : start + scorer.batch_size]
        batch = _score_batch(scorer, [prompts[i] for i in places], [responses[i] for i in places])
        for i, value in zip(places, batch, strict=True):
            scores[i] = value
        for name, values in batch.parts.items():
            whole = scores.parts.setdefault(name, [math.nan] * len(responses))
            for i, value in zip(places, values, strict=True):
                whole[i] = value
        if advance is not None:
            advance(len(places))
    for name, whole in scores.parts.items():
        if (place := next((i for i, value in enumerate(whole) if math.isnan(value)), None)) is not None:
            raise ScorerError(
                f"scorer {scorer.identity} gave parts[{name!r}] for other batches, but not for the one with response "
                f"{_shown(responses[place])}. Return the same parts for each batch."
            )
    return scores


def compare(
    scorer: PairwiseScorer, prompts: Sequence[Text], responses: Sequence[Sequence[str]]
) -> list[list[list[float]]]:
    """P(y_i ≻ y_j) among each prompt's K responses, [N, K, K], with ½ on the diagonal.

    Raises:
        ScorerError: the scorer raises, or what it gives are no probabilities with P_ij + P_ji = 1.
    """

    def failed(what: str, mend: str, place: int = 0) -> ScorerError:
        prompt, first = _shown(_joined(prompts[place])), _shown(responses[place][0])
        return ScorerError(f"scorer {scorer.identity} {what} (prompt {prompt}, first response {first}). {mend}")

    try:
        matrices = [torch.as_tensor(P, dtype=torch.float64) for P in scorer.preferences(prompts, responses)]
    except UserError:
        raise
    except Exception as error:
        raise failed(f"raised {type(error).__name__}: {error}", "Mend the scorer and run again.") from error
    if len(matrices) != len(prompts):
        raise failed(f"gave {len(matrices)} matrices for {len(prompts)} prompts", "Return one K × K matrix for each.")
    compared = []
    for place, (matrix, group) in enumerate(zip(matrices, responses, strict=True)):
        K = len(group)
        if matrix.shape != (K, K):
            raise failed(f"gave a matrix of shape {[*matrix.shape]} for {K} responses", f"Return [{K}, {K}].", place)
        P = matrix.clone().fill_diagonal_(0.5)
        if not (((P >= 0) & (P <= 1)).all() and torch.allclose(P + P.T, torch.ones_like(P), atol=1e-4)):
            mend = "Return P[i][j] in [0, 1], the probability that response i beats j, and 1 minus it in P[j][i]."
            raise failed(f"gave {matrix.tolist()}, which are no preferences", mend, place)
        compared.append(P.tolist())
    return compared


def _score_batch(scorer: Scorer, prompts: list[Text], responses: list[str]) -> Scores:
    def failed(what: str, mend: str, place: int = 0) -> ScorerError:
        prompt, response = _shown(_joined(prompts[place])), _shown(responses[place])
        return ScorerError(f"scorer {scorer.identity} {what} (prompt {prompt}, response {response}). {mend}")

    try:
        values: Any = scorer(prompts, responses)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise failed("ran out of memory", f"Lower its batch_size={scorer.batch_size}.") from error
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}, on a batch of {len(responses)} that begins here"
        raise failed(what, "Mend the scorer and run again.") from error
    parts: dict[str, list[float]] = getattr(values, "parts", {})
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise failed(f"returned a {type(values).__name__}", "Return a list, one number per response.")
    for name, column in {"": values, **parts}.items():
        of = f" as parts[{name!r}]" if name else ""
        if len(column) != len(responses):
            what = "values" if name else "scores"
            raise failed(f"gave {len(column)} {what} for {len(responses)} responses{of}", "Return one per response.")
        for place, value in enumerate(column):
            if not isinstance(value, numbers.Real):
                raise failed(f"gave {value!r}{of}, which is no number", "Return one number per response.", place)
            if not math.isfinite(value):
                raise failed(f"gave {value}{of}", "Return a finite number, also where there is no answer.", place)
    return Scores(map(float, values), {name: [*map(float, column)] for name, column in parts.items()})


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"scorer.{name}={value} must be at least 1.")
    return value


def _fingerprint(files: Sequence[Path]) -> str:
    """16 hexadecimal digits that identify files by name and content."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _joined(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:60]!r} … {text[-40:]!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
