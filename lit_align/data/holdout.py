"""A share of the training prompts that is held out for validation."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import numpy as np

from lit_align.data.examples import Selection, Source
from lit_align.data.formats.rows import Kind, Row, Rows
from lit_align.data.formats.spool import Spool
from lit_align.errors import UserError, amount


class HeldOutShare:
    """The rows of sources, split between training and validation. They are read if a part of them is not in the cache.

    Args:
        share: Share of the prompts that is held out.
        seed: Seed of the choice of prompts.
    """

    def __init__(self, sources: Sequence[Source], kind: Kind, share: float, seed: int):
        self.sources = sources
        self.kind: Kind = kind
        self.share = share
        self.seed = seed

    def train(self, place: int) -> Selection:
        """The rows of one source that are trained on."""
        return self._selection(lambda: self._rows[0][place], f"training {place}")

    def held_out(self) -> Selection:
        """The rows of all sources that are held out."""
        return self._selection(lambda: self._rows[1], "held out")

    def _selection(self, read: Callable[[], Rows], part: str) -> Selection:
        return Selection(read, self.sources, {"share": self.share, "seed": self.seed, "part": part})

    @cached_property
    def _rows(self) -> tuple[list[Rows], Rows]:
        return hold_out([source.read(self.kind) for source in self.sources], self.share, self.seed)

    def forget(self) -> None:
        """Free the rows."""
        vars(self).pop("_rows", None)


def hold_out(parts: Sequence[Rows], share: float, seed: int) -> tuple[list[Rows], Rows]:
    """Split the rows of sources into those to train on and a held-out share of the prompts.

    All rows of a prompt are on one side, and so are all turns of a chat that is imitated. Texts without a prompt are
    split themselves. The choice depends on the prompts, or these texts, and the seed alone.

    Raises:
        UserError: a source keeps no rows, or none are held out.
    """

    keys = [np.fromiter(_keys(rows, seed), np.uint64, len(rows)) for rows in parts]
    prompts = np.unique(np.concatenate(keys))
    held = prompts[: round(share * len(prompts))]
    is_held = [np.isin(each, held) for each in keys]
    train = [
        replace(rows, rows=Spool(row for row, out in zip(rows, outs, strict=True) if not out))
        for rows, outs in zip(parts, is_held, strict=True)
    ]
    others = Spool(
        row for rows, outs in zip(parts, is_held, strict=True) for row, out in zip(rows, outs, strict=True) if out
    )
    if not others or not all(train):
        raise UserError(
            f"data.validation={share} must leave prompts on both sides of {amount(len(prompts), 'prompts')}. Change "
            "the share, or name a file."
        )
    return train, replace(parts[0], rows=others, skipped=Counter())


def _keys(rows: Iterable[Row], seed: int) -> Iterator[int]:
    """A number for each row; rows with the same number are held out together."""
    for _, parts in groupby(rows, key=lambda row: row.source):
        *_, last = turns = list(parts)  # a chat's last turn has all others in its prompt
        text = json.dumps(last.prompt or last.responses, sort_keys=True, default=str)
        found = hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass"))
        yield from [int.from_bytes(found.digest()[:8])] * len(turns)
