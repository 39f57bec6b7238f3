"""Weights from one process to others: unchanged, one at a time, and with an end where a side fails."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lit_align.data.samplers.transfer import Sender, Transfer, receive

CPU = torch.device("cpu")


def weights() -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    yield "a", torch.randn(3, 4)
    yield "b", torch.randn(4, 3).bfloat16().T
    yield "c", torch.ones((), dtype=torch.float64)


def received(transfer: Transfer, rank: int) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in receive(transfer, rank, CPU)}


def test_each_receiver_gets_each_weight_unchanged():
    sender = Sender("127.0.0.1", 2, CPU)
    with ThreadPoolExecutor(2) as pool:
        receivers = [pool.submit(received, sender.transfer, rank) for rank in (1, 2)]
        sender.send(weights(), lambda: None)
        for receiver in receivers:
            result = receiver.result(20)
            assert result.keys() == {"a", "b", "c"}
            assert all(torch.equal(result[name], weight) for name, weight in weights())


def test_a_sender_that_fails_ends_the_receivers_call():
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(2)
        raise KeyError("b")

    sender = Sender("127.0.0.1", 1, CPU)
    with ThreadPoolExecutor(1) as pool:
        receiver = pool.submit(received, sender.transfer, 1)
        with pytest.raises(KeyError):
            sender.send(broken(), lambda: None)
        with pytest.raises(RuntimeError, match="the sender of the weights has failed"):
            receiver.result(20)


def test_a_receiver_that_never_joins_does_not_hold_the_sender():
    def check() -> None:
        raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError):
        Sender("127.0.0.1", 1, CPU).send(weights(), check)
