"""Where systems are compared: the servers, a system that runs under a key, and what its children wrote."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from netns import Netns
from servers import Postgres

from bench import floors
from bench.hosts import Hosts
from bench.services import Consul, Etcd, Missing, Redis, Service, ZooKeeper
from bench.systems import CHILD, WHO, System, environment
from bench.wire import Wire
from botlease.work.tree import descendants

KEYS = itertools.count()
T = TypeVar("T")
Say = Callable[[str], None]


class Gone(Exception):
    """The system did not do what was waited for; the message says what."""


def boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


STOPPED = threading.Event()
"""The run ends: nobody waits any more."""


def pause(seconds: float) -> None:
    if STOPPED.wait(seconds):
        raise Gone("the run was stopped")


def until(what: Callable[[], object], limit: float, why: str) -> None:
    """Looks seldom: the moments are those that the children wrote."""
    end = time.monotonic() + limit
    while not what():
        if time.monotonic() > end:
            raise Gone(f"{why}: not within {limit:g} s")
        pause(0.01)


APART = 0.3
"""Seconds between two that begin together: fifteen pairs that start at once keep two cores busy for seconds, and what
was measured of one was how long it waited for the others (0.4 s of 11.3 were seen)."""


def together(n: int, at_once: int, one: Callable[[], T]) -> list[T]:
    """``n`` times, so many at once: where a lease is waited out there is nothing to do for the machine."""

    def later(i: int) -> T:
        pause(i * APART if i < at_once else 0.0)
        return one()

    with ThreadPoolExecutor(at_once) as pool:
        try:
            return [f.result() for f in [pool.submit(later, i) for i in range(n)]]
        except (KeyboardInterrupt, SystemExit):
            STOPPED.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Track:
    """What the children of one key wrote: who -> first and last stamp. Read on, never anew."""

    path: Path
    at: int = 0
    spans: dict[str, list[float]] = field(default_factory=dict)
    blind: float = 0.0
    """Seconds, the longest between two stamps of one child: a shorter overlap may not have been seen."""

    def read(self) -> dict[str, list[float]]:
        if self.path.exists():
            with self.path.open("rb") as f:
                f.seek(self.at)
                data = f.read()
            whole = data.rpartition(b"\n")[0]
            self.at += len(whole) + 1 if whole else 0
            for line in whole.splitlines():
                who, _, moment = line.decode().split()
                span = self.spans.setdefault(who, [float(moment), float(moment)])
                self.blind = max(self.blind, float(moment) - span[1])
                span[1] = max(span[1], float(moment))
                span[0] = min(span[0], float(moment))
        return self.spans

    def overlap(self) -> float:
        spans = sorted(self.read().values())
        return max([0.0, *(min(a[1], b[1]) - b[0] for n, a in enumerate(spans) for b in spans[n + 1 :])])


@dataclass
class Lab:
    """The servers, one folder, and what is running."""

    folder: Path
    servers: dict[str, Any]
    missing: dict[str, str]
    versions: dict[str, str]
    hosts: Hosts

    @contextlib.contextmanager
    def host(self) -> Iterator[Netns]:
        """One that can vanish. Its sessions of PostgreSQL are ended with it: the server would keep them for two hours,
        with what they have open, and all who come later would pay for that."""
        with self.hosts.host() as host:
            try:
                yield host
            finally:
                asyncio.run(_end_sessions(self.servers["postgres"].url(), host.there))

    def url(self, system: System, key: str, port: int | None = None, host: str = "127.0.0.1") -> str:
        server = self.servers.get(system.server)
        path = str(self.folder / f"{key}.{'db' if system.ours else 'lock'}")
        port = port or (server.port if server is not None else 0)
        plain = {
            "file": path,
            "postgres": f"postgresql://postgres@{host}:{port}/postgres",
            "redis": f"redis://{host}:{port}",
        }.get(system.server, "")
        return system.scheme.format(server=plain, host=host, port=port, file=path)


class Bench:
    """One system under one key: its supervisors, and the track of their children."""

    def __init__(self, lab: Lab, system: System, wrap: tuple[str, ...] = ()) -> None:
        self.lab, self.system, self.wrap = lab, system, wrap
        self.key = f"k{next(KEYS)}"
        self.track = Track(lab.folder / f"{self.key}.txt")
        self.wires: list[Wire] = []
        self.running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        *,
        wired: bool = False,
        child: tuple[str, ...] = (),
        bare: bool = False,
        host: Netns | None = None,
    ) -> subprocess.Popen[bytes]:
        """``wired``: over a line that can be cut, and on which requests are counted. ``host``: on that one."""
        port = None
        if wired and self.system.server != "file":
            self.wires.append(Wire(self.lab.servers[self.system.server].port))
            port = self.wires[-1].port
        url = self.lab.url(self.system, self.key, port, *([host.here] if host else []))
        child = child or (("--bare", str(self.track.path)) if bare else (*CHILD, str(self.track.path), *WHO))
        log = (self.lab.folder / f"{self.key}.log").open("ab")
        with log:
            process = subprocess.Popen(
                [*(host.inside() if host else ()), *self.wrap, *self.system.command(url, self.key, child)],
                env=environment(self.system, url, self.key),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def works(self, n: int, limit: float) -> str:
        """Wait for the n-th child. Returns who it is."""

        def there() -> bool:
            if len(self.track.read()) >= n:
                return True
            if all(process.poll() is not None for process in self.running):
                raise Gone(f"child {n}: all have ended, with {[process.returncode for process in self.running][-4:]}")
            return False

        until(there, limit, f"child {n}")
        return max(self.track.spans, key=lambda who: self.track.spans[who][0])

    def waits(self, process: subprocess.Popen[bytes]) -> None:
        """It has come to the lock: it sleeps. Measured by the processor time that it takes."""
        last, quiet = -1.0, 0
        end = time.monotonic() + 20
        while quiet < 4 and time.monotonic() < end:
            time.sleep(0.1)
            used = floors.cpu([process.pid, *descendants(process.pid)])
            quiet = quiet + 1 if used - last < 0.004 else 0
            last = used

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        if self.system.group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The whole tree at once."""
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def kill_alone(self, process: subprocess.Popen[bytes]) -> None:
        """The supervisor, and not what it has started."""
        process.kill()
        process.wait()

    def close(self) -> None:
        # Who waits goes first: with the holder's end it would begin, and its child would be left over.
        for process in reversed(self.running):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                self.kill(process)
        while left := named(str(self.track.path).encode()):  # children that nobody ended, or that were just begun
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for wire in self.wires:
            wire.close()


