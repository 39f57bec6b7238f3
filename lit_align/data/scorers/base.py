"""Scorers: one number for each response to a prompt, the higher the better."""

import hashlib
import json
import math
import numbers
import sysconfig
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from lit_align.arguments import CheckedArguments
from lit_align.console import relative
from lit_align.data.formats.record import LARGEST
from lit_align.data.formats.rows import Message, Text
from lit_align.errors import UserError, amount, shown

SCORER_FIXES: dict[str, str] = dict.fromkeys(("scorer", "scorers", "judges"), "Write FunctionScorer(function).")
"""Fixes of an argument that is not a scorer."""


class ScorerError(UserError):
    """A scorer failed. Names the scorer, the first prompt and response concerned, and the fix."""


class GroupScores(NamedTuple):
    """The scores of one prompt's K responses."""

    scores: list[float]  # the rewards, [K]
    parts: dict[str, list[float]] | None = None
    preferences: list[list[float]] | None = None  # P(y_i ≻ y_j), [K, K], of a scorer that compares


class BaseScorer(metaclass=CheckedArguments):
    """The common part of all scorers: an identity, and loading and freeing of resources."""

    @property
    def reads(self) -> frozenset[str]:
        """Columns of the prompts' rows that it reads."""
        return frozenset()

    @property
    @abstractmethod
    def identity(self) -> str:
        """Name and version, recorded with each score: it changes whenever the scores may change."""

    @abstractmethod
    def score_groups(self, prompts: Sequence[Text], groups: Sequence[Sequence[str]]) -> list[GroupScores]:
        """The checked scores of each prompt's responses.

        Raises:
            ScorerError: the scorer raises, or returns values that cannot be used.
        """

    def check(self, prompts: Iterable[Text]) -> None:  # most scorers take any prompt
        """Raise a `UserError` if one of the prompts cannot be scored; called before anything is sampled."""

    def start(self) -> None:  # not every scorer has something to load
        """Load what scoring needs; a second call does nothing."""

    def release(self) -> None:
        """Free it, as between rounds, and report its cost; the next score loads it again."""


class Scorer(BaseScorer):
    """Gives each response its reward. A subclass sets `batch_size` and `identity`."""

    batch_size: int  # most responses per call

    @abstractmethod
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        """The reward of each response to the prompt at the same place, [N]; `Scores` if the rewards have parts."""

    def score_groups(self, prompts: Sequence[Text], groups: Sequence[Sequence[str]]) -> list[GroupScores]:
        repeated = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        rewards = score(self, repeated, [response for group in groups for response in group])
        scored, start = [], 0
        for group in groups:
            place = slice(start, start + len(group))
            parts = {name: part[place] for name, part in rewards.parts.items()}
            scored.append(GroupScores(rewards[place], parts or None))
            start = place.stop
        return scored


class PairwiseScorer(BaseScorer):
    """Compares the responses to a prompt with each other, as a preference model does; it need not be transitive."""

    @abstractmethod
    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> Sequence[Any]:
        """P(y_i ≻ y_j) among each prompt's responses, [N, K, K]; the diagonal is not read."""

    def score_groups(self, prompts: Sequence[Text], groups: Sequence[Sequence[str]]) -> list[GroupScores]:
        """The reward of a response is its mean probability to beat the K−1 others."""
        scored = []
        for P in compare(self, prompts, groups):
            means = [(sum(wins) - 0.5) / (len(P) - 1) for wins in P]  # without the ½ against itself
            scored.append(GroupScores(means, preferences=P))
        return scored


class Scores(list[float]):
    """Rewards, [N], with their parts, which are recorded and logged: `parts[name]` is [N] too."""

    def __init__(self, rewards: Iterable[float], parts: Mapping[str, Sequence[float]] | None = None):
        super().__init__(rewards)
        self.parts = {name: list(values) for name, values in (parts or {}).items()}


class Failure(Protocol):
    """Makes the error for what a scorer did, with the fix and the place of the response concerned."""

    def __call__(self, what: str, fix: str, place: int = 0) -> ScorerError: ...


