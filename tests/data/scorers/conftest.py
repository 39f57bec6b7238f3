"""A server for each test of a judge."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from judge_server import Server


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[..., Any]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[..., Any]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
