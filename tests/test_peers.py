"""The connections by which processes watch each other."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from lit_align import peers
from lit_align.peers import BEAT, FAILURE, FAREWELL, Peer, PeerWatch, Rank
from lit_align.running import Process

# `leave` ends the process, and here the thread
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
HOST = socket.gethostname()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of collective operations that rank 0 has joined."""
    counted = [3]
    monkeypatch.setattr(peers, "joined_operations", lambda: counted[0])
    return counted


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, joined: list[int]):
    """Rank 0 with one peer on this machine, the peer's end of the connection, and what ends the process."""
    ended: list[str | int] = []
    done = threading.Event()

    def leave(text: str) -> None:
        ended.append(text)
        done.set()
        raise SystemExit  # of the thread

    ours, theirs = socket.socketpair()
    peer = Peer(Rank(1, Process(HOST, 7777, "")), ours, time.monotonic())
    monkeypatch.setattr(peers.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(peers, "connect", lambda: [peer])
    monkeypatch.setattr(peers, "leave", leave)
    monkeypatch.setattr(peers.os, "kill", lambda pid, signum: ended.extend([pid, signum]))
    watch = PeerWatch(minutes=1 / 60, phase=lambda: "score")
    yield theirs, ended, done
    watch.close()
    theirs.close()


@contextmanager
def living(connection: socket.socket, joined: list[int]) -> Iterator[None]:
    """A peer that beats, with the number of collective operations that it has joined."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            with suppress(OSError):
                connection.send(BEAT + json.dumps([joined[0], "score, rewards.py:3 in reward"]).encode() + b"\n")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_silent_process_is_ended_and_named(watched):
    theirs, ended, done = watched
    assert done.wait(10)
    pid, signum, text = ended
    assert (pid, signum) == (7777, signal.SIGKILL)
    assert f"error: process 1 (id 7777 on {HOST}) has not responded for 0.0166667 minutes" in text
    assert theirs.recv(1000).endswith(FAILURE + b"\n")


@pytest.mark.parametrize(("message", "how"), [(FAILURE, "has ended with an error"), (b"", "has died")])
def test_a_failed_and_a_dead_process_are_told_apart(watched, message, how):
    theirs, ended, done = watched
    theirs.send(message + b"\n") if message else theirs.close()
    assert done.wait(10)
    (text,) = ended
    assert f"{how}, and the run ends in all processes." in text


def test_a_process_that_says_farewell_is_not_missed(watched):
    theirs, ended, done = watched
    theirs.send(FAREWELL + b"\n")
    theirs.close()
    assert not done.wait(1.5)
    assert not ended


@pytest.mark.parametrize("number", [2, 3, 4], ids=["fewer", "as many", "more"])
def test_the_process_that_keeps_others_waiting_is_ended_and_named(watched, number):
    """It lives, but has joined fewer collective operations; rank 0 may be that one itself."""
    theirs, ended, done = watched
    with living(theirs, [number]):
        assert done.wait(10 if number != 3 else 2) == (number != 3)
    if number == 2:
        assert ended[:2] == [7777, signal.SIGKILL]
        assert f"error: process 1 (id 7777 on {HOST}) has kept the others waiting for 0.0166667 minutes" in ended[2]
        assert "It was last in: score, rewards.py:3 in reward. Look at its output" in ended[2]
    if number == 4:
        (text,) = ended
        assert f"error: process 0 (id {peers.os.getpid()} on {HOST}) has kept the others waiting" in text
        assert "It was last in: score, tests/test_peers.py:" in text


def test_a_process_that_catches_up_is_not_ended(watched, joined):
    theirs, ended, done = watched
    other = [2]
    with living(theirs, other):
        for _ in range(5):
            joined[0], other[0] = other[0] + 1, joined[0] + 1  # now the one is late, and now the other
            assert not done.wait(0.5)
    assert not ended
