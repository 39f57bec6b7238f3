"""`run.lock`: one run at a time in a folder.

The file names the host and the process that trains. It is deleted when the run ends, even with an error. After a kill
it stays; the next run on the same host takes it over, since that process no longer exists.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from lit_align.console import print_line, relative
from lit_align.errors import UserError


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder.

    Args:
        started: When it started, by the clock of its system: another process may later have the same id. Empty where
            the system does not say.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or "")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The holder that a lock file names; None if there is no such file.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{relative(path)} cannot be read. Delete it if no run writes to this folder.") from error

    @property
    def may_live(self) -> bool:
        """Whether the process may be running; for another host this is unknown."""
        if self.host != socket.gethostname():
            return True
        started = _start_of(self.pid)
        return started is not None and started == self.started


@contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder, alone.

    Raises:
        UserError: another process holds it.
    """
    path = Path(folder, "run.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = Holder.this_process()
    with _alone(path.parent):
        holder = Holder.read(path)
        if holder is not None and holder.may_live:
            where = "" if holder.host == ours.host else f" If it has ended, delete {relative(path)}."
            raise UserError(
                f"trainer.default_root_dir={relative(folder)} is in use: process {holder.pid} on {holder.host} trains "
                f"there. Wait for its end, or name another folder.{where}"
            )
        beside = path.with_name(f".run.lock.{ours.pid}")
        beside.write_text(json.dumps(asdict(ours)) + "\n")
        beside.replace(path)
    if holder is not None:
        print_line(f"{relative(path)}: process {holder.pid} has ended without deleting it; this run takes it over")
    try:
        yield
    finally:
        if ours.pid == os.getpid():  # not in a forked process
            path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time read and write the lock file, if the file system supports such locks."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _start_of(pid: int) -> str | None:
    """When a process of this host started, empty where the system does not say; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    return ""
