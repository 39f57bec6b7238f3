"""Processes of a run watch each other: when one dies or hangs, all end, with one message that names its rank.

Rank 0 holds a connection to each other rank, and both ends send a byte every second. A connection that closes without
a farewell belongs to a process that has died. Silence for longer than the limit belongs to one that hangs, such as a
stopped one. A thread does this, since the main thread may wait in a collective operation that the lost process never
joins. An operation that the main thread of a living process never joins ends by the process group's own timeout.
"""

import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from lit_align.sharding import waiting_group

BEAT, FAREWELL, FAILURE = b".", b"-", b"!"
SECONDS_BETWEEN = 1.0
SECONDS_TO_CONNECT = 60.0


@dataclass
class Peer:
    """Another process, and the connection to it."""

    rank: int
    host: str
    pid: int
    connection: socket.socket
    heard: float  # when it last sent anything

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # one that has died is noticed when it is read from
            self.connection.send(message, socket.MSG_DONTWAIT)

    def read(self) -> bytes:
        """The message that it has sent; empty if it has died."""
        try:
            return self.connection.recv(4096)
        except OSError:
            return b""


class PeerWatch:
    """Watches the other processes of this run, until `close`. Every process must make one at the same time.

    Args:
        minutes: Silence after which a process counts as hanging.
    """

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.rank = dist.get_rank()
        self._peers = connect()
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

    def _watch(self) -> None:
        beaten = 0.0
        while not self._closed.is_set() and self._peers:
            by_connection = {peer.connection: peer for peer in self._peers}
            readable, _, _ = select.select(list(by_connection), [], [], SECONDS_BETWEEN / 4)
            now = time.monotonic()
            for peer in (by_connection[connection] for connection in readable):
                self._hear(peer, peer.read(), now)
            for peer in self._peers:
                if now - peer.heard > 60 * self.minutes:
                    self._end(peer, f"has not responded for {self.minutes:g} minutes and is ended", hangs=True)
            if now - beaten >= SECONDS_BETWEEN:
                beaten = now
                for peer in self._peers:
                    peer.send(BEAT)

    def _hear(self, peer: Peer, message: bytes, now: float) -> None:
        peer.heard = now
        if FAILURE in message and peer.rank == 0:  # which has said why
            leave("")
        elif FAILURE in message:
            self._end(peer, "has ended with an error")
        elif FAREWELL in message:
            self._peers = [each for each in self._peers if each is not peer]
        elif not message:
            self._end(peer, "has died")

    def _end(self, peer: Peer, how: str, *, hangs: bool = False) -> None:
        """End this process, a hanging one of this machine, and the others."""
        if self._closed.is_set():
            return
        if hangs and peer.host == socket.gethostname():
            with suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)
        for each in self._peers:
            each.send(FAILURE)
        speaks = self.rank == (1 if peer.rank == 0 else 0)
        text = (
            f"error: process {peer.rank} (id {peer.pid} on {peer.host}) {how}, and the run ends in all processes. "
            "Look at its output, then resume with the same command.\n"
        )
        leave(text if speaks else "")


def leave(text: str) -> None:
    """End this process at once: its main thread may wait for a process that is gone."""
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


def connect() -> list[Peer]:
    """Connect rank 0 with every other rank.

    Raises:
        OSError: a process cannot be reached.
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
    """Accept connections of processes that know the token."""
    peers: list[Peer] = []
    while len(peers) < count:
        connection, _ = server.accept()
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
    ours = {"token": token, "rank": dist.get_rank(), "host": socket.gethostname(), "pid": os.getpid()}
    connection.sendall(json.dumps(ours).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows belongs to the watch
        byte = connection.recv(1)
        if not byte or len(line) > 1000:
            raise ConnectionError("closed")
        line += byte
    theirs = json.loads(line)
    if not secrets.compare_digest(theirs["token"], token):
        raise ValueError("another token")
    return Peer(theirs["rank"], theirs["host"], theirs["pid"], connection, time.monotonic())
