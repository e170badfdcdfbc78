"""The four health answers, and the HTTP server below them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from botlease.web.health import Snapshot, answer, serve

BOOTING = Snapshot("booting", ready=False, leading=False, waiting_for=0.0)
STANDBY = Snapshot("standby", ready=True, leading=False, waiting_for=5.0)
PASSIVE = Snapshot("passive", ready=True, leading=False, waiting_for=0.0)
ACTIVE = Snapshot("active", ready=True, leading=True, waiting_for=0.0, term=3)
STOPPING = Snapshot("draining", ready=True, leading=False, waiting_for=0.0, stopping=True)


@pytest.mark.parametrize(
    ("snapshot", "window", "health", "ready", "leader"),
    [
        (BOOTING, 0, 503, 503, 503),
        (STANDBY, 0, 200, 200, 503),
        (STANDBY, 120, 503, 200, 503),  # within Railway's window it waits for the handover
        (Snapshot("standby", True, False, 130.0), 120, 200, 200, 503),  # but not for ever
        (PASSIVE, 120, 200, 200, 503),
        (ACTIVE, 120, 200, 200, 200),
        (STOPPING, 120, 200, 200, 503),
    ],
)
def test_what_each_state_answers(snapshot: Snapshot, window: float, health: int, ready: int, leader: int) -> None:
    found = {
        path: (answer(path, snapshot, window) or (0, {}))[0] for path in ("/health", "/readyz", "/leader", "/livez")
    }
    assert found == {"/health": health, "/readyz": ready, "/leader": leader, "/livez": 200}
    assert answer("/", snapshot, window) is None


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await serve(lambda: ACTIVE, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def talk(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    out = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return out


async def test_it_speaks_http(port: int) -> None:
    out = await talk(port, b"GET /leader HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, body = out.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and json.loads(body) == {"state": "active", "term": 3}
    assert (await talk(port, b"POST /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(
        b"HTTP/1.1 405"
    )
    assert (await talk(port, b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 404")
    assert b"term" not in await talk(port, b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


async def test_two_requests_on_one_connection_are_both_answered(port: int) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    out = await talk(port, one + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert out.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n", b""])
async def test_junk_ends_the_connection_and_nothing_else(port: int, junk: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(junk)
    writer.write_eof()
    try:
        assert b"200" not in await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        pass
    writer.close()
    assert b"200" in await talk(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
