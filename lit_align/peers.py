"""Processes of a run watch each other: when one dies or hangs, all end, with one message that names its rank.

Rank 0 holds a connection to each other rank, and both ends send a beat every second: how many collective operations the
process has joined, and what its main thread does. A connection that closes without a farewell belongs to a process that
has died. Silence for longer than the limit belongs to one that is stopped, or whose Python does not run. A process that
lives hangs, too, if for as long it does not join an operation that another process has joined. A thread notices all
this, since the main thread may wait in such an operation.
"""

import json
import os
import secrets
import select
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch.distributed as dist

from lit_align.console import relative
from lit_align.errors import UserError, amount
from lit_align.running import Process
from lit_align.sharding import joined_operations, waiting_group

BEAT, FAREWELL, FAILURE = b".", b"-", b"!"
SECONDS_BETWEEN = 1.0
SECONDS_AHEAD = 3.0
"""A hanging process is ended this long before an operation that waits for it ends by itself, without naming a rank."""
SECONDS_TO_CONNECT = 60.0
PACKAGE = str(Path(__file__).parent)
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class Report:
    """The state of a process.

    Args:
        joined: Number of collective operations that it has joined.
        doing: Phase of the run, and the line that its main thread executes.
    """

    joined: int = 0
    doing: str = ""


@dataclass
class Rank:
    """One of the run's processes, with its latest report."""

    number: int
    process: Process
    report: Report = Report()

    @classmethod
    def this_one(cls) -> Self:
        return cls(dist.get_rank(), Process.this_one())


@dataclass
class Peer:
    """Another process, and the connection to it."""

    rank: Rank
    connection: socket.socket
    heard: float  # when it last sent anything
    begun: bytes = b""  # of a message whose end has not arrived

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # one that has died is noticed when it is read from
            self.connection.send(message + b"\n", socket.MSG_DONTWAIT)

    def read(self) -> list[bytes] | None:
        """The messages that have arrived; None if it has died."""
        try:
            received = self.connection.recv(4096)
        except OSError:
            return None
        *messages, self.begun = (self.begun + received).split(b"\n")
        return messages if received else None