def score(scorer: Scorer, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
    """The reward of each response, [N], computed in batches of similar length, the longest first.

    Raises:
        ScorerError: the scorer raises, or returns the wrong number of scores or parts, or a value that is not finite.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses: give one prompt per response.")
    order = sorted(range(len(responses)), key=lambda i: -len(joined(prompts[i])) - len(responses[i]))
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
    for name, whole in scores.parts.items():
        if (place := next((i for i, value in enumerate(whole) if math.isnan(value)), None)) is not None:
            raise ScorerError(
                f"scorer {scorer.identity} gave parts[{name!r}] for other batches, but not for the batch with response "
                f"{excerpt(responses[place])}. Return the same parts for each batch."
            )
    return scores


def compare(
    scorer: PairwiseScorer, prompts: Sequence[Text], responses: Sequence[Sequence[str]]
) -> list[list[list[float]]]:
    """P(y_i ≻ y_j) among each prompt's K responses, [N, K, K], with ½ on the diagonal.

    Raises:
        ScorerError: the scorer raises, or returns values that are not probabilities with P_ij + P_ji = 1.
    """

    def failed(what: str, fix: str, place: int = 0) -> ScorerError:
        prompt, first = _prompt_excerpt(prompts[place]), excerpt(responses[place][0])
        return ScorerError(f"scorer {scorer.identity} {what} ({prompt}, first response {first}). {fix}")

    matrices = _called(
        lambda: [torch.as_tensor(P, dtype=torch.float64) for P in scorer.preferences(prompts, responses)], failed
    )
    if len(matrices) != len(prompts):
        raise failed(f"gave {len(matrices)} matrices for {len(prompts)} prompts", "Return one K × K matrix for each.")
    compared = []
    for place, (matrix, group) in enumerate(zip(matrices, responses, strict=True)):
        K = len(group)
        if matrix.shape != (K, K):
            raise failed(f"gave a matrix of shape {[*matrix.shape]} for {K} responses", f"Return [{K}, {K}].", place)
        P = matrix.clone().fill_diagonal_(0.5)
        if not (((P >= 0) & (P <= 1)).all() and torch.allclose(P + P.T, torch.ones_like(P), atol=1e-4)):
            fix = "Return P[i][j] in [0, 1], the probability that response i beats j, and 1 minus it in P[j][i]."
            raise failed(f"gave {matrix.tolist()}, which are not preferences", fix, place)
        compared.append(P.tolist())
    return compared


def _score_batch(scorer: Scorer, prompts: list[Text], responses: list[str]) -> Scores:
    def failed(what: str, fix: str, place: int = 0) -> ScorerError:
        prompt, response = _prompt_excerpt(prompts[place]), excerpt(responses[place])
        return ScorerError(f"scorer {scorer.identity} {what} ({prompt}, response {response}). {fix}")

    try:
        returned = _called(lambda: scorer(prompts, responses), failed, f", on a batch of {len(responses)}")
    except torch.OutOfMemoryError as error:
        raise failed("ran out of memory", f"Lower its batch_size={scorer.batch_size}.") from error
    parts = returned.parts or {} if isinstance(returned, Scores) else {}
    rewards = _numbers(returned, len(responses), "scores", "", failed)
    return Scores(
        rewards,
        {
            name: _numbers(part, len(responses), "values", f" as parts[{name!r}]", failed)
            for name, part in parts.items()
        },
    )


def _called(call: Callable[[], Any], failed: Failure, where: str = "") -> Any:
    """The result of a scorer's code, whatever it raises.

    Raises:
        ScorerError: it raises, or ends the process.
    """
    try:
        return call()
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # sys.exit too, which would end the run without a word
        if asks_to_end(error):
            raise
        text = f": {printed}" if (printed := str(error)) else ""
        raised = f"raised {type(error).__name__}{text}{line_of(error)}{where}"
        raise failed(raised, "Fix the scorer and run again.") from error


def line_of(error: BaseException) -> str:
    """The line of the user's code that led to an error; empty if it is not in a file of theirs."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    others = [Path(__file__).parents[2], *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    theirs = [(file, line) for file, line in frames if not file.startswith(("<", *(f"{each}/" for each in others)))]
    return f" in {relative(theirs[-1][0])}, line {theirs[-1][1]}" if theirs else ""


def asks_to_end(error: BaseException) -> bool:
    """Whether an exception is the user's or a signal's, not the code's: Ctrl-C, or a signal handler's kind of exit."""
    return isinstance(error, KeyboardInterrupt | SystemExit) and type(error) is not SystemExit


def _numbers(values: Any, count: int, what: str, where: str, failed: Failure) -> list[float]:
    """A scorer's values as floats.

    Args:
        count: How many there must be.
        what: Name of the values.
        where: Names the part that they belong to, if any.
    """
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise failed(f"returned a {type(values).__name__}{where}", "Return a list, one number per response.")
    if len(values) != count:
        raise failed(
            f"gave {amount(len(values), what)} for {amount(count, 'responses')}{where}", "Return one per response."
        )
    floats = []
    for place, value in enumerate(values):
        if not isinstance(value, numbers.Real):
            raise failed(
                f"gave {excerpt(value)}{where}, which is not a number", "Return one number per response.", place
            )
        try:
            floats.append(float(value))
        except OverflowError:
            floats.append(math.inf)
        if not math.isfinite(floats[-1]):
            fix = "Return a finite number for every response."
            raise failed(f"gave {excerpt(value)}{where}, which is not finite", fix, place)
        if abs(floats[-1]) > LARGEST:
            raise failed(f"gave {excerpt(value)}{where}, which is too large", f"Stay within ±{LARGEST:g}.", place)
    return floats


def fingerprint_of(files: Sequence[Path]) -> str:
    """16 hexadecimal digits that identify files by name and content."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def joined(prompt: Text) -> str:
    """A prompt as one text: a chat's messages with blank lines between them."""
    return prompt if isinstance(prompt, str) else "\n\n".join(map(said, prompt))


def said(message: Message) -> str:
    """A message's text, then its calls of tools as JSON."""
    calls = message.get("tool_calls")
    parts = [message["content"] or "", json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(filter(None, parts))


def _prompt_excerpt(prompt: Text) -> str:
    """A prompt as messages show it; of a chat, with its type, since functions often expect a string."""
    return f"{'prompt' if isinstance(prompt, str) else 'prompt, a list of messages:'} {excerpt(joined(prompt))}"


def excerpt(value: object) -> str:
    """A value as messages show it; of a long text, its beginning and its end."""
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return str(value)
    if isinstance(value, str) and len(value) > 100:
        return f"{shown(value[:60])} … {shown(value[-40:])}"
    return shown(value, 100)
