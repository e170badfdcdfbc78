"""A mini-supervisor, so that libraries and programs are compared on the same work: holder.py PEER URL KEY TTL child...

It waits for the peer's lock, starts the child, ends it at SIGTERM and waits for it, and gives the lock back. Where the
library says that the lock was lost, the child is killed. Nothing is improved on: what a library leaves open stays
open. Runs in a Python of its own that has the peers and not botlease. ``--bare FILE``: no child; the moments of having
the lock and of giving it back are written to the file.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

peer, url, key, ttl = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
bare = sys.argv[5] == "--bare"
command = sys.argv[5:]

Release = Callable[[], Any]
stopping = threading.Event()
wake, woken = os.pipe()
os.set_blocking(woken, False)


class Lost:
    """Set by a thread of a library: the lock is not ours any more."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True
        os.write(woken, b"l")

    def clear(self) -> None:
        self.is_set = False


lost = Lost()


def advisory() -> Release:
    import psycopg

    connection = psycopg.connect(url, autocommit=True)
    connection.execute("SELECT pg_advisory_lock(hashtext(%s))", (key,))

    def ask() -> None:  # the server ends a session that says nothing for a second (idle_session_timeout)
        while not stopping.wait(0.3):
            try:
                connection.execute("SELECT 1")
            except psycopg.Error:
                lost.set()
                return

    if peer == "pg-advisory-fast":
        threading.Thread(target=ask, daemon=True).start()
    return lambda: connection.execute("SELECT pg_advisory_unlock(hashtext(%s))", (key,))


def filelock() -> Release:
    from filelock import FileLock

    lock = FileLock(url)
    if peer == "filelock-fast":
        lock.acquire(poll_interval=0.005)
    else:
        lock.acquire()
    return lock.release


def sqlalchemy_dlock() -> Release:
    from sqlalchemy import create_engine
    from sqlalchemy_dlock import create_sadlock

    connection = create_engine(url.replace("postgresql://", "postgresql+psycopg://")).connect()
    lock = create_sadlock(connection, key)
    lock.acquire()
    return lock.release


def pals() -> Release:
    import pals as library

    locker = library.Locker("bench", url.replace("postgresql://", "postgresql+psycopg://"))
    lock = locker.lock(key, acquire_timeout=3_600_000)
    if not lock.acquire():
        raise SystemExit("pals gave up")
    return lock.release


def tooz() -> Release:
    from tooz import coordination

    coordinator = coordination.get_coordinator(url, f"m{os.getpid()}".encode())
    coordinator.start(start_heart=True)
    lock = coordinator.get_lock(key.encode())
    while not lock.acquire(blocking=True):
        time.sleep(0.01)
    return lock.release


def kazoo() -> Release:
    from kazoo.client import KazooClient, KazooState

    client = KazooClient(hosts=url, timeout=ttl)
    client.add_listener(lambda state: lost.set() if state == KazooState.LOST else None)
    client.start(timeout=30)
    lock = client.Lock(f"/bench/{key}", str(os.getpid()))
    lock.acquire()
    lost.clear()

    def release() -> None:
        lock.release()
        client.stop()

    return release


def redis_py() -> Release:
    import redis

    # thread_local: else the thread that renews does not know that the lock is ours
    more = {"sleep": 0.01} if ttl < 10 else {}
    lock = redis.Redis.from_url(url).lock(key, timeout=ttl, thread_local=False, **more)
    lock.acquire(blocking=True)

    def renew() -> None:
        while not stopping.wait(ttl / 3):
            try:
                lock.extend(ttl, replace_ttl=True)
            except Exception:
                lost.set()
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    return lock.release


def python_redis_lock() -> Release:
    import redis
    import redis_lock

    lock = redis_lock.Lock(redis.StrictRedis.from_url(url), key, expire=int(ttl), auto_renewal=True)
    lock.acquire(blocking=True)
    return lock.release


def dislock() -> Release:
    import dislock as library

    context = library.LockContext(
        url=url,
        table_parts=["key_value"],
        lock_key=key,
        owner=str(os.getpid()),
        run_ttl_seconds=ttl,
        lease_interval_seconds=max(1.0, min(10.0, ttl * 0.3)) if ttl > 10 else 0.5,  # its own rule; ours, to be fast
        lease_loss_policy=library.LeaseLossPolicy.TERMINATE,
    )
    while True:  # it does not wait by itself: how often is ours
        session = library.acquire_locks(context, ["lease"])
        try:
            got = session.__enter__()
        except library.LockNotAcquiredError:
            time.sleep(1.0 if ttl > 10 else 0.05)
            continue
        break
    if got.lease_lost is not None:
        event = got.lease_lost
        threading.Thread(target=lambda: (event.wait(), lost.set()), daemon=True).start()
    return lambda: session.__exit__(None, None, None)