class PeerWatch:
    """Watches the other processes of this run, until `close`. Every process must make one at the same time.

    Args:
        minutes: How long a process may be silent, or keep others waiting, before it counts as hanging.
        phase: Names the phase of the run. A thread calls it.
    """

    def __init__(self, minutes: float, phase: Callable[[], str]):
        self.minutes = minutes
        self.phase = phase
        self._this = Rank.this_one()
        self._peers = connect()
        self._late: dict[tuple[int, int], float] = {}  # rank and its operations → since when others wait for the next
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def close(self, *, failed: bool = False) -> None:
        """Stop watching; the others no longer expect this process, or end if it has failed."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        for peer in self._peers:
            peer.send(FAILURE if failed else FAREWELL)
            peer.connection.close()

    def settle(self) -> None:
        """Give the thread time to notice a lost process, of which an error of this one may be a consequence."""
        self._closed.wait(2 * SECONDS_BETWEEN)

    @property
    def _patience(self) -> float:
        """Seconds after which a process hangs."""
        return 60 * self.minutes - min(SECONDS_AHEAD, 6 * self.minutes)

    def _watch(self) -> None:
        beaten = 0.0
        while not self._closed.is_set() and self._peers:
            by_connection = {peer.connection: peer for peer in self._peers}
            readable, _, _ = select.select(list(by_connection), [], [], SECONDS_BETWEEN / 4)
            now = time.monotonic()
            for peer in (by_connection[connection] for connection in readable):
                self._hear(peer, peer.read(), now)
            for peer in self._peers:
                if now - peer.heard > self._patience:
                    self._end(
                        peer.rank, f"has not responded for {amount(self.minutes, 'minutes')} and is killed", hangs=True
                    )
            if now - beaten >= SECONDS_BETWEEN:
                beaten = now
                self._beat()
                if self._this.number == 0:  # which hears all of them
                    self._end_late(now)

    def _beat(self) -> None:
        report = Report(joined_operations(), f"{self.phase()}, {line_of_main_thread()}")
        said = b"" if report == self._this.report else json.dumps([report.joined, report.doing]).encode()
        self._this.report = report
        for peer in self._peers:
            peer.send(BEAT + said)

    def _hear(self, peer: Peer, messages: list[bytes] | None, now: float) -> None:
        if messages is None:
            self._end(peer.rank, "has died")
            return
        peer.heard = now
        for message in messages:
            kind, said = message[:1], message[1:]
            if kind == BEAT and said:
                peer.rank.report = Report(*json.loads(said))
            elif kind == FAREWELL:
                self._peers = [each for each in self._peers if each is not peer]
            elif kind == FAILURE and peer.rank.number == 0:  # which has said why
                leave("")
            elif kind == FAILURE:
                self._end(peer.rank, "has ended with an error")

    def _end_late(self, now: float) -> None:
        """End a process that lives, and that others have been waiting for too long."""
        ranks = [self._this, *(peer.rank for peer in self._peers if now - peer.heard < 5 * SECONDS_BETWEEN)]
        most = max(rank.report.joined for rank in ranks)
        late = {(rank.number, rank.report.joined): rank for rank in ranks if rank.report.joined < most}
        self._late = {key: self._late.get(key, now) for key in late}
        for key, rank in late.items():
            if now - self._late[key] > self._patience:
                how = f"has kept the others waiting for {amount(self.minutes, 'minutes')} and is killed"
                self._end(rank, how, hangs=True)

    def _end(self, lost: Rank, how: str, *, hangs: bool = False) -> None:
        """End this process, a hanging one of this machine, and the others."""
        if self._closed.is_set():
            return
        process = lost.process
        if hangs and lost is not self._this and process.host == self._this.process.host:
            with suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        for each in self._peers:
            each.send(FAILURE)
        speaks = lost is self._this or self._this.number == (1 if lost.number == 0 else 0)
        last = f" It was last in: {lost.report.doing}." if lost.report.doing else ""
        text = (
            f"error: process {lost.number} (id {process.pid} on {process.host}) {how}, and the run ends in all "
            f"processes.{last} Look at its output, then resume with the same command.\n"
        )
        leave(text if speaks else "")


def leave(text: str) -> None:
    """End this process at once: its main thread may wait for a process that is gone."""
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


def line_of_main_thread() -> str:
    """The line that the main thread executes, of this package or of the user's: rewards.py:3 in reward."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE) or not path.startswith(("<", *LIBRARIES)):
            return f"{relative(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "code of other packages"


def connect() -> list[Peer]:
    """Connect rank 0 with every other rank.

    Raises:
        OSError: a process cannot be reached.
        UserError: a process does not connect.
    """
    address = os.environ["MASTER_ADDR"]
    with socket.create_server(("localhost" if address in ("localhost", "127.0.0.1") else "", 0)) as server:
        offer = [(server.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(offer, src=0, group=waiting_group())
        port, token = offer[0]
        if dist.get_rank() == 0:
            server.settimeout(SECONDS_TO_CONNECT)
            return accept(server, token, dist.get_world_size() - 1)
    connection = socket.create_connection((address, port), SECONDS_TO_CONNECT)
    return [greet(connection, token)]


def accept(server: socket.socket, token: str, count: int) -> list[Peer]:
    """Accept connections of processes that know the token.

    Raises:
        UserError: some do not connect; the message names their ranks.
    """
    peers: list[Peer] = []
    while len(peers) < count:
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            missing = sorted({*range(1, count + 1)} - {peer.rank.number for peer in peers})
            raise UserError(
                f"process {', '.join(map(str, missing))} has not connected within {SECONDS_TO_CONNECT:g} seconds. Look "
                "at its output, then start again."
            ) from error
        connection.settimeout(SECONDS_TO_CONNECT)
        with suppress(OSError, ValueError):
            peers.append(greet(connection, token))
    return peers


def greet(connection: socket.socket, token: str) -> Peer:
    """Exchange ranks, hosts and process ids.

    Raises:
        OSError: the other side does not answer.
        ValueError: it does not know the token.
    """
    said = {"token": token, "rank": dist.get_rank(), "process": asdict(Process.this_one())}
    connection.sendall(json.dumps(said).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows belongs to the watch
        byte = connection.recv(1)
        if not byte or len(line) > 1000:
            raise ConnectionError("closed")
        line += byte
    theirs = json.loads(line)
    if not secrets.compare_digest(theirs["token"], token):
        raise ValueError("another token")
    return Peer(Rank(theirs["rank"], Process(**theirs["process"])), connection, time.monotonic())
