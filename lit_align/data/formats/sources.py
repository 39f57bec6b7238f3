"""Sources of raw records: files, globs, folders, stored rounds, the hub."""

import glob
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lit_align.data.formats.files import FILE_KINDS, find_reader, records_of_files
from lit_align.data.formats.folders import dataset_records, downloaded_records, is_saved, saved_records
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError
from lit_align.data.formats.slices import sliced, split_name, split_slice
from lit_align.data.rounds.stored import find_rounds, read_rounds
from lit_align.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset

_SOURCES = (
    f"a file ({FILE_KINDS}; texts also as .gz or .zst), a folder of them or one saved by `datasets`, a run's "
    "rounds, or a hub name"
)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def read_records(source: str, split: str | None, skipped: Counter[str]) -> Iterator[Record]:
    """The records of a source, within the split and the slice at the end of its name, and the slice of `split`."""
    name, bounds = (source, None) if Path(source).exists() else split_slice(source)
    name, named = split_name(name)
    if named and split:
        raise DataError(f"{source} names a split, and split={split!r} another. Leave one out.")
    part, part_bounds = split_slice(named or split or "")
    records = sliced(_records(name, part or None, skipped), part_bounds)
    return sliced(records, bounds)


def _records(source: str, split: str | None, skipped: Counter[str]) -> Iterator[Record]:
    path = Path(source)
    folder, _, configuration = source.rpartition(":")
    if path.is_dir() or (folder and Path(folder).is_dir()):
        path, configuration = (path, "") if path.is_dir() else (Path(folder), configuration)
        return _folder_records(path, split, configuration, skipped)
    if not path.exists() and glob.has_magic(source):
        return _glob_records(source, split, skipped)
    reader = find_reader(path)
    is_path = len(path.parts) == 2 and path.parent.is_dir()  # it looks like a hub name, but its folder is here
    if reader is None and not is_path and not path.exists() and _HUB_NAME.fullmatch(source):
        return _hub_records(source, split)
    if not path.is_file():
        raise DataError(f"{source}: there is no such file. Give {_SOURCES}.")
    if path.suffix.lower() in (".zip", ".tar", ".7z", ".tgz"):
        raise DataError(f"{source}: an archive cannot be read. Unpack it, and give a file or the folder.")
    if reader is None:
        raise DataError(f"{source}: a {path.suffix or 'nameless'} file cannot be read. Give {_SOURCES}.")
    if split is not None:
        raise DataError(
            f"{source}: split={split!r} has no effect: a file has no splits. Leave it out, or give a slice ([:95%])."
        )
    return reader(path, skipped)


def _folder_records(path: Path, split: str | None, configuration: str, skipped: Counter[str]) -> Iterator[Record]:
    if find_rounds(path):
        return _round_records(path, split, skipped)
    return saved_records(path, split) if is_saved(path) else downloaded_records(path, split, configuration, skipped)


def _glob_records(pattern: str, split: str | None, skipped: Counter[str]) -> Iterator[Record]:
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise DataError(f"{pattern}: no file matches this pattern. Give {_SOURCES}.")
    return records_of_files([Path(path) for path in paths], lambda path: _records(str(path), split, skipped))


def _round_records(path: Path, scorer: str | None, skipped: Counter[str]) -> Iterator[Record]:
    """Rounds that were sampled on-policy: prompts, responses as text, and the rewards of one scorer."""
    for stored in read_rounds(path, scorer):
        for sample, rewards in stored.rows():
            values = {"prompt": sample.prompt, "responses": sample.responses, "rewards": rewards}
            cut = tuple(not finished for finished in sample.finished)
            if any(cut):
                skipped["responses cut when they were sampled, to which no end is added"] += sum(cut)
            yield Record(values | (sample.beside or {}), f"{stored.path.name}/{sample.source}", cut=cut)


def _hub_records(source: str, split: str | None) -> Iterator[Record]:
    return dataset_records(load_hub(source, split), f"{source}[{split or 'train'}]")


def load_hub(source: str, split: str | None) -> "Dataset":
    """A data set of the hub, which `datasets` downloads whole into its own cache, as mapped Arrow files.

    A streamed one would have no fingerprint, so that each start would have to read it again.

    Raises:
        DataError: the hub has none of that name and split.
    """
    from datasets import load_dataset  # takes seconds to import
    from datasets.exceptions import DatasetsError

    name, _, configuration = source.partition(":")
    split = split or "train"
    try:
        return cast("Dataset", load_dataset(name, configuration or None, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: there is no such file or folder, and the hub gives no data set of that name with "
            f"split={split!r} ({first_line(error)}). Give {_SOURCES}."
        ) from error
    except DatasetsError as error:  # such as files of other columns, or a full disk
        why = first_line(error.__cause__ or error)
        raise DataError(
            f"{source}: `datasets` cannot prepare this data set ({why}). Give some of its files."
        ) from error
