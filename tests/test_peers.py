"""The connections by which processes watch each other."""

import signal
import socket
import threading

import pytest

from lit_align import peers
from lit_align.peers import FAILURE, FAREWELL, Peer, PeerWatch

# `leave` ends the process, and here the thread
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 with one peer on this machine, the peer's end of the connection, and what ends the process."""
    ended: list[str | int] = []
    done = threading.Event()

    def leave(text: str) -> None:
        ended.append(text)
        done.set()
        raise SystemExit  # of the thread

    ours, theirs = socket.socketpair()
    peer = Peer(1, socket.gethostname(), 7777, ours, peers.time.monotonic())
    monkeypatch.setattr(peers.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(peers, "connect", lambda: [peer])
    monkeypatch.setattr(peers, "leave", leave)
    monkeypatch.setattr(peers.os, "kill", lambda pid, signum: ended.extend([pid, signum]))
    watch = PeerWatch(minutes=1 / 60)
    yield theirs, ended, done
    watch.close()
    theirs.close()


def test_a_silent_process_is_ended_and_named(watched):
    theirs, ended, done = watched
    assert done.wait(10)
    pid, signum, text = ended
    assert (pid, signum) == (7777, signal.SIGKILL)
    assert f"error: process 1 (id 7777 on {socket.gethostname()}) has not responded for 0.0166667 minutes" in text
    assert theirs.recv(100).endswith(FAILURE)


@pytest.mark.parametrize(("message", "how"), [(FAILURE, "has ended with an error"), (b"", "has died")])
def test_a_failed_and_a_dead_process_are_told_apart(watched, message, how):
    theirs, ended, done = watched
    theirs.send(message) if message else theirs.close()
    assert done.wait(10)
    (text,) = ended
    assert f"{how}, and the run ends in all processes." in text


def test_a_process_that_says_farewell_is_not_missed(watched):
    theirs, ended, done = watched
    theirs.send(FAREWELL)
    theirs.close()
    assert not done.wait(1.5)
    assert not ended
