"""Health over HTTP: four answers, by h11, without a framework.

* ``/livez``   200 while the process turns
* ``/readyz``  200 when it could take its turn: also as a standby. Readiness never depends on the lease, or a
  rolling deployment waits for ever for the one that waits for it
* ``/leader``  200 for the holder alone
* ``/health``  like readyz, but within the platform's window it waits for the handover: there the old
  container is stopped as soon as this one says 200, and by then it should have let go
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11

PATHS = ("/health", "/livez", "/readyz", "/leader")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is true now, for these four answers."""

    phase: str  # booting, standby, passive, active, ...
    ready: bool  # registered, and the database answers
    leading: bool
    waiting_for: float  # seconds since start for which a living holder has not let go; 0: none
    stopping: bool = False
    term: int | None = None


def answer(path: str, s: Snapshot, window: float) -> tuple[int, dict[str, Any]] | None:
    body = {"state": s.phase, "term": s.term}
    match path:
        case "/livez":
            return 200, body
        case "/leader":
            return (200 if s.leading else 503), body
        case "/readyz":
            return (200 if s.ready or s.stopping else 503), body
        case "/health":
            waits = 0 < s.waiting_for < window
            return (200 if s.stopping or (s.ready and not waits) else 503), body
    return None


async def serve(
    snapshot: Callable[[], Snapshot], port: int, *, host: str | None = "127.0.0.1", window: float = 0.0
) -> asyncio.Server:
    """Listen on ``host`` (None: every address, as a platform's router needs it). Raises OSError if it cannot."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                await _one(reader, writer, snapshot, window)
        except (TimeoutError, OSError, h11.RemoteProtocolError):
            pass
        finally:
            writer.close()

    return await asyncio.start_server(connected, host, port, limit=16_384)


async def _one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, snapshot: Callable[[], Snapshot], window: float
) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16_384)
    request: h11.Request | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(4096)
            connection.receive_data(data)
            if not data and request is None:
                return
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or event is h11.PAUSED:
            break
    if request is None:
        return
    path = request.target.split(b"?")[0].decode("ascii", "replace")
    found = answer(path, snapshot(), window)
    status, body = found or (404, {"error": f"not found; there are {', '.join(PATHS)}"})
    if found and request.method not in (b"GET", b"HEAD"):
        status, body = 405, {"error": "use GET"}
    data = json.dumps(body).encode() + b"\n"
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(data))),
        ("cache-control", "no-store"),
        ("connection", "close"),
    ]
    out = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    if request.method != b"HEAD":
        out += connection.send(h11.Data(data=data)) or b""
    writer.write(out)
    await writer.drain()
