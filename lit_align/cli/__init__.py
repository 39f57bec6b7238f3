"""The command line: ``python train.py fit --config X.yaml``, installed as ``lit-align``.

`main` runs one command. Trainer's commands (fit, validate, test, predict) go to `app.AlignCLI`, the others to their
modules in `commands`. This module imports neither Lightning nor torch, so that a help text or a look at a finished run
does not wait for them.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

# Read when libgomp and tokenizers load, hence set before any of their imports. Idle OpenMP threads that sleep at once
# cost a third of a round's time, and those that spin for long starve the processes they share cores with; tokenizers
# warns at each fork of a data loader, and turns its parallelism off there.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns: some microseconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lit_align import __version__
from lit_align.allocation import keep_freed_memory
from lit_align.cli.commands import COMMANDS
from lit_align.cli.noise import quiet
from lit_align.cli.usage import top_level_help
from lit_align.console import paragraph, program, relative
from lit_align.errors import UserError
from lit_align.lazy import lazy_exports

if TYPE_CHECKING:
    from lit_align.cli.app import AlignCLI

__all__ = ["AlignCLI", "main"]
__getattr__ = lazy_exports(__name__)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more; some have no file name."""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    A `UserError`, or a file that cannot be read or written, ends it with one paragraph and exit code 2; Ctrl-C ends it
    with one line and exit code 130, and a closed pipe (`| head`) silently. Other errors keep their traceback.
    """
    args = sys.argv[1:] if args is None else args
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a locale without → ends no run
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # modules of the user's own classes; last, so that none hides an installed one
    try:
        if args and args[0] in ("-h", "--help"):
            sys.stdout.write(top_level_help())
            sys.exit(0)
        if args == ["--version"]:
            sys.stdout.write(f"{program()} {__version__}\n")
            sys.exit(0)
        keep_freed_memory()
        command = COMMANDS.get(args[0]) if args else None
        if command is not None and command.module:
            import_module(command.module).run(args[1:])
        else:
            import_module("lit_align.cli.app").run(args)
    except _expected_errors() as error:
        sys.stderr.write(paragraph(f"error: {error}"))
        sys.exit(2)
    except BrokenPipeError:
        if not _nobody_reads():  # another's pipe: a connection, a worker
            raise
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in DISK:
            where = relative(error.filename) if error.filename else "a file"
            sys.stderr.write(paragraph(f"error: {where} cannot be written: {error.strerror}. Make room."))
            sys.exit(2)
        if error.filename is None:  # not a file of the user's: a connection, a worker
            raise
        sys.stderr.write(paragraph(f"error: {relative(error.filename)}: {error.strerror}."))
        sys.exit(2)
    except KeyboardInterrupt:  # of another command, or before `Interruption` takes over
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        _nobody_reads()  # what is printed is written now, not after the last handler of errors


def _nobody_reads() -> bool:
    """Whether the output goes to a program that has ended, such as `head`; if so, the rest of it goes nowhere."""
    output = select.poll()
    output.register(1, 0)
    try:
        sys.stdout.flush()
        ended = bool(output.poll(0))  # errors are reported without being asked for
    except BrokenPipeError:
        ended = True
    if ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return ended


def _expected_errors() -> tuple[type[Exception], ...]:
    """The errors whose message is for the user: ours, and those of Lightning and W&B where these were imported."""
    foreign = {"lightning.fabric.utilities.exceptions": "MisconfigurationException", "wandb.errors": "Error"}
    imported = {module: name for module, name in foreign.items() if module in sys.modules}
    return (UserError, *(getattr(sys.modules[module], name) for module, name in imported.items()))
