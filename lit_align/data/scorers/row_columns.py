"""Columns of the rows that prompts are from: what a reward needs beside a response, such as the right answer."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from lit_align.data.formats.read import read_rows
from lit_align.data.formats.rows import Row, Text, listing
from lit_align.data.scorers.base import excerpt, joined
from lit_align.errors import UserError
from lit_align.files import digest


class RowColumns:
    """Values of columns, found by the prompt of their row.

    Args:
        rows: Where the rows are, as in data.prompts; without them, no columns are read.
        split: Split of saved or hub data sets.
        columns: Source of the columns that make the prompt, as in data.columns.
        ignore_columns: Columns that do not belong to the prompt, as in data.ignore_columns.

    Raises:
        UserError: the rows cannot be read.
    """

    def __init__(
        self,
        rows: str | list[str] | None,
        split: str | None,
        columns: dict[str, str] | None,
        ignore_columns: list[str] | None,
    ):
        self.source = rows if isinstance(rows, str) else listing(rows or ())
        self._rows: Iterable[Row] = ()
        if rows is not None:
            self._rows = read_rows(
                rows,
                split=split,
                kind="prompts",
                columns=columns,
                ignore_columns=ignore_columns or (),
                keep_columns=True,
            )
        for name, value in (("rows_split", split), ("columns", columns), ("ignore_columns", ignore_columns)):
            if rows is None and value is not None:
                raise UserError(
                    f"scorer.{name}={value} has no effect without scorer.rows. Set it, or leave {name} out."
                )
        self.names = tuple(dict.fromkeys(name for row in self._rows for name in row.columns))
        self._values: dict[bytes, tuple[str, str]] = {}  # by prompt: the row's source, and its values as JSON

    def keep(self, names: Iterable[str]) -> None:
        """Keep only these columns.

        Raises:
            UserError: two rows have the same prompt and different values.
        """
        self.names = tuple(names)
        for row in self._rows:
            values = json.dumps({name: row.columns.get(name) for name in self.names}, default=str)
            source, first = self._values.setdefault(_key(row.prompt), (row.source, values))
            if first != values:
                raise UserError(
                    f"scorer.rows: {source} and {row.source} have the same prompt ({excerpt(joined(row.prompt))}), but "
                    f"different values of {listing(self.names)}. Make them equal, or take one row out."
                )
        self._rows = ()

    @property
    def identity(self) -> str:
        """Identifies all prompts and their values; empty without columns."""
        if not self.names:
            return ""
        lines = "\n".join(sorted(key.hex() + values for key, (_, values) in self._values.items()))
        return f" {listing(self.names)}@{digest(lines)}"

    def of(self, prompts: Iterable[Text]) -> dict[str, list[Any]]:
        """The values of each column for these prompts.

        Raises:
            UserError: a prompt is in none of the rows.
        """
        found = [json.loads(self._values_of(prompt)) for prompt in prompts] if self.names else []
        return {name: [values[name] for values in found] for name in self.names}

    def check(self, prompts: Iterable[Text]) -> None:
        """Raise a `UserError` if a prompt is in none of the rows."""
        for prompt in prompts if self.names else ():
            self._values_of(prompt)

    def _values_of(self, prompt: Text) -> str:
        found = self._values.get(_key(prompt))
        if found is None:
            raise UserError(
                f"scorer.rows={self.source} must have a row for each prompt, and none has {excerpt(joined(prompt))}. "
                "Add the file that this prompt is from."
            )
        return found[1]


def _key(prompt: Text) -> bytes:
    """Identifies a prompt; a plain one is the same as a user's turn, which a chat template may make of it."""
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return hashlib.sha256(json.dumps(chat, sort_keys=True, default=str).encode()).digest()[:16]
