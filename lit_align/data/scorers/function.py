"""Scorers that call a user's function."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lit_align.data.formats.rows import Text
from lit_align.data.given_rows import as_files
from lit_align.data.scorers.base import BaseScorer, PairwiseScorer, Scorer
from lit_align.data.scorers.row_columns import RowColumns
from lit_align.data.scorers.user_function import UserFunction
from lit_align.errors import check_number


class _OfFunction(BaseScorer):
    """What the scorers that call a function have in common."""

    argument_conversions = {"rows": as_files}  # noqa: RUF012
    _function: UserFunction

    @property
    def identity(self) -> str:
        """The function's name, and fingerprints of the file that holds it, or of its code, and of its own values."""
        return self._function.identity

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self._function.columns.names)

    def check(self, prompts: Iterable[Text]) -> None:
        self._function.columns.check(prompts)


class FunctionScorer(_OfFunction, Scorer):
    """A Python function that returns one number per response: `reward(prompts, responses) -> list[float]`.

    A prompt is a string, or a list of messages with `role` and `content`. An argument called `responses`, or
    `completions` as in TRL, gets the responses wherever it stands: `reward(completions, **kwargs)`.

    Args:
        function: Import path of the function: package.module.function, or path/to/file.py:function. In Python also the
            function itself.
        batch_size: Most responses per call.
        rows: Files, data sets or hub names whose columns are further arguments, `reward(prompts, responses, answer)`,
            one value per response. A prompt's row is the one with the same prompt. null: no further arguments.
        rows_split: Split of saved or hub data sets.
        columns: Source of the columns that make the prompt of these rows, as in data.columns.
        ignore_columns: Columns of these rows that do not belong to the prompt, as in data.ignore_columns.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        batch_size: int = 256,
        rows: str | list[str] | None = None,
        rows_split: str | None = None,
        columns: dict[str, str] | None = None,
        ignore_columns: list[str] | None = None,
    ):
        check_number("scorer.batch_size", batch_size, least=1)
        form = "reward(prompts, responses) -> list[float], one number per response"
        self._function = UserFunction(function, form, RowColumns(rows, rows_split, columns, ignore_columns))
        self.function = self._function.function
        self.batch_size = batch_size

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        return self._function([_own(prompt) for prompt in prompts], responses, self._function.columns.of(prompts))


class PairwiseFunctionScorer(_OfFunction, PairwiseScorer):
    """A Python function that compares K responses: `prefer(prompt, responses)` returns P(i beats j), [K, K].

    Args:
        function: Import path of the function: package.module.function, or path/to/file.py:function. In Python also the
            function itself.
        rows: Files, data sets or hub names whose columns are further arguments, `prefer(prompt, responses, answer)`.
            A prompt's row is the one with the same prompt. null: no further arguments.
        rows_split: Split of saved or hub data sets.
        columns: Source of the columns that make the prompt of these rows, as in data.columns.
        ignore_columns: Columns of these rows that do not belong to the prompt, as in data.ignore_columns.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        rows: str | list[str] | None = None,
        rows_split: str | None = None,
        columns: dict[str, str] | None = None,
        ignore_columns: list[str] | None = None,
    ):
        form = "prefer(prompt, responses) -> [K, K], P(i beats j) of K responses"
        self._function = UserFunction(function, form, RowColumns(rows, rows_split, columns, ignore_columns))

    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> list[Any]:
        values = [{name: each for name, (each,) in self._function.columns.of([prompt]).items()} for prompt in prompts]
        return [
            self._function(_own(prompt), group, own)
            for prompt, group, own in zip(prompts, responses, values, strict=True)
        ]


def _own(prompt: Text) -> Text:
    """A prompt to which a function may append a response: the others of the prompt are scored without it."""
    return prompt if isinstance(prompt, str) else [{**message} for message in prompt]
