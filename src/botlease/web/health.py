"""Health over HTTP: four answers.

* ``/livez``   200 while the process turns
* ``/readyz``  200 when it could take its turn: also as a standby. Readiness never depends on the lease, or a
  rolling deployment waits for ever for the one that waits for it
* ``/leader``  200 for the holder alone
* ``/health``  like readyz, but within the platform's window it waits for the handover and the probation: there the
  old container is stopped as soon as this one says 200. By then it should have let go, and not be needed any more

A deployment in quarantine is not ready: the platform had better keep the one it has.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from botlease import http

PATHS = ("/health", "/livez", "/readyz", "/leader")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is true now, for these four answers."""

    phase: str  # booting, standby, passive, active, ...
    ready: bool  # registered, and the database answers
    leading: bool
    waiting_for: float  # seconds since start for which a holder has not let go, or a probation goes on; 0: neither
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
    async def handle(request: http.Request) -> http.Response:
        found = answer(request.target.split("?")[0], snapshot(), window)
        status, body = found or (404, {"error": f"not found; there are {', '.join(PATHS)}"})
        if found and request.method not in ("GET", "HEAD"):
            status, body = 405, {"error": "use GET"}
        return http.Response(status, json.dumps(body).encode() + b"\n", headers=(("cache-control", "no-store"),))

    return await http.serve(handle, port, host=host)
