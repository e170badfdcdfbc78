"""Ten thousand bots in one program over four processes: what they cost, and what happens when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import until
from servers import Postgres
from test_fleet import Members, add, boot, names, placed, verify

from bench import check, floors
from bench.capacity import used as server_used
from bench.counted import Counted

BOTS, TTL = 10_000, 10.0


def once(folder: Path, postgres: Postgres, url: str, seconds: float, wrap: tuple[str, ...]) -> dict[str, float]:
    folder.mkdir()
    m = Members(folder, url)
    out: dict[str, float] = {}
    try:
        began = time.monotonic()
        asyncio.run(add(url, *names(BOTS)))
        out["add"] = time.monotonic() - began
        began = time.monotonic()
        for _ in range(4):
            m.start("v1", *wrap, ttl=TTL)
        m.settled(BOTS, {0, 1, 2, 3}, 120)
        out["start"] = time.monotonic() - began
        until(lambda: placed(url, BOTS, 4) or time.sleep(0.3), 120)
        before = m.settled(BOTS, {0, 1, 2, 3}, 20)
        members = [run.children()[0] if wrap else run.pid for run in m.runs]
        out |= _cost(postgres, url, members, seconds)
        victim = m.runs[1]
        if wrap:
            os.kill(members[1], signal.SIGKILL)
        killed = boot()
        m.kill(victim)
        after = m.settled(BOTS, {0, 2, 3}, 120)
        spans = m.spans()
        out["again"] = max(begin for s in spans.values() for begin, _, _, _ in s) - killed
        out["bound"] = check.elsewhere(TTL, 1.0)
        out["moved"] = sum(after[bot] != before[bot] for bot in before if before[bot] != 1)
        m.assert_at_most_one()
        out["overlap"] = 0.0  # else it has just been raised
        verify(url)
    finally:
        with contextlib.suppress(OSError):
            m.close()
    return out


def _cost(postgres: Postgres, url: str, members: list[int], seconds: float) -> dict[str, float]:
    """Of a member in the mean, CPU seconds an hour and MB; of the server, in a second."""
    counted = Counted(url)
    time.sleep(7)  # three renewals: the first write of each page after a checkpoint is a whole one
    counted.start()
    used, server, at = floors.cpu(members), server_used(postgres), boot()
    time.sleep(seconds)
    span = boot() - at
    out = {
        "cpu": (floors.cpu(members) - used) / span / len(members) * 3600,
        "cores": (server_used(postgres) - server) / span,
        "pss": floors.pss(members) / len(members),
    }
    return out | {k: v / 3600 for k, v in counted.stop().items()}


def growth(folder: Path, postgres: Postgres, url: str, seconds: float) -> dict[int, dict[str, float]]:
    """One process, and more and more bots."""
    folder.mkdir()
    m = Members(folder, url)
    out: dict[int, dict[str, float]] = {}
    try:
        m.start("v1", ttl=TTL)
        have = 0
        for size in (1, 100, 1000, 10_000):
            asyncio.run(add(url, *names(size)[have:]))
            have = size
            m.settled(size, {0}, 120)
            out[size] = _cost(postgres, url, [m.runs[0].pid], seconds)
    finally:
        with contextlib.suppress(OSError):
            m.close()
    return out


def measure(folder: Path, postgres: Postgres, say: Callable[[str], None], *, quick: bool) -> dict[str, Any]:
    import asyncpg

    async def create(name: str) -> None:
        connection = await asyncpg.connect(postgres.url())
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    out: dict[str, Any] = {}
    for name, wrap in (("same host", ()), ("another host", floors.namespace())):
        if name == "another host" and not wrap:
            continue
        database = name.replace(" ", "_")
        asyncio.run(create(database))
        out[name] = once(folder / database, postgres, postgres.url(database), 5 if quick else 30, wrap)
        say(f"fleet of {BOTS:,}, killed on {name}: {out[name]}")
    asyncio.run(create("one_process"))
    out["growth"] = growth(folder / "one", postgres, postgres.url("one_process"), 5 if quick else 30)
    say(f"one process: {out['growth']}")
    return out
