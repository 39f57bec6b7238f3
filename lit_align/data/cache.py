"""Tokenized data on disk, made once and mapped by every process that reads it.

    ~/.cache/lit_align/
      train.jsonl-3f9a2c1d/     named by the source and all options that decide its tokens
        examples.arrow          the tokens (`table.py`)
        examples.json           what the run's header says about them
        entry.json              the source's bytes and the version of the code that made it, and each file's size

One process makes an entry; others that need it wait at a file lock, which the system releases even after a kill. An
entry is made beside its place and renamed, so none is ever incomplete. One whose source, code or size has changed since
is made again.
"""

import fcntl
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_align.console import phase
from lit_align.errors import UserError, first_line
from lit_align.files import digest, writing

OPTION = "data.cache_dir"
POLL_SECONDS = 0.2

Report = Callable[[int, int], None]
"""Tells processes that wait how many of how many rows are done."""
Make = Callable[[Path, Report], None]
"""Writes the files of an entry into a folder."""


def default_folder() -> Path:
    """$LIT_ALIGN_CACHE; else a folder in $HF_HOME or $XDG_CACHE_HOME, if set; else ~/.cache/lit_align."""
    if given := os.environ.get("LIT_ALIGN_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lit_align"


@functools.cache
def code_version(rule: type) -> str:
    """Identifies the code that makes examples: this package's, the libraries', and that of a rule's classes."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    files += [Path(inspect.getfile(cls)) for cls in rule.__mro__ if cls.__module__ in sys.modules and cls is not object]
    found = hashlib.sha256(" ".join(map(version, ("transformers", "tokenizers", "jinja2"))).encode())
    for path in files:
        with suppress(OSError):  # a class of an interactive session
            found.update(path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, as its entry.json describes it."""

    path: Path
    source: str
    state: Mapping[str, Any]
    sizes: Mapping[str, int]  # of its files, in bytes
    is_damaged: bool = False

    @classmethod
    def read(cls, path: Path) -> "Entry | None":
        """The entry in a folder; None if there is none, or it is damaged."""
        try:
            entry = cls(path, **json.loads((path / "entry.json").read_text()))
            whole = all((path / name).stat().st_size == size for name, size in entry.sizes.items())
        except (OSError, ValueError, TypeError):
            return None
        return entry if whole else None

    @classmethod
    def damaged(cls, path: Path) -> "Entry | None":
        """The remains of an entry: damaged, or of a process that was killed while it made or deleted it."""
        files = [file for folder in (path, _part(path), _aside(path)) for file in folder.rglob("*") if file.is_file()]
        if not files and not path.exists():
            return None
        try:
            source = str(json.loads((path / "entry.json").read_text())["source"])
        except (OSError, ValueError, TypeError, KeyError):
            source = "?"
        return cls(path, source, {}, {str(file): file.stat().st_size for file in files}, is_damaged=True)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes.values())


class TokenCache:
    """A folder of entries.

    Args:
        folder: Where they are; made when it is first needed.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def at(cls, folder: str | None) -> "TokenCache":
        """The cache in a folder; None is the default one."""
        return cls(Path(folder) if folder else default_folder())

    def load_or_make(self, source: str, options: Mapping[str, Any], state: Mapping[str, Any], make: Make) -> Path:
        """The folder of an entry, which one process makes if it is not there yet.

        Args:
            source: Shown by `lit-align cache`; its last part begins the entry's name.
            options: Everything else that names the entry; plain values.
            state: Must equal the entry's: the source's bytes, the code's version.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        state = json.loads(json.dumps(state))
        text = json.dumps([source, options], sort_keys=True, default=repr)
        stem = re.sub(r"[^\w.-]+", "_", Path(source).name)[-60:]
        place = self.folder / f"{stem}-{digest(text)}"
        if not _is_current(place, state):
            with self._lock(place):
                if not _is_current(place, state):
                    self._make(place, source, state, make)
        return place

    def entries(self) -> list[Entry]:
        """All entries in order of their names, damaged ones too; not those that a process is making."""
        whole = (Entry.read(path.parent) for path in self.folder.glob("*/entry.json"))
        found = {entry.path.name: entry for entry in whole if entry is not None}
        for lock in self.folder.glob(".*.lock"):  # each entry has had one; other folders have none
            name = lock.name[1 : -len(".lock")]
            if name not in found and not _is_held(lock) and (damaged := Entry.damaged(self.folder / name)):
                found[name] = damaged
        return [found[name] for name in sorted(found)]

    def clear(self, entry: Entry) -> None:
        """Delete an entry. A process that reads it keeps what it has open."""
        with self._lock(entry.path):
            _remove(entry.path)
            shutil.rmtree(_part(entry.path), ignore_errors=True)

    def _make(self, place: Path, source: str, state: Mapping[str, Any], make: Make) -> None:
        part = _part(place)
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        try:
            with writing(part, OPTION):
                part.mkdir()
            make(part, lambda done, total: _write_progress(part, done, total))
            with writing(part, OPTION):
                (part / "progress").unlink(missing_ok=True)
                sizes = {path.name: path.stat().st_size for path in part.iterdir()}
                description = {"source": source, "state": state, "sizes": sizes}
                (part / "entry.json").write_text(json.dumps(description, indent=2) + "\n")
                _remove(place)
                part.rename(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _lock(self, place: Path) -> Iterator[None]:
        """Hold an entry's lock; while another process holds it, show how far that process is."""
        path = self.folder / f".{place.name}.lock"
        with writing(self.folder, OPTION):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            if not _take(file.fileno()):
                _wait(place, lambda: _take(file.fileno()))
            yield


def _is_current(place: Path, state: Mapping[str, Any]) -> bool:
    entry = Entry.read(place)
    return entry is not None and entry.state == state


def _part(place: Path) -> Path:
    return place.with_name(f".{place.name}.part")


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _remove(place: Path) -> None:
    """Delete a folder at once: it is renamed first, so that no one finds half of it."""
    aside = _aside(place)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _take(descriptor: int) -> bool:
    """Whether this process has got the lock; closing the file gives it back."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"data.cache_dir: its file system has no locks ({first_line(error)}), so that processes could write one "
            "entry at once. Name a folder on a local disk."
        ) from error
    return True


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    with lock.open() as file:
        return not _take(file.fileno())


def _wait(place: Path, is_over: Callable[[], bool]) -> None:
    progress = _read_progress(place)
    while progress is None:
        if is_over():
            return
        time.sleep(POLL_SECONDS)
        progress = _read_progress(place)
    done, total = progress
    with phase("tokenize", total, "rows, in another process", done=done) as bar:
        while not is_over():
            time.sleep(POLL_SECONDS)
            done, _ = _read_progress(place) or (done, total)
            bar.advance(done - bar.done)
        bar.advance(total - bar.done)


def _write_progress(part: Path, done: int, total: int) -> None:
    with writing(part, OPTION):
        (part / "progress").write_text(f"{done} {total}")


def _read_progress(place: Path) -> tuple[int, int] | None:
    try:
        done, total = map(int, (_part(place) / "progress").read_text().split())
    except (OSError, ValueError):  # not begun, or just being written
        return None
    return done, total
