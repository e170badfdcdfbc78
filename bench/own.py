"""What only this project has: a newer deployment that takes over (cold, warm, in-process), and what it writes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
from harness import World
from servers import Postgres

from bench import floors
from bench.counted import Counted
from bench.lab import Track, boot, until
from bench.systems import CHILD


def deployments(folder: Path, url: str, n: int, *, warm: bool) -> list[float]:
    """Seconds in which nobody works, at each of ``n`` deployments."""
    gate = ("--gate", "fd") if warm else ()
    options = ("--warm",) if warm else ()
    world = World(folder, url)
    track = Track(world.witness)
    child = (*CHILD, str(world.witness), *gate)
    gaps = []
    try:
        world.run("--deployment", "v0", "--probation", "0", *options, bot=child, ttl="10")
        until(lambda: len(track.read()) >= 1, 30, "the first deployment")
        for rep in range(1, n + 1):
            world.run("--deployment", f"v{rep}", "--probation", "0", *options, bot=child, ttl="10")
            until(lambda rep=rep: len(track.read()) >= rep + 1, 30, f"deployment {rep}")  # type: ignore[misc]
            time.sleep(0.05)
            spans = sorted(track.read().values())
            gaps.append(spans[-1][0] - spans[-2][1])
            world.runs[-2].signal(15)
            world.runs[-2].wait()
        if track.overlap() > 0:
            raise AssertionError(f"overlap: {track.overlap()} s")
    finally:
        world.close()
    return gaps


async def _ask(url: str, sql: str) -> Any:
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(sql)
    await connection.close()
    return row


COUNTERS = """
SELECT (SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases') AS updates,
  (SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases') AS hot
"""


def _window(url: str, counted: Counted, seconds: float) -> dict[str, float]:
    before = asyncio.run(_ask(url, COUNTERS))
    counted.start()
    time.sleep(seconds)
    hours = counted.stop()  # a second later, when the statistics are written
    after = asyncio.run(_ask(url, COUNTERS))
    renewals = max(1, after["updates"] - before["updates"])
    return {
        "statements": hours["statements"] / 3600,
        "wal": hours["wal"] / 3600 * (boot() - counted.began) / renewals,
        "xids": hours["xids"],
        "hot": (after["hot"] - before["hot"]) / renewals,
    }


def writes(folder: Path, url: str, seconds: float) -> dict[str, dict[str, float]]:
    """What a holder alone, and a holder with a standby, cost the database: per second and per hour. Bytes are the
    median of windows of ten seconds, with one heartbeat in each: what the server does by itself is in few of them.
    Statements are those of all windows, as in one there are five renewals or six."""
    out: dict[str, dict[str, float]] = {}
    world = World(folder, url)
    try:
        world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("active")
        for name in ("holder", "holder and standby"):
            if name != "holder":
                world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("standby")
            counted = Counted(url)
            time.sleep(12.0)  # a heartbeat, and all renewals between two, have touched every page once
            windows = [_window(url, counted, 10.0) for _ in range(max(1, round(seconds / 10)))]
            out[name] = {
                what: median(w[what] for w in windows)
                if what == "wal"
                else sum(w[what] for w in windows) / len(windows)
                for what in windows[0]
            }
    finally:
        world.close()
    return out


def sqlite_writes(folder: Path, seconds: float) -> float:
    """Commits in a second of holder and standby together, from the file's change counter."""
    path = folder / "writes.db"
    world = World(folder, f"sqlite:///{path}")

    def counter() -> int:
        with path.open("rb") as f:
            f.seek(24)
            return int.from_bytes(f.read(4), "big")

    try:
        world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("active")
        world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("standby")
        time.sleep(1)
        before = counter()
        time.sleep(seconds)
        return (counter() - before) / seconds
    finally:
        world.close()


def measure(folder: Path, postgres: Postgres, say: Any, *, quick: bool) -> dict[str, Any]:
    n, seconds = (5, 10.0) if quick else (30, 60.0)
    out: dict[str, Any] = {}
    numbers = iter(range(100))

    def place(kind: str) -> tuple[Path, str]:
        number = next(numbers)
        where = folder / f"own{number}"
        where.mkdir()
        if kind == "SQLite":
            return where, f"sqlite:///{where}/lease.db"
        asyncio.run(_create(postgres.url(), f"own{number}"))
        return where, postgres.url(f"own{number}")

    for kind in ("SQLite", "PostgreSQL"):
        for name, warm in (("cold", False), ("warm", True)):
            out[f"new deployment, {name}, {kind}"] = gaps = deployments(*place(kind), n, warm=warm)
            say(f"new deployment, {name}, {kind}: {floors.ms(gaps)}, p99 {floors.p99(gaps) * 1000:.1f}")
    out["PostgreSQL writes"] = writes(*place("PostgreSQL"), seconds)
    say(f"PostgreSQL: {out['PostgreSQL writes']}")
    out["SQLite commits"] = sqlite_writes(place("SQLite")[0], seconds)
    say(f"SQLite: {out['SQLite commits']:.2f} commits/s of holder and standby")
    return out


async def _create(url: str, name: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
