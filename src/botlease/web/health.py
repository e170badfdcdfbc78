"""Health over HTTP: four answers.

* ``/livez``   200 while the process turns
* ``/readyz``  200 when it could take its turn: also as a standby. Readiness never depends on the lease, or a
  rolling deployment waits for ever for the one that waits for it
* ``/leader``  200 for the holder alone
* ``/health``  like readyz, but within the platform's window it waits for the handover and the probation: there the
  old container is stopped as soon as this one says 200. By then it should have let go, and not be needed any more

A deployment in quarantine is not ready: the platform had better keep the one it has.

And ``/metrics`` for Prometheus. Behind the gateway both say for how many seconds the bot has been deaf.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botlease import http

PATHS = ("/health", "/livez", "/readyz", "/leader", "/metrics")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is true now, for these four answers."""

    phase: str  # booting, standby, passive, active, ...
    ready: bool  # registered, and the database answers
    leading: bool
    waiting_for: float  # seconds since start for which its turn has not come, or a probation goes on; 0: neither
    stopping: bool = False
    term: int | None = None
    bot: str = ""
    gateway: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the gateway says about each token, by its bot id; ``deaf`` in seconds."""


def answer(path: str, s: Snapshot, window: float) -> tuple[int, dict[str, Any]] | None:
    body: dict[str, Any] = {"state": s.phase, "term": s.term}
    if s.gateway:
        body["deaf"] = max(g["deaf"] for g in s.gateway.values())
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


PATIENCE = 10.0
"""Seconds for a request. The port may be open to everybody, and must not cost the bot its lease."""
CONNECTIONS = 32
"""At once. Each is a descriptor, of which a service may have no more than some hundred."""
METRICS = (
    ("deaf_seconds", "gauge", "deaf", "Seconds since the last getUpdates that succeeded, upstream and of the bot."),
    ("updates_waiting", "gauge", "waiting", "Updates in the inbox that have not been handed out."),
    ("updates_in_hand", "gauge", "in_hand", "Updates that were handed out and are not done."),
    ("updates_repeated_total", "counter", "repeated", "Updates handed out again since the bot was started."),
    ("updates_set_aside_total", "counter", "set_aside", "Updates given up since the bot was started."),
    ("conflicts_total", "counter", "conflicts", "409s although the lease is held: somebody else polls."),
    ("webhook_set", "gauge", "webhook", "1 if a webhook keeps the bot from polling."),
)


def metrics(s: Snapshot) -> str:
    """Prometheus' text form: labels without anything that would need escaping (names of bots have no quotes)."""
    lines: list[str] = []

    def say(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        lines.extend((f"# HELP botlease_{name} {text}", f"# TYPE botlease_{name} {kind}"))
        lines.extend(f"botlease_{name}{{{labels}}} {value:g}" for labels, value in values.items())

    us = f'bot="{s.bot}"'
    say("active", "gauge", "1 while this instance works.", {us: float(s.leading)})
    say("term", "gauge", "The term that is held, or 0.", {us: float(s.term or 0)})
    say("ready", "gauge", "1 if it could take its turn.", {us: float(s.ready)})
    if s.gateway:
        for name, kind, key, text in METRICS:
            say(f"gateway_{name}", kind, text, {f'{us},api="{api}"': _number(g[key]) for api, g in s.gateway.items()})
    return "\n".join(lines) + "\n"


def _number(value: Any) -> float:
    return float(bool(value)) if isinstance(value, str) else float(value)


async def serve(
    snapshot: Callable[[], Snapshot], port: int, *, host: str | None = "127.0.0.1", window: float = 0.0
) -> asyncio.Server:
    async def handle(request: http.Request) -> http.Response:
        path = request.target.split("?")[0]
        if path == "/metrics" and request.method in ("GET", "HEAD"):
            return http.Response(200, metrics(snapshot()).encode(), "text/plain; version=0.0.4; charset=utf-8")
        found = (405, {}) if path == "/metrics" else answer(path, snapshot(), window)
        status, body = found or (404, {"error": f"not found; there are {', '.join(PATHS)}"})
        if found and request.method not in ("GET", "HEAD"):
            status, body = 405, {"error": "use GET"}
        return http.Response(status, json.dumps(body).encode() + b"\n", headers=(("cache-control", "no-store"),))

    return await http.serve(handle, port, host=host, limit=4096, patience=PATIENCE, most=CONNECTIONS)
