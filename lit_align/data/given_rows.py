"""Rows that are given in Python in place of a file's name: a list of dicts, or a `datasets.Dataset`.

They are written once to the cache of tokenized data, and read from there as any other file, by all processes.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_align.data.cache import TokenCache
from lit_align.errors import UserError, first_line
from lit_align.files import digest


def as_file(given: Any) -> Any:
    """The path of a file with the rows, if rows are given, written if it is not there yet; else what is given.

    Raises:
        UserError: a row holds something other than texts, numbers, lists and dicts; or a data set has a transform.
    """
    if _is_dataset(given):
        if given.format["type"] == "custom":
            raise UserError(
                "the data set has a transform (set_transform), which is applied only where rows are read in Python and "
                "would be lost. Apply the function with `map`."
            )
        name, identity, write = "rows.parquet", given._fingerprint, given.to_parquet
    elif _are_rows(given):
        name, identity, write = "rows.jsonl", digest(_lines(given)), lambda path: _write_lines(path, given)
    else:
        return given
    rows = TokenCache.at(None).load_or_make("rows", {"rows": identity}, {}, lambda folder, _: write(folder / name))
    return str(rows / name)


def as_files(given: Any) -> Any:
    """The same for one source or for a list of several."""
    one = as_file(given)
    return [as_file(each) for each in given] if one is given and isinstance(given, list) else one


def reading_rows(*arguments: str) -> dict[str, Callable[[Any], Any]]:
    """The `argument_conversions` of a class, of which each of these arguments names a source."""
    return dict.fromkeys(arguments, as_file)


def _are_rows(given: Any) -> bool:
    """Whether it is a list of dicts that are not sources, {path: …}."""
    rows = given if isinstance(given, list) else []
    return len(rows) > 0 and all(isinstance(row, Mapping) and "path" not in row for row in rows)


def _is_dataset(value: Any) -> bool:
    datasets = sys.modules.get("datasets")  # takes seconds to import
    return datasets is not None and isinstance(value, datasets.Dataset)


def _write_lines(path: Path, rows: list[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:  # as it is read
        file.writelines(_lines(rows))


def _lines(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    for place, row in enumerate(rows):
        try:
            yield json.dumps(row, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"rows[{place}] cannot be written as JSON: {first_line(error)}. Give texts, numbers, lists and dicts."
            ) from error
