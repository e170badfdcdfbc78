"""How many leases one PostgreSQL server carries, what a bot more costs, and what many bots in one program cost."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg
from servers import Postgres, postgres_bindir

from botlease.model import Held
from botlease.stores import Registration
from botlease.stores.postgres import PostgresStore
from botlease.stores.postgressql import RENEW
from botlease.work.tree import descendants

FILL = """
INSERT INTO bot_instances (instance_id, started_at, last_heartbeat, is_active, bot, deployment, generation, state)
SELECT 'i' || n, now(), now(), TRUE, 'b' || n, 'v1', 1, 'active' FROM generate_series($1::int, $2::int) n;
"""
LEASES = """
INSERT INTO bot_leases (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at)
SELECT 'b' || n, 1, 0, 'x', 'i' || n, 10, 'o', 'p', 1, now() FROM generate_series($1::int, $2::int) n
"""


async def fill(url: str, first: int, last: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(FILL.strip().rstrip(";"), first, last)
    await connection.execute(LEASES, first, last)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def growth(url: str, sizes: tuple[int, ...], n: int) -> dict[int, dict[str, float]]:
    """Median seconds of a renewal and of a read, on one connection, with so many bots in the database."""
    store = PostgresStore(url)
    await store.open(10)
    out: dict[int, dict[str, float]] = {}
    have = 0
    for size in sizes:
        await fill(url, have + 1, size)
        have = size
        renewals, reads = [], []
        for beat in range(n):
            bot, who = f"b{1 + beat * 7 % size}", f"i{1 + beat * 7 % size}"
            view = await store.read(bot, who, 10)
            assert view.lease is not None
            began = time.perf_counter()
            assert await store.renew(bot, who, Held(1, "x", (view.lease.beat,)), view.lease.beat + 1, 10)
            renewals.append(time.perf_counter() - began)
            began = time.perf_counter()
            await store.read(bot, who, 10)
            reads.append(time.perf_counter() - began)
        out[size] = {"renewal": sorted(renewals)[n // 2], "read": sorted(reads)[n // 2]}
    await store.aclose()
    return out


def used(postgres: Postgres) -> float:
    """Seconds of processor time of the whole server: of those that live, and of those that have ended."""
    assert postgres.process is not None
    total = 0.0
    for pid in [postgres.process.pid, *descendants(postgres.process.pid)]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(f) for f in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return total


MOST, FLOOR = "as many as it can", "floor: a bare UPDATE of one number"
BARE = "UPDATE floor SET n = n + 1 WHERE id = :n"
"""What a renewal cannot be cheaper than: a row of one number, found by its key."""


def renewal() -> str:
    script = re.sub(r"\s+", " ", RENEW)
    script = script.replace("{timeline}", "left(pg_walfile_name(pg_current_wal_lsn()), 8)")
    for parameter, value in (("$1", "'b' || :n"), ("$2", "'i' || :n"), ("$3", "1"), ("$4", "'x'"), ("$6", "beat + 1")):
        script = script.replace(parameter, value)
    return script.replace("ANY($5::bigint[])", "ANY(ARRAY[beat])")


def holders(
    postgres: Postgres, url: str, rate: int, seconds: int, script: str, how: str = "prepared"
) -> dict[str, float]:
    """``rate`` statements a second from 64 connections (pgbench), or as many as it can (0): what the server took for
    them, and by how much it fell behind."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(f"\\set n random(1, 5000)\n{script};\n")
        file.flush()
        Path(file.name).chmod(0o644)
        before, began = used(postgres), time.monotonic()
        done = subprocess.run(
            [
                *(str(postgres_bindir() / "pgbench"), "-n", "-M", how, "-f", file.name, "-c", "64", "-j", "2"),
                *(("-R", str(rate)) if rate else ()),
                *("-T", str(seconds), url),
            ],
            capture_output=True,
            text=True,
        )
        span = time.monotonic() - began
        after = used(postgres)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    found = {k: float(v) for k, v in re.findall(r"(tps|latency average) = ([\d.]+)", done.stdout)}
    lag = re.search(r"schedule lag: avg ([\d.]+)", done.stdout)
    return {
        "rate": found["tps"],
        "latency": found.get("latency average", 0.0) / 1000,
        "lag": float(lag[1]) / 1000 if lag else 0.0,
        "cores": (after - before) / span,
    }


def measure(postgres: Postgres, say: Any, *, quick: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    url = postgres.url("capacity")
    asyncio.run(_prepare(postgres.url(), url))
    out["growth"] = asyncio.run(growth(url, (1, 100, 1000, 10_000), 100 if quick else 400))
    say(f"a bot more: {out['growth']}")
    seconds = 5 if quick else 20
    for what, rate, script, how in (
        ("5,000 holders, ttl 10 s", 2500, renewal(), "prepared"),
        ("5,000 holders, ttl 3 s", 8333, renewal(), "prepared"),
        (MOST, 0, renewal(), "prepared"),
        ("as many as it can, planned each time, as behind a pooler", 0, renewal(), "extended"),
        (FLOOR, 0, BARE, "prepared"),
    ):
        out[what] = found = holders(postgres, url, rate, seconds, script, how)
        say(f"{what}: {found}")
    return out


async def _prepare(admin: str, url: str) -> None:
    connection = await asyncpg.connect(admin)
    await connection.execute("CREATE DATABASE capacity")
    await connection.close()
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE floor (id int PRIMARY KEY, n int) WITH (fillfactor = 50);"
        "INSERT INTO floor SELECT n, 0 FROM generate_series(1, 5000) n"
    )
    await connection.close()
    store = PostgresStore(url)
    await store.open(10)
    await store.register(Registration("r", "r", "v1", "h", 1, "1", 10.0), 10)
    await store.aclose()
