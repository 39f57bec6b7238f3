"""Answers of a judge, cached in SQLite, so that even an interrupted run never pays twice for a request."""

import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.console import print_line
from lit_align.errors import UserError
from lit_align.running import Process

LOCK_SECONDS = 60.0
"""How long to wait for another process that holds the file locked."""
NOTICE_SECONDS = 5.0
"""After this time, a line says what the run waits for."""

TABLES = {
    "answers": {
        "request": "TEXT PRIMARY KEY",
        "model": "TEXT",
        "text": "TEXT",
        "prompt_tokens": "INTEGER",
        "answer_tokens": "INTEGER",
        "seconds": "REAL",
    },
    "held": {
        "request": "TEXT PRIMARY KEY",
        "expires": "REAL",
        "host": "TEXT",
        "pid": "INTEGER",
        "started": "TEXT",  # when the process started
    },
}
"""The columns of each table: answers, and the requests that processes have claimed."""


class Answer(NamedTuple):
    """A judge's answer."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float  # from the first attempt to the answer


class AnswerCache:
    """Answers on disk, by the digest of their request; threads and processes share the file.

    Each answer is committed as it comes. A request is claimed before it is sent, so that processes that start together
    send it once. A damaged file is set aside and a new one started.

    Raises:
        UserError: the file cannot be opened, read or written, or is another database.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._locked_since: float | None = None  # by another process, as far as this one has noticed
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable("opened", error) from error
        self._connection = self._open()
        columns = [row[1] for row in self._execute("PRAGMA table_info(answers)")]
        if columns != list(TABLES["answers"]):
            raise UserError(
                f"endpoint.cache={str(self.path)!r} must be a cache of answers, but its table `answers` has the "
                f"columns {', '.join(columns)}. Name another file."
            )

    def get(self, request: str) -> Answer | None:
        found = self._execute(
            "SELECT text, prompt_tokens, answer_tokens, seconds FROM answers WHERE request = ?", request
        )
        return Answer(*found[0]) if found else None

    def claim(self, request: str, seconds: float) -> bool:
        """Claim a request for this process, which then sends it; False if another process has claimed it.

        Args:
            seconds: After this time, or when its process has ended, the claim no longer holds.
        """
        now = time.time()
        held = self._execute("SELECT expires, host, pid, started FROM held WHERE request = ?", request)
        for expires, *process in held:
            if expires > now and Process(*process).may_run:
                return False
            self._execute("DELETE FROM held WHERE request = ? AND expires = ?", request, expires)
        mine = (request, now + seconds, *astuple(Process.this_one()))
        return bool(self._execute("INSERT OR IGNORE INTO held VALUES (?, ?, ?, ?, ?) RETURNING request", *mine))

    def release(self, request: str) -> None:
        """Give up the claim of a request."""
        self._execute("DELETE FROM held WHERE request = ?", request)

    def put(self, request: str, model: str, answer: Answer) -> None:
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", request, model, *answer)

    def close(self) -> None:
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            return sqlite3.connect(self.path, timeout=0.1, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable("opened", error) from error

    def _execute(self, command: str, *values: Any) -> list[Any]:
        """Run one command; wait for a lock, and replace a damaged file."""
        started, noticed = time.monotonic(), False
        with self._lock:
            while True:
                try:
                    rows = self._run(command, values)
                    self._locked_since = None
                    return rows
                except sqlite3.Error as error:
                    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bytes are variants of a kind
                    if kind in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) and self.path.is_file():
                        self._set_aside(error)
                        continue
                    # threads, and commands after one that has given up, wait for the same lock
                    self._locked_since = min(started, self._locked_since or started)
                    waited = time.monotonic() - self._locked_since
                    if kind not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or waited > LOCK_SECONDS:
                        verb = "read" if command.startswith("SELECT") else "written"
                        raise self._unusable("opened" if command.startswith("PRAGMA") else verb, error) from error
                    if waited > NOTICE_SECONDS and not noticed:
                        print_line(f"  {self.path} is locked by another process; waiting {LOCK_SECONDS:.0f} s for it.")
                        noticed = True

    def _run(self, command: str, values: Sequence[Any]) -> list[Any]:
        """Run one command on a file that has the tables."""
        for table, columns in TABLES.items():
            kinds = ", ".join(f"{name} {kind}" for name, kind in columns.items())
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({kinds})")
        return self._connection.execute(command, values).fetchall()

    def _set_aside(self, error: sqlite3.Error) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        print_line(f"  {self.path} is a damaged cache ({error}); it is set aside as {aside.name}.")
        self._connection.close()
        os.replace(self.path, aside)
        self._connection = self._open()

    def _unusable(self, verb: str, error: Exception) -> UserError:
        return UserError(
            f"endpoint.cache={str(self.path)!r} cannot be {verb} ({error}). Name a new file or an existing cache, in a "
            "folder with free space that you may write to. If another process holds it locked, wait for it to end."
        )
