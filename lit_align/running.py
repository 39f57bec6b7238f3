"""Processes by host and id, whether one that a file names still runs, and the cores of this one."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Process:
    """A process, as files and other processes name it.

    Args:
        started: When it started, by the clock of its system: another process may later have the same id. Empty where
            the system does not say.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def this_one(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or "")

    @property
    def may_run(self) -> bool:
        """Whether it may be running; for another host this is unknown."""
        if self.host != socket.gethostname():
            return True
        started = _start_of(self.pid)
        return started is not None and started == self.started


def usable_cores() -> list[int]:
    """The cores that this process may use; all of them where the system does not say, as on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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
