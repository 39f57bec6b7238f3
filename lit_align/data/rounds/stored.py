"""Rounds as they are found on disk: to look at, and as a data set of prompts with ranked responses."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.console import phase, print_line, relative
from lit_align.data.rounds.numbers import NumbersBuilder, RoundNumbers, ScoredFiles, scored_files
from lit_align.data.rounds.row_types import SampledTexts, SampleRow, ScoreRow
from lit_align.data.rounds.store import Damaged, place_of, read_table
from lit_align.errors import UserError

NAME = re.compile(r"round_(\d+)-\w+")
"""Names of rounds' folders: number and id, by which their files are checked."""
SHOWN_FROM = 500
"""Files from which on a bar is shown while they are read."""


@dataclass(frozen=True)
class StoredRound:
    """A round's batches that one scorer has scored. Its numbers are in memory, its samples are read batch by batch."""

    files: ScoredFiles
    numbers: RoundNumbers

    @property
    def path(self) -> Path:
        return self.files.folder

    @property
    def number(self) -> int:
        """Counted from 1, as on the screen."""
        return int(self.path.name.partition("_")[2].partition("-")[0]) + 1

    def rows(self) -> Iterator[tuple[SampledTexts, list[float]]]:
        """Each prompt's samples with their rewards; those of damaged files are left out."""
        for batch in dict.fromkeys(self.numbers.batch.tolist()):
            yield from self.batch(batch)

    def batch(self, batch: int) -> list[tuple[SampledTexts, list[float]]]:
        """The same of one batch; none if its file is damaged, which is reported."""
        rewards = self.numbers.rewards[self.numbers.batch == batch].tolist()
        table = _read_or_report(self.files.samples(batch), SampleRow)
        return [] if table is None else list(zip(SampledTexts.from_arrow(table), rewards, strict=True))


def find_rounds(folder: str | Path) -> list[Path]:
    """The rounds in a run's folder or its `rounds`, or the folder itself if it is a round; older ones come first.

    Raises:
        UserError: a round's folder has been renamed.
    """
    folder = Path(folder)
    if (folder / "round.json").is_file():
        folder = folder.resolve()
        if not NAME.fullmatch(folder.name):
            raise UserError(
                f"{relative(folder)}: a round's folder must keep its name, round_NUMBER-ID, by which its files are "
                "checked. Rename it."
            )
        return [folder]
    found = [path.parent for place in (folder, folder / "rounds") for path in place.glob("round_*-*/round.json")]
    found = [path for path in found if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name.partition("-")[0], (path / "round.json").stat().st_mtime_ns))


def read_rounds(folder: str | Path, scorer: str | None = None) -> list[StoredRound]:
    """The rounds in a folder; batches that are damaged or not yet scored are left out.

    Args:
        scorer: Identity of the scorer, or a part of it, where several scored a round.

    Raises:
        UserError: no round has been scored, or `scorer` does not select exactly one of several scorers.
    """
    paths = find_rounds(folder)
    if not paths:
        raise UserError(f"{folder}: there are no rounds. Give a run's folder, its `rounds`, or one of these.")
    rounds = [stored for path in paths if (stored := _read_round(path, scorer))]
    if not rounds:
        raise UserError(f"{folder}: no round has been scored yet. Resume the run.")
    return rounds


def _read_round(path: Path, scorer: str | None) -> StoredRound | None:
    scored = [(files, numbers) for files in scored_files(path) if (numbers := read_numbers(files))]
    if not scored:
        print_line(f"  {path} has not been scored yet; it is left out.")
        return None
    exact = [each for each in scored if each[1].scorer == scorer]
    matching = [StoredRound(*each) for each in exact or scored if scorer is None or scorer in each[1].scorer]
    if len(matching) != 1:
        found = "several scorers" if matching else f"no scorer {scorer!r}"
        names = "; ".join(sorted(numbers.scorer for _, numbers in scored))
        raise UserError(f"{path} has {found}. Name one by a part of its name (split, --scorer): {names}.")
    return matching[0]


def read_numbers(files: ScoredFiles) -> RoundNumbers | None:
    """The numbers of a round; None if none of its files can be read. They are kept for the next time."""
    kept = RoundNumbers.read(files)
    if kept is not None:
        return kept
    builder, is_whole = NumbersBuilder(), True
    for batch in _shown(files):
        scores, finished = _read_or_report(files.scores(batch), ScoreRow), _finished(files.samples(batch))
        is_whole = is_whole and scores is not None and finished is not None
        if scores is not None:
            builder.add(batch, scores, finished)
    if not builder.batch:
        return None
    numbers = builder.built()
    if is_whole:
        numbers.save(files)
    return numbers


def _shown(files: ScoredFiles) -> Iterator[int]:
    if len(files.batches) < SHOWN_FROM:
        yield from files.batches
        return
    with phase("read", len(files.batches), f"files of {files.folder.name}") as bar:
        for batch in files.batches:
            yield batch
            bar.advance(1)


def _finished(file: Path) -> pa.ChunkedArray | None:
    """Whether each response ended by itself. The rest of the file is not read; None if it is damaged."""
    try:
        return pq.read_table(file, columns=["finished"]).column(0)
    except (pa.ArrowException, OSError, ValueError):
        return None


def _read_or_report(file: Path, row: type[SampleRow] | type[ScoreRow]) -> pa.Table | None:
    round_id = file.parent.name.rpartition("-")[2]
    try:
        return read_table(file, row, place_of(round_id, file.stem))
    except Damaged as error:
        print_line(f"  {file} cannot be read ({error}); it is left out. Resume the run to compute it again.")
        return None
