"""What only this project has: a newer deployment that takes over (cold, warm, in-process), and what it writes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
from harness import World, until
from servers import Postgres

from bench import floors
from bench.compare import Track
from bench.systems import CHILD


def deployments(folder: Path, url: str, n: int, *, warm: bool) -> list[float]:
    """Seconds in which nobody works, at each of ``n`` deployments."""
    gate = ("--gate", "fd") if warm else ()
    options = ("--warm",) if warm else ()
    world = World(folder, url)
    child = (*CHILD, str(world.witness), *gate)
    gaps = []
    try:
        world.run("--deployment", "v0", "--probation", "0", *options, bot=child, ttl="10")
        world.works(1)
        for rep in range(1, n + 1):
            world.run("--deployment", f"v{rep}", "--probation", "0", *options, bot=child, ttl="10")
            world.works(rep + 1, limit=30)
            time.sleep(0.05)
            spans = sorted(world.stamps().values())
            gaps.append(spans[-1][0] - spans[-2][1])
            world.runs[-2].signal(15)
            world.runs[-2].wait()
        assert world.overlap() == 0
    finally:
        world.close()
    return gaps


INSIDE = """
import asyncio, os, sys, time, botlease
async def main():
    async with botlease.active("inside", deployment="v1", ttl=10) as term:
        out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        def stamp():
            os.write(out, f"{os.getpid()} 0 {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\\n".encode())
        try:
            while True:
                stamp()
                await asyncio.sleep(0.002)
        finally:
            stamp()
asyncio.run(main())
"""


def inside(folder: Path, url: str, n: int) -> list[float]:
    """In-process: the one that has it is stopped, the next one waits. Nothing is started in the gap."""
    track = Track(folder / "inside.txt")
    env = {k: v for k, v in os.environ.items() if not k.startswith("BOTLEASE")} | {"BOTLEASE_DATABASE_URL": url}
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with (folder / "inside.log").open("ab") as log:
            running.append(
                subprocess.Popen([sys.executable, "-c", INSIDE, str(track.path)], env=env, stdout=log, stderr=log)
            )

    gaps = []
    try:
        start()
        until(lambda: len(track.read()) >= 1, 20)
        for rep in range(n):
            start()
            time.sleep(0.8)
            running[-2].terminate()
            until(lambda rep=rep: len(track.read()) >= rep + 2, 20)
            running[-2].wait()
            time.sleep(0.02)
            spans = sorted(track.read().values())
            gaps.append(spans[-1][0] - spans[-2][1])
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return gaps


async def _ask(url: str, sql: str) -> Any:
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(sql)
    await connection.close()
    return row


COUNTERS = """
SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS wal, txid_snapshot_xmax(txid_current_snapshot()) AS xid,
  (SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()) AS statements,
  (SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases') AS updates,
  (SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases') AS hot,
  (SELECT beat FROM bot_leases LIMIT 1) AS beat
"""


def writes(folder: Path, url: str, seconds: float) -> dict[str, dict[str, float]]:
    """What a holder alone, and a holder with a standby, cost the database: per second and per hour."""
    out: dict[str, dict[str, float]] = {}
    world = World(folder, url)
    try:
        world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("active")
        for name in ("holder", "holder and standby"):
            if name != "holder":
                world.run("--deployment", "v1", bot=("sleep", "100000"), ttl="10").says("standby")
            time.sleep(3.0)  # the statistics are written a second late
            before, began = asyncio.run(_ask(url, COUNTERS)), time.monotonic()
            time.sleep(seconds)
            after, span = asyncio.run(_ask(url, COUNTERS)), time.monotonic() - began
            renewals = after["updates"] - before["updates"]
            out[name] = {
                "statements": (after["statements"] - before["statements"] - 4) / span,  # 4: our own connection
                "wal": float(after["wal"] - before["wal"]) / max(1, renewals),
                "xids": (after["xid"] - before["xid"]) / span * 3600,
                "hot": (after["hot"] - before["hot"]) / max(1, renewals),
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
        out[f"in-process, {kind}"] = gaps = inside(*place(kind), n)
        say(f"in-process, {kind}: {floors.ms(gaps)}")
    out["PostgreSQL writes"] = writes(*place("PostgreSQL"), seconds)
    say(f"PostgreSQL: {out['PostgreSQL writes']}")
    out["SQLite commits"] = sqlite_writes(place("SQLite")[0], seconds)
    say(f"SQLite: {out['SQLite commits']:.2f} commits/s of holder and standby")
    out["advisory lock"] = asyncio.run(advisory(postgres.url(), n * 3))
    say(f"floor: a bare advisory lock: {floors.ms(out['advisory lock'])}")
    return out


async def _create(url: str, name: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()


async def advisory(url: str, n: int) -> list[float]:
    """The floor of a networked hand-over: an advisory lock is let go here, and had there."""
    a, b = await asyncpg.connect(url), await asyncpg.connect(url)
    out = []
    for _ in range(n):
        await a.execute("SELECT pg_advisory_lock(4711)")
        waiting = asyncio.ensure_future(b.execute("SELECT pg_advisory_lock(4711)"))
        await asyncio.sleep(0.02)
        began = time.perf_counter()
        await a.execute("SELECT pg_advisory_unlock(4711)")
        await waiting
        out.append(time.perf_counter() - began)
        await b.execute("SELECT pg_advisory_unlock(4711)")
    await a.close()
    await b.close()
    return out
