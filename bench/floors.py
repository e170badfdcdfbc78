"""What the machine itself takes: the floors that figures stand beside. And how processes are measured."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from statistics import median


def ms(values: list[float]) -> str:
    values = sorted(values)
    return f"{median(values) * 1000:.1f} ms median, {values[-1] * 1000:.1f} max of {len(values)}"


def p99(values: list[float]) -> float:
    """The least of them below which, or at which, 99 of 100 are: of less than a hundred the largest."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


def cpu(pids: list[int]) -> float:
    """Seconds of processor time so far, to the nanosecond where the kernel tells."""
    total = 0.0
    for pid in pids:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue  # it has just ended
    return total


def memory(pids: list[int]) -> dict[str, float]:
    """MB. ``pss``: what is shared with others counts by its share; ``rss``: in full, for each process."""
    total = {"pss": 0.0, "rss": 0.0}
    for pid in pids:
        try:
            for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                for what in total:
                    if row.startswith(f"{what.capitalize()}:"):
                        total[what] += int(row.split()[1]) / 1024
        except OSError:
            continue
    return total


def pss(pids: list[int]) -> float:
    return memory(pids)["pss"]


@cache
def namespace() -> tuple[str, ...]:
    """A pid namespace of its own, so that no kernel can prove a death: another host, as far as botlease can tell."""
    command = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
    except FileNotFoundError:
        return ()


def timed(command: list[str], n: int, env: dict[str, str] | None = None) -> list[float]:
    out = []
    for _ in range(n):
        began = time.perf_counter()
        subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
        out.append(time.perf_counter() - began)
    return out


NUMBERS = itertools.count()
SPAWNER = Path(__file__).parent / "spawner.py"


def starts(child: tuple[str, ...], folder: Path, n: int) -> list[float]:
    """Seconds from the start by a small process (bench/spawner.py) to the first stamp of the child."""
    out = []
    with subprocess.Popen(
        [sys.executable, "-I", "-S", SPAWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as spawner:
        assert spawner.stdin is not None and spawner.stdout is not None

        def ask(line: str) -> str:
            spawner.stdin.write(f"{line}\n")  # type: ignore[union-attr]
            spawner.stdin.flush()  # type: ignore[union-attr]
            return spawner.stdout.readline()  # type: ignore[union-attr]

        for _ in range(n):
            time.sleep(0.1)  # what has just ended, or begun, is quiet
            path = folder / f"floor{next(NUMBERS)}"
            began = float(ask("\0".join([*child, str(path)])))
            while not (path.exists() and b"\n" in path.read_bytes()):
                time.sleep(0.01)  # the moment is the one that the child wrote
            out.append(float(path.read_text().split()[2]) - began)
            ask("")
        spawner.stdin.close()
    return out


def measure(child: tuple[str, ...], folder: Path, n: int) -> dict[str, list[float]]:
    """Seconds each: a start of the child up to its first stamp; Pythons; a commit on SQLite."""
    return {
        "start of the child (python -I -S)": starts(child, folder, n),
        "python -c pass": timed([sys.executable, "-c", "pass"], n),
        "python -c 'import asyncio'": timed([sys.executable, "-c", "import asyncio"], n),
        "a commit on SQLite": _commits(folder, n),
        "flock: to a waiting process": _flock(folder, n),
        "true": timed(["true"], n),
        "a death, seen by pidfd": _deaths(n),
    }


def idle(url: str, folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """What a program costs that does nothing but write a row each two seconds (bench/heartbeat.py): CPU seconds an
    hour, and MB."""
    program = str(Path(__file__).parent / "heartbeat.py")
    out = {}
    for name, place in (("PostgreSQL (asyncpg)", url), ("SQLite", str(folder / "heartbeat.db"))):
        process = subprocess.Popen([sys.executable, program, place])
        try:
            time.sleep(3.0)  # what a start takes is not part of it
            before, began = cpu([process.pid]), time.monotonic()
            time.sleep(seconds)
            used = cpu([process.pid]) - before
            out[name] = {"cpu": used / (time.monotonic() - began) * 3600} | memory([process.pid])
        finally:
            process.kill()
            process.wait()
    return out


def _deaths(n: int) -> list[float]:
    """From SIGKILL until a process that waits for it knows."""
    out = []
    for _ in range(n):
        process = subprocess.Popen(["sleep", "100"])
        fd = os.pidfd_open(process.pid)
        time.sleep(0.01)
        began = time.perf_counter()
        process.kill()
        select.select([fd], [], [])
        out.append(time.perf_counter() - began)
        process.wait()
        os.close(fd)
    return out


async def postgres(url: str, n: int) -> dict[str, list[float]]:
    """Seconds of what every hand-over by a PostgreSQL server is made of, between two connections that are there."""
    import asyncpg

    a, b = await asyncpg.connect(url), await asyncpg.connect(url)
    heard = asyncio.Event()
    await b.add_listener("floor", lambda *_: heard.set())
    await a.execute("CREATE TABLE IF NOT EXISTS floor (n int); INSERT INTO floor VALUES (0)")
    ask, write = await a.prepare("SELECT 1"), await a.prepare("UPDATE floor SET n = n + 1")
    lock, unlock = "SELECT pg_advisory_lock(4711)", "SELECT pg_advisory_unlock(4711)"
    out: dict[str, list[float]] = {}

    async def time_of(what: str, do: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await do()
        out.setdefault(what, []).append(time.perf_counter() - began)

    for _ in range(n):
        await time_of("PostgreSQL: a question", ask.fetch)
        await time_of("PostgreSQL: a durable commit", write.fetch)
        heard.clear()

        async def tell() -> None:
            await a.execute("NOTIFY floor")
            await heard.wait()

        await time_of("PostgreSQL: NOTIFY until it is heard", tell)
        await a.execute(lock)
        waiting = asyncio.ensure_future(b.execute(lock))
        await asyncio.sleep(0.02)

        async def hand_on(waiting: asyncio.Future[str] = waiting) -> None:
            await a.execute(unlock)
            await waiting

        await time_of("PostgreSQL: an advisory lock, let go here and had there", hand_on)
        await b.execute(unlock)
    await a.close()
    await b.close()
    return out


def _commits(folder: Path, n: int) -> list[float]:
    import sqlite3

    db = sqlite3.connect(folder / "floor.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = PERSIST")  # the cheapest that is safe, and ours
    db.execute("CREATE TABLE t (a)")
    db.execute("INSERT INTO t VALUES (0)")
    out = []
    for _ in range(n * 3):
        began = time.perf_counter()
        db.execute("UPDATE t SET a = a + 1")
        out.append(time.perf_counter() - began)
    db.close()
    return out


def _flock(folder: Path, n: int) -> list[float]:
    """Unlock here, locked there."""
    import fcntl

    out = []
    path = folder / "floor.lock"
    for _ in range(n):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(fd)
            other = os.open(path, os.O_RDWR)
            os.write(write, b"x")
            fcntl.flock(other, fcntl.LOCK_EX)
            os.write(write, f"{time.clock_gettime(time.CLOCK_BOOTTIME):.9f}".encode())
            os._exit(0)
        os.read(read, 1)
        time.sleep(0.01)
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        fcntl.flock(fd, fcntl.LOCK_UN)
        out.append(float(os.read(read, 64)) - began)
        os.waitpid(pid, 0)
        for each in (fd, read, write):
            os.close(each)
    return out
