"""The same work under every system, side by side: handover, crash, overlap, idle cost, start-up. Plain values."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from servers import Postgres

from bench import floors
from bench.services import Consul, Etcd, Missing, Redis, Service, ZooKeeper
from bench.systems import CHILD, WHO, System, environment, systems, unavailable
from bench.wire import Wire
from botlease.work.tree import descendants

KEYS = itertools.count()
T = TypeVar("T")
AT_ONCE = 15
Say = Callable[[str], None]


class Gone(Exception):
    """The system did not do what was waited for; the message says what."""


def boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def until(what: Callable[[], object], limit: float, why: str) -> None:
    """Looks seldom: the moments are those that the children wrote."""
    end = time.monotonic() + limit
    while not what():
        if time.monotonic() > end:
            raise Gone(f"{why}: not within {limit:g} s")
        time.sleep(0.01)


def together(n: int, at_once: int, one: Callable[[], T]) -> list[T]:
    """``n`` times, so many at once: where a lease is waited out there is nothing to do for the machine."""
    with ThreadPoolExecutor(at_once) as pool:
        return [f.result() for f in [pool.submit(one) for _ in range(n)]]


@dataclass
class Track:
    """What the children of one key wrote: who -> first and last stamp. Read on, never anew."""

    path: Path
    at: int = 0
    spans: dict[str, list[float]] = field(default_factory=dict)

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

    def url(self, system: System, key: str, port: int | None = None) -> str:
        server = self.servers.get(system.server)
        path = str(self.folder / f"{key}.{'db' if system.ours else 'lock'}")
        port = port or (server.port if server is not None else 0)
        plain = {
            "file": path,
            "postgres": f"postgresql://postgres@127.0.0.1:{port}/postgres",
            "redis": f"redis://127.0.0.1:{port}",
        }.get(system.server, "")
        return system.scheme.format(server=plain, port=port, file=path)


class Bench:
    """One system under one key: its supervisors, and the track of their children."""

    def __init__(self, lab: Lab, system: System, wrap: tuple[str, ...] = ()) -> None:
        self.lab, self.system, self.wrap = lab, system, wrap
        self.key = f"k{next(KEYS)}"
        self.track = Track(lab.folder / f"{self.key}.txt")
        self.wires: list[Wire] = []
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *, wired: bool = False, child: tuple[str, ...] = (), bare: bool = False) -> subprocess.Popen[bytes]:
        port = None
        if wired and self.system.server != "file":
            self.wires.append(Wire(self.lab.servers[self.system.server].port))
            port = self.wires[-1].port
        url = self.lab.url(self.system, self.key, port)
        child = child or (("--bare", str(self.track.path)) if bare else (*CHILD, str(self.track.path), *WHO))
        log = (self.lab.folder / f"{self.key}.log").open("ab")
        with log:
            process = subprocess.Popen(
                [*self.wrap, *self.system.command(url, self.key, child)],
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

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                self.kill(process)
        for pid in map(pid_of, self.track.read()):  # children that nobody ended
            with contextlib.suppress(OSError):
                if str(self.track.path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        for wire in self.wires:
            wire.close()


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


# Metrics -------------------------------------------------------------------------------------------------------------


def handover(lab: Lab, system: System, n: int, *, bare: bool = False) -> dict[str, Any]:
    """M1: the holder is told to stop while another one waits. Gap: nobody works."""
    gaps, totals, gone = [], [], []
    with bench(lab, system) as b:
        holder = b.start(bare=bare)
        b.works(1, 60)
        for rep in range(n):
            waiting = b.start(bare=bare)
            b.waits(waiting)
            b.track.read()
            old = max(b.track.spans, key=lambda who: b.track.spans[who][0])
            asked = boot()
            b.stop(holder)
            try:
                new = b.works(rep + 2, 40)
                holder.wait(40)
            except (Gone, subprocess.TimeoutExpired) as e:
                gone.append(str(e))
                break  # what waits is in an unknown state
            time.sleep(0.02)
            b.track.read()
            gaps.append(b.track.spans[new][0] - b.track.spans[old][1])
            totals.append(b.track.spans[new][0] - asked)
            holder = waiting
        return _kept({"gap": gaps, "total": totals, "overlap": b.track.overlap()}, "gap", gone)


def _kept(found: dict[str, Any], key: str, gone: list[str]) -> dict[str, Any]:
    """What there is, and what there is not."""
    if not found[key]:
        raise Gone(gone[0] if gone else "nothing was measured")
    return found | ({"gone": gone} if gone else {})


def crash(lab: Lab, system: System, n: int, at_once: int, *, elsewhere: bool = False) -> dict[str, Any]:
    """M2: everything of the holder is killed; ``elsewhere``: its host is gone as well, so nobody tells the server, and
    nothing of it can be seen from the host of the one that waits."""
    wrap = floors.namespace() if elsewhere and system.ours else ()
    if elsewhere and system.ours and not wrap:
        raise Gone("needs a pid namespace (root, or unshare)")
    limit = min(4 * max(system.ttl, 10) + 20, 100)

    def one() -> float | str:
        with bench(lab, system, wrap) as b:
            holder = b.start(wired=elsewhere)
            first = b.works(1, 60)
            waiting = b.start()
            b.waits(waiting)
            for wire in b.wires:
                wire.keep = wire.silent = True
            killed = boot()
            b.kill(holder)
            try:
                second = b.works(2, limit)
            except Gone as e:
                return str(e)
            if first == second:
                raise Gone("the same child")
            return b.track.spans[second][0] - killed

    if elsewhere and not system.ttl and isinstance(tried := one(), str):
        return {"took": [], "gone": [tried]}  # a session that nobody ends: once is enough
    return _sorted(together(n, at_once, one))


def _sorted(found: list[float | str]) -> dict[str, Any]:
    gone = [x for x in found if isinstance(x, str)]
    return {"took": [x for x in found if not isinstance(x, str)]} | ({"gone": gone} if gone else {})


def child_dies(lab: Lab, system: System, n: int) -> dict[str, Any]:
    """Only the child is killed: until one works again, in the same place or another."""
    limit = min(3 * max(system.ttl, 10) + 20, 100)

    def one() -> float | str:
        with bench(lab, system) as b:
            b.start()
            child = b.works(1, 60)
            waiting = b.start()
            b.waits(waiting)
            killed = boot()
            os.kill(pid_of(child), signal.SIGKILL)
            try:
                b.works(2, limit)
            except Gone as e:
                return str(e)
            return max(span[0] for span in b.track.spans.values()) - killed

    return _sorted([one() for _ in range(n)])


FAULTS = ("kill -9 of the supervisor", "supervisor stopped", "connection cut")


def overlap(lab: Lab, system: System, fault: str, n: int) -> dict[str, Any]:
    """M3: milliseconds for which two children worked. ``took over``: in how many runs the second one began at all;
    ``still``: in how many both were at work when watching ended."""
    ttl = system.ttl or 4.0

    def one() -> tuple[float, bool, bool]:
        with bench(lab, system) as b:
            holder = b.start(wired=fault == "connection cut")
            b.works(1, 60)
            waiting = b.start()
            b.waits(waiting)
            if fault == "kill -9 of the supervisor":
                os.kill(holder.pid, signal.SIGKILL)
                holder.wait()
            elif fault == "supervisor stopped":
                os.kill(holder.pid, signal.SIGSTOP)
            else:
                for wire in b.wires:
                    wire.refuse = True
                    wire.cut()
            end = time.monotonic() + 2 * ttl
            while time.monotonic() < end:
                time.sleep(0.1)
                b.track.read()
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGCONT)
            for wire in b.wires:
                wire.refuse = False
            time.sleep(min(ttl, 10) + 3)
            b.track.read()
            latest = max(span[1] for span in b.track.spans.values())
            still = sum(latest - span[1] < 0.5 for span in b.track.spans.values()) > 1
            return b.track.overlap(), len(b.track.spans) > 1, still

    found = together(n, AT_ONCE, one)
    return {
        "overlap": [f[0] for f in found],
        "took over": sum(f[1] for f in found),
        "still": sum(f[2] for f in found),
        "runs": n,
    }


COUNTERS = """
SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS wal,
  txid_snapshot_xmax(txid_current_snapshot())::bigint AS xids,
  (SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database)::bigint AS statements
