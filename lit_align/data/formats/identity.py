"""The identity of a source's bytes, by which a cache notices that a file has changed."""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from lit_align.data.formats.slices import split_name, split_slice
from lit_align.data.formats.sources import load_hub
from lit_align.errors import UserError

WHOLE = 1 << 26
"""Sources of up to this many bytes are hashed whole, which takes a few hundredths of a second."""
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""Samples of each file of a larger source, and bytes of each sample."""
SAMPLED_FILES = 32
"""Sources of more files are not sampled."""


def identity_of(source: str, split: str | None) -> str:
    """Identifies the bytes that a source consists of now.

    Up to 64 MB they are all hashed. Of larger sources each file's size, its time of change and evenly spaced samples
    are; of many files, size and time alone. Hashing a hundred gigabytes at every start would take minutes, and an edit
    that changes none of these does not happen by accident. Hidden files are not counted.
    """
    name = source if Path(source).exists() else split_slice(source)[0]
    name, named = split_name(name)
    source_files = _files(name)
    if source_files is None:
        return _of_hub(name, named or split)
    folder, files = source_files
    states = [path.stat() for path in files]
    is_small = sum(state.st_size for state in states) <= WHOLE
    found = hashlib.sha256()
    for path, state in zip(files, states, strict=True):
        place = path.name if folder is None else path.relative_to(folder)  # folders may name splits
        found.update(f"{place} {state.st_size}\n".encode("utf-8", "surrogatepass"))
        if is_small:
            found.update(path.read_bytes())
        else:
            found.update(f"{state.st_mtime_ns}\n".encode())
            if len(files) <= SAMPLED_FILES:
                _add_samples(found, path, state.st_size)
    return found.hexdigest()


def _files(name: str) -> tuple[Path | None, list[Path]] | None:
    """The folder that a source is, if it is one, and its files in a fixed order; None for a hub name."""
    folder = name.rpartition(":")[0]
    for path in (Path(name), Path(folder)) if folder else (Path(name),):
        if path.is_dir():
            return path, sorted(_visible(path))
    if Path(name).is_file():
        return None, [Path(name)]
    if glob.has_magic(name):
        return None, [Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file()]
    return None


def _visible(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below it, without hidden ones."""
    for path, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found = (Path(path, name) for name in names if not name.startswith("."))
        yield from (each for each in found if each.is_file())  # a link may lead nowhere


def _add_samples(found: "hashlib._Hash", path: Path, size: int) -> None:
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))


def _of_hub(name: str, split: str | None) -> str:
    """The fingerprint that `datasets` gives a data set, of its files and their version on the hub."""
    try:
        return load_hub(name, split_slice(split or "")[0] or None)._fingerprint
    except UserError:
        return ""  # reading the source reports it
