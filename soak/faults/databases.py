"""The database: killed, stopped, failed over, locked, its clock, and what becomes of its file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys

import asyncpg
from servers import set_clock

from botlease import clock
from soak.faults.scene import NOT_DONE, Scene, fault, postgres, sqlite


@fault(postgres)
async def kill_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    await asyncio.to_thread(db.signal, signal.SIGKILL)
    await s.wait()
    await asyncio.to_thread(db.start)


@fault(postgres)
async def stop_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    db.signal(signal.SIGSTOP)
    await s.wait()
    db.signal(signal.SIGCONT)


@fault(postgres)
async def restart_database(s: Scene) -> None:
    db = s.world.primary
    assert db is not None
    await asyncio.to_thread(db.shut_down)
    await asyncio.to_thread(db.start)


@fault(postgres)
async def fail_over(s: Scene) -> None:
    """The replica is promoted without the last commits of the primary, which is dead by then."""
    w = s.world
    old = w.primary
    assert old is not None
    s.harms("lost")
    new = await asyncio.to_thread(w.new_replica)
    for pid in old.processes("walsender"):
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(s.rng.choice((0.0, 0.3, 1.0, 2.0, 4.0)) * w.ttl)
    await asyncio.to_thread(old.signal, signal.SIGKILL)
    await asyncio.sleep(s.rng.choice((0.0, 0.3, 1.5)) * w.ttl)
    await asyncio.to_thread(new.promote)
    w.point_at(new)
    await asyncio.to_thread(old.stop)


@fault(postgres)
async def ask_a_standby_database(s: Scene) -> None:
    """One host is led to a replica that nobody promoted: by a stale name, by a load balancer."""
    host, standby = s.host(), await asyncio.to_thread(s.world.new_replica)
    assert host.proxy is not None
    there, host.proxy.target = host.proxy.target, standby.port
    host.proxy.reset()
    await s.wait()
    host.proxy.target = there
    host.proxy.reset()
    await asyncio.to_thread(standby.stop)


@fault(postgres)
async def make_the_database_read_only(s: Scene) -> bool:
    """As hosts do when the disk is nearly full, or in a switch-over."""
    ours = "SET default_transaction_read_only = off"
    made = await s.sql(ours, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    await s.wait()
    for _ in range(20):
        done = await s.sql(ours, "ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
        if done:
            break
        await asyncio.sleep(0.2)
    return made is not None


@fault(lambda w: postgres(w) and w.library is not None)
async def step_the_databases_clock(s: Scene) -> None:
    sign = s.rng.choice((-1, 1))
    s.harms("clock")
    step = sign * s.rng.choice((1, 5, 60, 3600, 86_400))
    s.world.step_clock(step)
    await s.wait()
    rows = await s.sql(f"SELECT extract(epoch FROM clock_timestamp())::float8 - {clock.wall()}")
    if rows and abs(step) > 30 and abs(float(str(rows[0][0])) - step) > 20:
        raise AssertionError(f"the database's clock is off by {rows[0][0]} s, and was to be by {step}")


@fault(lambda w: postgres(w) and w.library is not None)
async def drift_the_databases_clock(s: Scene) -> None:
    """It runs a tenth too fast or too slow, and as each of its processes counts from its start, they differ as well."""
    s.harms("clock")
    s.world.step_clock(0, s.rng.choice((0.9, 1.1)))
    await s.wait()
    s.world.step_clock(0)


@fault(lambda w: w.library is not None)
async def step_a_supervisors_clock(s: Scene) -> bool:
    stepped = [d for d in s.world.deployments if d.traits.fake_time]
    for d in stepped:
        set_clock(d.clock, s.rng.choice((-1, 1)) * s.rng.choice((1, 5, 60, 3600, 86_400)))
    await s.wait()
    return bool(stepped)


@fault(postgres)
async def lock_the_tables(s: Scene) -> bool:
    """A migration, a VACUUM FULL: nothing can be read or written."""
    done = False
    with contextlib.suppress(*NOT_DONE):
        c = await asyncpg.connect(s.world.direct, timeout=3)
        try:
            await c.execute("BEGIN; SET LOCAL lock_timeout = '2s'; LOCK TABLE bot_leases, bot_instances")
            done = True
            await s.wait()
        finally:
            await c.close(timeout=2)
    return done


@fault(postgres)
async def end_sessions(s: Scene) -> bool:
    return bool(
        await s.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'botlease%'")
    )


LOCKER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
db.execute("BEGIN EXCLUSIVE")
print(flush=True)
time.sleep(60)
"""


@fault(sqlite)
async def lock_the_file(s: Scene) -> None:
    """A writer that is stopped inside its transaction."""
    command = [sys.executable, "-S", "-c", LOCKER, str(s.world.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as locker:
        try:
            assert locker.stdout is not None
            await asyncio.to_thread(locker.stdout.readline)
            locker.send_signal(signal.SIGSTOP)
            await s.wait()
        finally:  # stopped, nobody else would end it
            locker.kill()


@fault(sqlite)
async def delete_the_file(s: Scene) -> None:
    s.harms("emptied")
    s.world.file.unlink(missing_ok=True)
    if s.rng.random() < 0.3:
        s.world.file.touch(0o600)
    await s.wait()


@fault(sqlite)
async def rename_the_file(s: Scene) -> None:
    away = s.world.file.with_suffix(".away")
    s.harms("lost")
    with contextlib.suppress(OSError):
        s.world.file.rename(away)
        await s.wait()
        away.rename(s.world.file)


@fault(sqlite)
async def restore_an_older_file(s: Scene) -> None:
    """A backup is copied over it, or takes its place."""
    backup = s.world.file.with_suffix(".backup")
    s.harms("lost")
    with contextlib.suppress(OSError):
        shutil.copy(s.world.file, backup)
        await s.wait()
        if s.rng.random() < 0.2:
            shutil.copyfile(backup, s.world.file)  # under whoever has it open: it may be damaged by that
        else:
            backup.replace(s.world.file)
