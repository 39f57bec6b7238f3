"""`summary.json`: the results of a run on held-out prompts, by scorer.

An estimate is written as three keys, NAME, NAME_low and NAME_high: the mean and its 95 % interval. Everything that a
scorer gives is under `scorers.NAME`; `scorers.training` is the scorer that training uses. Quantities that do not apply
are left out.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_align.console import command
from lit_align.errors import amount, decimal
from lit_align.files import read_versioned, write_versioned
from lit_align.metrics.win_rate import GREATEST_GAP, Estimate

T = TypeVar("T")

RESULTS_HEAD = ("scorer", "reward", "win rate (95 %)", "at equal length")
"""The head of a table of results by scorer."""
VERSION = 1
TRAINING = "training"
"""The name of the scorer that training uses."""


@dataclass(frozen=True)
class PartSummary:
    """A part of a scorer's rewards, such as one criterion of a judge: mean over the responses of each side."""

    start: Estimate
    end: Estimate
    data: Estimate | None = None


@dataclass(frozen=True)
class BestOfN:
    """The best of n of the start's responses, selected by the training scorer (`metrics/best_of_n.py`)."""

    kl: float  # from the start, nats per response
    reward: Estimate


@dataclass(frozen=True)
class DataComparison:
    """The policy's responses against the data set's own, by one scorer."""

    reward: Estimate  # of the data set's responses
    win_rate: Estimate
    win_rate_ties_as_wins: float
    win_rate_length_controlled: Estimate
    length_gap: float | None = None  # of the policy's responses, in standard deviations

    @property
    def has_equal_lengths(self) -> bool:
        """Whether there are enough pairs of about equal length for a win rate at equal length."""
        return abs(self.length_gap or 0.0) <= GREATEST_GAP


@dataclass(frozen=True)
class ScorerSummary:
    """The policy's responses (end) against the start's, by one scorer."""

    identity: str
    reward_start: Estimate
    reward_end: Estimate
    win_rate: Estimate
    win_rate_ties_as_wins: float
    win_rate_length_controlled: Estimate
    parts: dict[str, PartSummary] = field(default_factory=dict)
    data: DataComparison | None = None
    best_of_n: dict[str, BestOfN] = field(default_factory=dict)

    def cells(self, *, is_equal: bool) -> tuple[str, str, str]:
        """Its row of a table of results, after the scorer's name; see `results_cells`."""
        estimates = (self.reward_start, self.reward_end, self.win_rate, self.win_rate_length_controlled)
        return results_cells(*estimates, is_equal=is_equal)


@dataclass(frozen=True)
class Forgetting:
    """Negative log-likelihood per token of given texts before and after training; the interval is over texts."""

    nll_start: float
    nll_end: float
    change: Estimate


@dataclass(frozen=True)
class Diversity:
    """Diversity of all responses of one side (`metrics/diversity.py`)."""

    distinct_1: float
    distinct_2: float
    self_bleu: float


