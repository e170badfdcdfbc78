"""How many leases one PostgreSQL server carries, what a bot more costs, and what many bots in one program cost."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
from servers import Postgres, postgres_bindir

from botlease.model import Held
from botlease.stores import Registration
from botlease.stores.postgres import PostgresStore
from botlease.stores.postgressql import RENEW, RENEW_AND_TOUCH
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
POOLED = "as many as it can, planned each time, as behind a pooler"
BARE = "UPDATE floor SET n = n + 1 WHERE id = :n"
"""What a renewal cannot be cheaper than: a row of one number, found by its key."""


VALUES = {"$1": "'b' || :n", "$2": "'i' || :n", "$3": "1", "$4": "'x'", "$6": "beat + 1", "$7": "'active'"}


def renewals() -> tuple[str, ...]:
    """Five, as the store sends them in a ttl: the fifth is the heartbeat of the instance as well."""

    def script(sql: str) -> str:
        sql = re.sub(r"\s+", " ", re.sub(r"--.*", "", sql))
        sql = sql.replace("{timeline}", "left(pg_walfile_name(pg_current_wal_lsn()), 8)")
        for parameter, value in VALUES.items():
            sql = sql.replace(parameter, value)
        return sql.replace("ANY($5::bigint[])", "ANY(ARRAY[bot_leases.beat])").replace(
            "beat + 1", "bot_leases.beat + 1", 1
        )

    return (script(RENEW),) * 4 + (script(RENEW_AND_TOUCH),)


def holders(
    postgres: Postgres, url: str, rate: int, seconds: int, scripts: Sequence[str], how: str = "prepared"
) -> dict[str, float]:
    """``rate`` statements a second from 64 connections (pgbench), each of ``scripts`` equally often, or as many as it
    can (0): what the server took for them, and by how much it fell behind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        files = []
        for script in sorted({*scripts}):
            path = Path(folder) / f"{len(files)}.sql"
            path.write_text(f"\\set n random(1, 5000)\n{script};\n")
            files += ["-f", f"{path}@{scripts.count(script)}"]
        before, began = used(postgres), time.monotonic()
        done = subprocess.run(
            [
                *(str(postgres_bindir() / "pgbench"), "-n", "-M", how, *files, "-c", "64", "-j", "2"),
                *(("-R", str(rate)) if rate else ()),
                *("-T", str(seconds), url),
            ],
            # as the store has it: else the server may go on planning anew what it takes for cheaper so
            env=os.environ | ({"PGOPTIONS": "-c plan_cache_mode=force_generic_plan"} if how == "prepared" else {}),
            capture_output=True,
            text=True,
        )
        span = time.monotonic() - began
        after = used(postgres)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    # Of all: what it says of each script stands behind that.
    found = {k: float(v) for k, v in reversed(re.findall(r"(tps|latency average) = ([\d.]+)", done.stdout))}
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
    seconds = 5 if quick else 60  # a vacuum comes each 10 s where so much is written
    asyncio.run(_by_itself(url, on=True))
    try:
        for what, rate, scripts, how in (
            ("5,000 holders, ttl 10 s", 2500, renewals(), "prepared"),
            ("5,000 holders, ttl 3 s", 8333, renewals(), "prepared"),
            (MOST, 0, renewals(), "prepared"),
            (POOLED, 0, renewals(), "extended"),
            (FLOOR, 0, (BARE,), "prepared"),
        ):
            out[what] = found = holders(postgres, url, rate, seconds, scripts, how)
            say(f"{what}: {found}")
    finally:
        asyncio.run(_by_itself(url, on=False))
    return out


async def _by_itself(url: str, *, on: bool) -> None:
    """Vacuum and checkpoints as a server has them that nobody measures, but for the vacuum's naptime of a minute: of
    hours of such a load it would come as often as of one."""
    connection = await asyncpg.connect(url)
    for name, value in {"autovacuum": "on", "checkpoint_timeout": "'5min'", "autovacuum_naptime": "'10s'"}.items():
        off = {"autovacuum": "off", "checkpoint_timeout": "'1h'", "autovacuum_naptime": "'1min'"}[name]
        await connection.execute(f"ALTER SYSTEM SET {name} = {value if on else off}")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


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