def named(path: bytes) -> list[int]:
    """Processes with this in their command line. Fifty children that were left over took most of a core from all
    who came later, and were not noticed for hours."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if name.isdigit() and path in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
    return found


def pid_of(who: str) -> int:
    return int(who.rpartition("/")[2])


@contextlib.contextmanager
def bench(lab: Lab, system: System, wrap: tuple[str, ...] = ()) -> Iterator[Bench]:
    b = Bench(lab, system, wrap)
    try:
        yield b
    finally:
        with contextlib.suppress(OSError):
            b.close()


@contextlib.contextmanager
def laboratory(say: Say) -> Iterator[Lab]:
    servers: dict[str, Any] = {}
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="botlease-bench-", ignore_cleanup_errors=True) as name:
        try:
            postgres = Postgres(durable=True)
            postgres.start()
            with (postgres.data / "pg_hba.conf").open("a") as hba:
                hba.write("host all all 10.0.0.0/8 trust\n")  # the hosts of bench/hosts.py, who reach 127.0.0.1
            servers["postgres"] = postgres
            versions["PostgreSQL"] = asyncio.run(_prepare(postgres.url()))
            for kind in (Etcd, Redis, ZooKeeper, Consul):
                service: Service = kind()
                try:
                    service.start()
                except Missing as e:
                    missing[kind.name] = str(e)
                    say(f"without {kind.name}: {e}")
                    continue
                servers[kind.name], versions[kind.name] = service, service.version()
            with Hosts() as hosts:
                yield Lab(Path(name), servers, missing, versions, hosts)
        finally:
            for server in servers.values():
                server.stop()


async def _end_sessions(url: str, address: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE client_addr = '{address}'"  # one of ours
    )
    await connection.close()


async def _prepare(url: str) -> str:
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE key_value (key text PRIMARY KEY, value text NOT NULL, expire_at timestamptz NOT NULL);"
        "CREATE SEQUENCE seq_notifelect START 1;"
    )
    # What the server does by itself at moments of its own would be counted as somebody's: its vacuum and analysis
    # (17 kB of WAL for a renewal were seen), and whole pages after a checkpoint in the middle of a window.
    for setting in ("autovacuum = off", "checkpoint_timeout = '1h'"):
        await connection.execute(f"ALTER SYSTEM SET {setting}")
    await connection.execute("SELECT pg_reload_conf()")
    version = await connection.fetchval("SHOW server_version")
    await connection.close()
    return str(version).split()[0]