"""


async def _counters(url: str) -> dict[str, int]:
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(COUNTERS)
    await connection.close()
    return {name: int(value) for name, value in row.items()}


class Counted:
    """What the PostgreSQL server was asked for and wrote meanwhile, an hour, without our own asking."""

    def __init__(self, url: str) -> None:
        self.url = url
        asyncio.run(self._checkpoint())  # one that came by itself would write whole pages

    async def _checkpoint(self) -> None:
        connection = await asyncpg.connect(self.url)
        await connection.execute("CHECKPOINT")
        await connection.close()

    def start(self) -> None:
        one = asyncio.run(_counters(self.url))
        self.before = asyncio.run(_counters(self.url))
        self.ours = {k: self.before[k] - one[k] for k in one}
        self.began = boot()

    def stop(self) -> dict[str, float]:
        time.sleep(1.2)  # a session's own counts come a second late
        after, span = asyncio.run(_counters(self.url)), boot() - self.began
        return {k: max(0, after[k] - self.before[k] - self.ours[k]) / span * 3600 for k in after}


def nobody(url: str, seconds: float) -> dict[str, float]:
    """What a server that nobody uses does in an hour by itself."""
    counted = Counted(url)
    time.sleep(1)
    counted.start()
    time.sleep(seconds)
    return counted.stop()


def idle(lab: Lab, system: System, seconds: float) -> dict[str, Any]:
    """M4: what holder and standby cost while nothing happens; the child apart. Where two at once is how it works there
    is no standby. ``database``: transactions, bytes of WAL and transaction ids an hour, of the holder alone and of
    both."""
    out: dict[str, Any] = {}
    with bench(lab, system) as b:
        running = [b.start(wired=True)]
        child = b.works(1, 60)

        def pids(process: subprocess.Popen[bytes]) -> list[int]:
            return [p for p in [process.pid, *descendants(process.pid)] if p != pid_of(child)]

        def watch(name: str) -> None:
            counted = Counted(lab.url(system, "-")) if system.server == "postgres" else None
            time.sleep(1 + system.ttl / 3)  # the first write of each page after the checkpoint is a whole one
            before = [floors.cpu(pids(p)) for p in running]
            asked = [w.requests for w in b.wires]
            if counted is not None:
                counted.start()
            began = boot()
            time.sleep(seconds)
            span = boot() - began
            used = [floors.cpu(pids(p)) for p in running]
            requests = [w.requests for w in b.wires]
            if counted is not None:
                out.setdefault("database", {})[name] = counted.stop()
            for n, process in enumerate(running):
                who = "holder" if n == 0 else "standby"
                out[who] = {
                    "cpu": (used[n] - before[n]) / span * 3600,
                    # alone: beside a standby it shares what a host of its own would not share
                    "pss": out[who]["pss"] if who in out else floors.pss(pids(process)),
                    "requests": (requests[n] - asked[n]) / span if b.wires else None,
                }

        watch("holder")
        if system.exclusive:
            running.append(b.start(wired=True))
            b.waits(running[1])
            watch("holder and standby")
    return out


def start_up(lab: Lab, system: System, n: int) -> list[float]:
    """M6: the whole run of ``true``."""
    out = []
    for _ in range(n):
        with bench(lab, system) as b:
            began = time.perf_counter()
            process = b.start(child=("true",))
            if process.wait(60):
                raise Gone(f"it ended with {process.returncode}")
            out.append(time.perf_counter() - began)
    return out


# All of it -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def laboratory(say: Say) -> Iterator[Lab]:
    servers: dict[str, Any] = {}
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="botlease-bench-", ignore_cleanup_errors=True) as name:
        try:
            postgres = Postgres(durable=True)
            postgres.start()
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
            yield Lab(Path(name), servers, missing, versions)
        finally:
            for server in servers.values():
                server.stop()


async def _prepare(url: str) -> str:
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE key_value (key text PRIMARY KEY, value text NOT NULL, expire_at timestamptz NOT NULL);"
        "CREATE SEQUENCE seq_notifelect START 1;"
    )
    version = await connection.fetchval("SHOW server_version")
    await connection.close()
    return str(version).split()[0]


Job = tuple[str, Callable[[], Any]]


def _jobs(lab: Lab, system: System, *, quick: bool) -> Iterator[Job]:
    n = 6 if quick else 30
    if system.exclusive:  # where two at once is how it works, nobody waits for the holder's end
        yield "handover", lambda: handover(lab, system, n)
        if system.bare:
            yield "in-process", lambda: handover(lab, system, n, bare=True)
        yield "child", lambda: child_dies(lab, system, n)
        # One by one where a crash is seen at once. Where a lease is waited out the machine has nothing to do meanwhile.
        yield "crash", lambda: crash(lab, system, n, AT_ONCE if system.ttl and not system.ours else 1)
        if system.server != "file":
            yield "elsewhere", lambda: crash(lab, system, n, AT_ONCE, elsewhere=True)
    if system.overlaps:
        for fault in FAULTS:
            if fault != "connection cut" or system.server != "file":
                yield fault, lambda fault=fault: overlap(lab, system, fault, n)  # type: ignore[misc]
    yield "idle", lambda: idle(lab, system, 10 if quick else 30)
    yield "start-up", lambda: start_up(lab, system, n)


def measure(
    lab: Lab,
    chosen: list[str],
    say: Say,
    keep: Callable[[list[dict[str, Any]]], object],
    known: list[dict[str, Any]],
    *,
    quick: bool,
) -> list[dict[str, Any]]:
    """Every system whose name has one of ``chosen`` in it (or all), one by one; of what is ``known`` only what had
    failed. ``keep``: called with all that is known after each figure, for who may be cut off."""
    out = [*known]
    for system in systems():
        if chosen and not any(c in system.name for c in chosen):
            continue
        row = next((row for row in out if row["name"] == system.name), None)
        if row is None:
            out.append(row := {"name": system.name})
        row |= {"settings": system.settings, "ttl": system.ttl, "server": system.server, "ours": system.ours}
        if missing := unavailable(system, lab.missing):
            if "start-up" not in row:  # else it was there in an earlier part of this run
                row |= {"missing": missing, "version": ""}
            say(f"{system.name}: not measured: {missing}")
            continue
        row |= {"missing": "", "version": system.version()}
        for name, job in _jobs(lab, system, quick=quick):
            if (system.only and name not in system.only) or "failed" not in row.get(name, "failed"):
                continue
            began = time.monotonic()
            try:
                row[name] = job()
            except Exception as e:  # a peer that cannot be measured is a figure as well, and no reason to lose the rest
                row[name] = {"failed": f"{type(e).__name__}: {e}"}
            say(f"{system.name}: {name}: {_short(row[name])} ({time.monotonic() - began:.0f} s)")
            keep(out)
    return out


def _short(value: Any) -> str:
    if isinstance(value, list):
        return floors.ms(value)
    if "failed" in value:
        return str(value["failed"])
    for key in ("gap", "took", "overlap"):
        if key in value:
            more = "".join(f", {k} {value[k]}" for k in ("took over", "still") if k in value)
            return (
                (floors.ms(value[key]) if value[key] else "")
                + more
                + "".join(f", {g}" for g in value.get("gone", [])[:1])
            )
    return ", ".join(f"{k}: {v}" for k, v in value.items())
