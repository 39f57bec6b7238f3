"""What the name of a data set may end with: a split (saved[test]), a slice (rows.jsonl[:100], train[:95%], [-10:])."""

import glob
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError
from lit_align.data.formats.spool import Spool

_SLICE = re.compile(r"(?P<name>.*)\[(?P<bounds>[^\[\]]*:[^\[\]]*)\]", re.DOTALL)
_SPLIT = re.compile(r"(?P<name>[^\[\]]+)\[(?P<split>\w+)\]")
_BOUND = re.compile(r"\s*(-?\d+(\.\d+)?)(%?)\s*")


def split_slice(name: str) -> tuple[str, str | None]:
    """A name without its slice, and the slice's bounds, if it has any."""
    match = _SLICE.fullmatch(name)
    return (match["name"], match["bounds"]) if match else (name, None)


def split_name(name: str) -> tuple[str, str | None]:
    """A name without its split, and the split, if it has one; `[…]` that matches files is a glob's."""
    match = _SPLIT.fullmatch(name)
    return (match["name"], match["split"]) if match and not glob.glob(name) else (name, None)


def sliced(records: Iterator[Record], bounds: str | None) -> Iterator[Record]:
    """The records within the bounds; [:p%] and [p%:] have each record once.

    Raises:
        DataError: the bounds are not two numbers or percentages.
    """
    if bounds is None:
        return records
    first, _, last = bounds.partition(":")
    if not first.strip() and re.fullmatch(r"\s*\d+\s*", last):
        return islice(records, int(last))
    rows = Spool(records)
    places = range(len(rows))[_place(first, len(rows), bounds, 0) : _place(last, len(rows), bounds, len(rows))]
    return map(rows.__getitem__, places)


def _place(bound: str, count: int, bounds: str, empty: int) -> int:
    if not bound.strip():
        return empty
    match = _BOUND.fullmatch(bound)
    if match is None or (not match[3] and match[2]):
        raise DataError(
            f"[{bounds}]: a slice must be two row numbers or percentages, such as [:100] or [95%:]. Correct it."
        )
    number = Fraction(match[1])
    place = round(number * count / 100) if match[3] else int(number)
    return max(0, min(count, place + count if number < 0 else place))
