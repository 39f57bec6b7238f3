"""Folders of data: saved by `datasets`, or downloaded from the hub with data files and a README."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import yaml

from lit_align.data.formats.files import BATCH, FILE_KINDS, find_reader, records_of_files, table_records
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, listing
from lit_align.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = re.compile(r"[A-Za-z]+")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\W.*)?")
"""A file of the hub, named after its split: train_prefs-00000-of-00002.parquet."""


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def saved_records(path: Path, split: str | None) -> Iterator[Record]:
    """The rows of a folder that `save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk  # takes seconds to import

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # IndexError without rows
        raise DataError(
            f"{path}: this folder is empty or damaged ({first_line(error)}). Save it again with `save_to_disk`."
        ) from error
    if isinstance(data, Dataset):
        if split is not None:
            raise DataError(f"{path}: split={split!r} has no effect: the folder holds one data set. Leave it out.")
        return dataset_records(data, path.name)
    name = split or (next(iter(data)) if len(data) == 1 else "train")
    if name not in data:
        raise DataError(f"{path}: there is no split {name!r}. Set `split` to one of {listing(map(str, data))}.")
    return dataset_records(data[name], f"{path.name}[{name}]")


def dataset_records(data: "Dataset", name: str) -> Iterator[Record]:
    return table_records(cast(Iterator[pa.Table], data.with_format("arrow").iter(BATCH)), name, name)


# --- downloaded folders ---


def downloaded_records(path: Path, split: str | None, configuration: str, skipped: Counter[str]) -> Iterator[Record]:
    """The rows of the data files in a folder, by the configurations of its README or by the names of the files."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and find_reader(file) and _is_data(file, path)]
    if not files:
        raise DataError(
            f"{path}: the folder holds no data. Give one with files of {FILE_KINDS}, or saved by `datasets`."
        )
    splits = _configured(path, files, configuration) or _by_name(path, files)
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise DataError(f"{path}: there is no split {name!r}. Set `split` to one of {listing(splits)}.")

    def read(file: Path) -> Iterator[Record]:
        reader = find_reader(file)
        assert reader is not None
        return reader(file, skipped)

    return records_of_files(splits[name], read)


def _is_data(file: Path, folder: Path) -> bool:
    """Whether the file is neither hidden (as a download's cache is) nor a description of the data."""
    parts = file.relative_to(folder).parts
    return not any(part.startswith((".", "_")) for part in parts) and file.name not in (
        "dataset_infos.json",
        "dataset_info.json",
    )


def _configured(path: Path, files: list[Path], configuration: str) -> dict[str, list[Path]]:
    """The files of each split, as the README's header lists them; empty if it lists none."""
    configs = _configurations(path)
    if not configs:
        if configuration:
            raise DataError(
                f"{path}: there is no configuration {configuration!r}: the README lists none. Leave it out."
            )
        return {}
    by_name = {str(each.get("config_name", "default")): each for each in configs}
    marked = [name for name, each in by_name.items() if each.get("default")]
    name = configuration or next(iter([*marked, *(by_name if len(by_name) == 1 else [])]), "default")
    if name not in by_name:
        raise DataError(
            f"{path}: the folder has the configurations {listing(by_name)}. Name one after a colon: {path}:"
            f"{next(iter(by_name))}."
        )
    folder = path / str(by_name[name].get("data_dir") or "")
    files = [file for file in files if folder in file.parents]
    if not (given := by_name[name].get("data_files")) and files:
        return _by_name(folder, files)
    splits = {
        split: list(dict.fromkeys(chain.from_iterable(_matching(folder, files, pattern) for pattern in patterns)))
        for split, patterns in _patterns(given).items()
    }
    missing = [split for split, found in splits.items() if not found]
    if missing:
        raise DataError(
            f"{path}: the README's configuration {name} names files for {listing(missing)} that are not in the folder. "
            "Download them, or give the path of a file."
        )
    return splits


def _configurations(path: Path) -> list[dict[str, Any]]:
    readme = path / "README.md"
    text = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise DataError(
            f"{readme}: the header is not valid YAML ({first_line(error)}). Correct or delete it."
        ) from error
    configs = header.get("configs") if isinstance(header, dict) else None
    places = ("data_files", "data_dir")
    return [each for each in configs or [] if isinstance(each, dict) and any(each.get(place) for place in places)]


def _patterns(given: Any) -> dict[str, list[str]]:
    """The patterns of each split's files, from a configuration's `data_files`: of each split, or of all files."""
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        given = {each.get("split", "train"): each.get("path") for each in given}
    by_split = given if isinstance(given, dict) else {"train": given}
    return {
        str(split): [str(each) for each in (paths if isinstance(paths, list) else [paths])]
        for split, paths in by_split.items()
    }


def _matching(path: Path, files: list[Path], pattern: str) -> list[Path]:
    found = set(path.glob(pattern)) if pattern and not Path(pattern).is_absolute() else set()
    return [file for file in files if file in found or any(folder in found for folder in file.parents)]


def _by_name(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the names of files and folders; all are for training if none names a split."""
    splits: dict[str, list[Path]] = {}
    shards = [(shard[1], file) for file in files if (shard := _SHARD.fullmatch(file.name))]
    if len(shards) == len(files):
        for split, file in shards:
            splits.setdefault(split, []).append(file)
        return splits
    for file in files:
        words = {word.lower() for part in file.relative_to(path).parts for word in _WORD.findall(part)}
        named = next((split for split, names in _SPLITS.items() if not words.isdisjoint(names)), None)
        splits.setdefault(named or "", []).append(file)
    rest = splits.pop("", [])
    if rest and "train" in splits:
        raise DataError(
            f"{path}: it is not clear to which split {rest[0].relative_to(path)} belongs. Give a file's path, or a "
            "glob such as data/train*.parquet."
        )
    return ({"train": rest} if rest else {}) | splits