@dataclass(frozen=True)
class Summary:
    """The results of a run on held-out prompts."""

    prompts: int
    responses_per_prompt: int
    kl_from_start: Estimate  # nats per response
    length_start: float  # tokens
    length_end: float
    finished_start: float  # share of responses that ended by themselves within the longest length
    finished_end: float
    diversity_start: Diversity
    diversity_end: Diversity
    scorers: dict[str, ScorerSummary]
    length_data: float | None = None
    length_gap: float | None = None  # to the start's responses, in standard deviations
    kl_sampling: str | None = None  # of the responses that give kl_from_start, where they are not samples of π
    forgetting: dict[str, Forgetting] = field(default_factory=dict)
    step: int | None = None  # the optimizer step of the policy

    @property
    def is_truncated(self) -> bool:
        """Whether most responses of a side were cut at the longest length: their lengths then say nothing."""
        return min(self.finished_start, self.finished_end) < 0.5

    @property
    def kl_condition(self) -> str:
        """Words to print after kl_from_start: how the responses were sampled; empty if they are samples of π."""
        return f" (sampled at {self.kl_sampling})" if self.kl_sampling else ""

    @property
    def training(self) -> ScorerSummary:
        """By the scorer that training uses."""
        return self.scorers[TRAINING]

    def sentence(self) -> str:
        """The verdict by the scorer that training uses, in words."""
        rate = self.training.win_rate
        if rate.low > 0.5:
            meaning = "The policy is better than the start."
        elif rate.high < 0.5:
            meaning = "The policy is worse than the start."
        else:
            meaning = "The interval includes 50 %: no difference is shown."
        return (
            f"On {amount(self.prompts, 'held-out prompts')}, the policy's responses win {rate.value:.1%} of the "
            f"comparisons with the start's (95 % interval {rate.low:.1%} to {rate.high:.1%}), by "
            f"{self.training.identity}. {meaning}"
        )

    @property
    def has_equal_lengths(self) -> bool:
        """Whether there are enough pairs of about equal length for a win rate at equal length."""
        return not self.is_truncated and abs(self.length_gap or 0.0) <= GREATEST_GAP

    def caution(self) -> str:
        """A warning about truncated responses, or about responses of other lengths; empty if neither applies."""
        if self.has_equal_lengths:
            return ""
        if not self.is_truncated:
            assert self.length_gap is not None
            longer = "longer" if self.length_gap > 0 else "shorter"
            return (
                f"The policy's responses are {longer} than the start's by {abs(self.length_gap):.1f} standard "
                "deviations of the difference: few pairs are of equal length, and a win rate at equal length cannot be "
                "given."
            )
        return (
            f"Only {self.finished_start:.0%} of the start's and {self.finished_end:.0%} of the policy's responses "
            "ended by themselves; the others were cut at sampling.max_new_tokens. Their rewards are for cut texts, and "
            "a win rate at equal length cannot be given. Raise max_new_tokens."
        )

    def flat(self) -> dict[str, float]:
        """The main results, to sort runs by: NAME by the training scorer, JUDGE/NAME by a judge."""
        values: dict[str, float] = {"prompts": self.prompts, "length_start": self.length_start}
        values |= self.kl_from_start.named("kl_from_start") | {"length_end": self.length_end}
        for side, diversity in {"": self.diversity_end, "_start": self.diversity_start}.items():
            values |= {f"{name}{side}": value for name, value in vars(diversity).items()}
        for name, scorer in self.scorers.items():
            prefix = "" if name == TRAINING else f"{name}/"
            for key, estimate in {
                "reward_start": scorer.reward_start,
                "reward_end": scorer.reward_end,
                "win_rate": scorer.win_rate,
                "win_rate_length_controlled": scorer.win_rate_length_controlled,
            }.items():
                values |= {prefix + each: value for each, value in estimate.named(key).items()}
            values[f"{prefix}win_rate_ties_as_wins"] = scorer.win_rate_ties_as_wins
        return values

    def write(self, folder: str | Path) -> None:
        """Write `summary.json` into a run's folder."""
        write_versioned(Path(folder, "summary.json"), VERSION, _encode(self))

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """The summary in a run's folder; None if there is none.

        Raises:
            UserError: the file cannot be read.
        """
        fix = f"Write it again: {test_command(folder)}"
        return read_versioned(Path(folder, "summary.json"), VERSION, lambda values: _decode(cls, values, ""), fix)


def results_cells(
    before: Estimate, after: Estimate, win_rate: Estimate, equal: Estimate, *, is_equal: bool
) -> tuple[str, str, str]:
    """Cells of a table of results: rewards, win rate, win rate at equal length.

    Args:
        is_equal: Whether a win rate at equal length can be given (`Summary.has_equal_lengths`).
    """
    interval = f"{win_rate.value:.1%} ({win_rate.low:.1%} – {win_rate.high:.1%})"
    return f"{decimal(before.value)} → {decimal(after.value)}", interval, f"{equal.value:.1%}" if is_equal else "n/a"


def test_command(folder: str | Path) -> str:
    """The command that evaluates the run in a folder, which may have been moved since its configuration was written."""
    checkpoint = Path(folder, "checkpoints", "last.ckpt")
    options = ("--config", Path(folder, "config.yaml"), "--ckpt_path", checkpoint)
    return command("test", *options, f"--trainer.default_root_dir={folder}")


def _encode(value: Any) -> dict[str, Any]:
    """A dataclass as a dictionary; estimates as three keys each. None and empty values are left out."""
    encoded: dict[str, Any] = {}
    for each in fields(value):
        held = getattr(value, each.name)
        if isinstance(held, Estimate):
            encoded |= held.named(each.name)
        elif is_dataclass(held):
            encoded[each.name] = _encode(held)
        elif isinstance(held, Mapping):
            if held:
                encoded[each.name] = {name: _encode(inner) for name, inner in held.items()}
        elif held is not None:
            encoded[each.name] = held
    return encoded


def _decode(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """The inverse of `_encode`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.')} is not an object")
    decoded: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for each in fields(cls):  # type: ignore[arg-type]
        name, kind = each.name, hints[each.name]
        if name not in values:
            if each.default is None or callable(each.default_factory):
                continue
            raise ValueError(f"{where}{name} is missing")
        if get_origin(kind) in (Union, types.UnionType):  # X | None
            kind = next(inner for inner in get_args(kind) if inner is not type(None))
        held = values[name]
        if kind is Estimate:
            numbers = [values.get(key) for key in (name, f"{name}_low", f"{name}_high")]
            decoded[name] = Estimate(*(_number(number, where + name) for number in numbers))
        elif get_origin(kind) is dict:
            if not isinstance(held, Mapping):
                raise ValueError(f"{where}{name} is not an object")
            inner = get_args(kind)[1]
            decoded[name] = {key: _decode(inner, value, f"{where}{name}.{key}.") for key, value in held.items()}
        elif is_dataclass(kind):
            decoded[name] = _decode(kind, held, f"{where}{name}.")  # type: ignore[arg-type]
        elif kind is str:
            decoded[name] = str(held)
        else:
            decoded[name] = kind(_number(held, where + name))
    return cls(**decoded)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is not a number")
    return value
