"""`run.lock`: one run at a time in a folder.

The file names the host and the process that trains. It is deleted when the run ends, even with an error. After a kill
it stays; the next run on the same host takes it over, since that process no longer exists.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from lit_align.console import print_line, relative
from lit_align.errors import UserError
from lit_align.files import write_whole, writing
from lit_align.running import Process


@contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Hold a run's folder, alone.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    path = Path(folder, "run.lock")
    ours = Process.this_one()
    with writing(folder, "trainer.default_root_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            holder = _holder(path)
            if holder is not None and holder.may_run:
                where = "" if holder.host == ours.host else f" If it has ended, delete {relative(path)}."
                raise UserError(
                    f"trainer.default_root_dir={relative(folder)} is in use: process {holder.pid} on {holder.host} "
                    f"trains there. Wait for its end, or name another folder.{where}"
                )
            write_whole(path, lambda beside: beside.write_text(json.dumps(asdict(ours)) + "\n"))
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


def _holder(path: Path) -> Process | None:
    """The process that a lock file names; None if there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return Process(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{relative(path)} cannot be read. Delete it if no run writes to this folder.") from error