def mithril() -> Release:
    import mithril as library
    import redis
    from mithril.backends import RedisBackend

    backend = RedisBackend(redis.Redis.from_url(url))
    lock = library.Lock(key, backend=backend, ttl=ttl, timeout=86_400, auto_renewal=True)
    lock.acquire()

    def watch() -> None:
        while not stopping.wait(0.25):
            if lock.state is not library.LockState.ACQUIRED:
                lost.set()
                return

    threading.Thread(target=watch, daemon=True).start()
    return lock.release


def seed() -> Release:
    """The seed's plain design: deactivate the others, register, and stop when a heartbeat finds oneself inactive."""
    import psycopg

    connection = psycopg.connect(url, autocommit=True)
    me = f"{key}-{os.getpid()}"
    connection.execute(
        "CREATE TABLE IF NOT EXISTS seed_instances (instance_id text PRIMARY KEY, bot text, started_at timestamptz, "
        "last_heartbeat timestamptz, is_active boolean)"
    )  # the bot is ours: several pairs are measured at once in one database
    connection.execute("UPDATE seed_instances SET is_active = FALSE WHERE bot = %s", (key,))
    connection.execute("INSERT INTO seed_instances VALUES (%s, %s, now(), now(), TRUE)", (me, key))

    def beat() -> None:
        own = connection
        while not stopping.wait(ttl):
            try:
                row = own.execute(
                    "UPDATE seed_instances SET last_heartbeat = now() WHERE instance_id = %s RETURNING is_active", (me,)
                ).fetchone()
                if row is None or not row[0]:
                    lost.set()
                    return
            except psycopg.Error:
                try:
                    own = psycopg.connect(url, autocommit=True)
                except psycopg.Error:
                    continue

    threading.Thread(target=beat, daemon=True).start()
    return lambda: None


PEERS: dict[str, Callable[[], Release]] = {
    "pg-advisory": advisory,
    "pg-advisory-fast": advisory,
    "filelock": filelock,
    "filelock-fast": filelock,
    "sqlalchemy-dlock": sqlalchemy_dlock,
    "pals": pals,
    "tooz": tooz,
    "kazoo": kazoo,
    "redis-py": redis_py,
    "python-redis-lock": python_redis_lock,
    "dislock": dislock,
    "mithril": mithril,
    "seed": seed,
}


def notifelect(start: Callable[[], subprocess.Popen[bytes]]) -> None:
    """An election and no lock: the newest wins, and whoever lost may win again."""
    import asyncio
    from datetime import timedelta

    import asyncpg
    from notifelect.election_manager import Coordinator

    async def run() -> None:
        connection = await asyncpg.connect(url)
        interval, timeout = (timedelta(seconds=s) for s in ((20, 5) if ttl > 10 else (1, 0.5)))
        settings = {"election_interval": interval, "election_timeout": timeout}
        child: subprocess.Popen[bytes] | None = None
        async with Coordinator(connection, namespace=key, **settings) as outcome:
            while not stopping.is_set():
                await asyncio.sleep(0.1)
                if child is not None and child.poll() is not None:
                    break
                if outcome.winner and child is None:
                    child = start()
                elif not outcome.winner and child is not None:
                    child.terminate()
                    child.wait()
                    child = None
            if child is not None and child.poll() is None:
                child.terminate()
                child.wait()
            os._exit(0)

    asyncio.run(run())


def boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    # No waiting in Python's own locks: a handler that runs meanwhile takes them as well. And no polling: it would count
    # as the processor time of every library.
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    if peer == "notifelect":
        notifelect(lambda: subprocess.Popen(command))
    if peer == "none":
        release: Release = lambda: None  # noqa: E731
    else:
        release = PEERS[peer]()
    if bare:
        with Path(sys.argv[6]).open("a") as out:
            print(os.getpid(), 0, f"{boot():.6f}", file=out, flush=True)
            while not stopping.is_set():
                select.select([wake], [], [])
                os.read(wake, 4096)
            print(os.getpid(), 0, f"{boot():.6f}", file=out, flush=True)
        release()
        os._exit(0)
    child = subprocess.Popen(command)
    ended = os.pidfd_open(child.pid)
    while not stopping.is_set() and not lost.is_set and child.poll() is None:
        if wake in select.select([wake, ended], [], [])[0]:
            os.read(wake, 4096)
    if child.poll() is None:
        child.send_signal(signal.SIGKILL if lost.is_set else signal.SIGTERM)
    status = child.wait()
    try:
        release()
    finally:
        os._exit(0 if status in (0, -signal.SIGTERM, -signal.SIGKILL) else 1)


main()
