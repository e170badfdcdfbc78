"""The same work under every system, side by side: handover, crash, overlap, idle cost, start-up. Plain values."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import floors
from bench.counted import Counted
from bench.lab import Bench, Gone, Lab, Say, bench, boot, pause, pid_of, together, until
from bench.systems import CHILD, System, systems, unavailable
from botlease.work.tree import descendants

AT_ONCE = 15
POLLS = 1.0
"""Seconds: the longest pause between two looks of those that wait by looking."""


def handover(lab: Lab, system: System, n: int, *, bare: bool = False) -> dict[str, Any]:
    """M1: the holder is told to stop while another one waits. Gap: nobody works."""
    if system.slow and n > AT_ONCE:
        parts = together(AT_ONCE, AT_ONCE, lambda: _handover(lab, system, n // AT_ONCE, bare))
    else:
        parts = [_handover(lab, system, n, bare)]
    gaps, totals, gone = ([x for part in parts for x in part[key]] for key in ("gap", "total", "gone"))
    if not gaps:
        raise Gone(gone[0] if gone else "nothing was measured")
    overlap = max(part["overlap"] for part in parts)
    return {"gap": gaps, "total": totals, "overlap": overlap} | ({"gone": gone} if gone else {})


def _handover(lab: Lab, system: System, n: int, bare: bool) -> dict[str, Any]:
    gaps, totals, gone = [], [], []
    with bench(lab, system) as b:
        line = Line(b, bare)
        for _ in range(n):
            try:
                gap, total = line.hand_over()
            except (Gone, subprocess.TimeoutExpired) as e:
                gone.append(str(e))
                break  # what waits is in an unknown state
            gaps.append(gap)
            totals.append(total)
        return {"gap": gaps, "total": totals, "overlap": b.track.overlap(), "gone": gone}


class Line:
    """One holder after the other."""

    def __init__(self, b: Bench, bare: bool) -> None:
        self.bench, self.bare, self.children = b, bare, 1
        self.holder = b.start(bare=bare)
        b.works(1, 60)

    def hand_over(self) -> tuple[float, float]:
        """Seconds in which nobody worked, and since the holder was told to stop."""
        b, track = self.bench, self.bench.track
        waiting = b.start(bare=self.bare)
        b.waits(waiting)
        # At any moment between two looks of one that polls. A lease that is never given back has settled by then, too.
        pause(random.uniform(0, POLLS) + (2.0 if b.system.slow else 0.0))
        track.read()
        old = max(track.spans, key=lambda who: track.spans[who][0])
        asked = boot()
        b.stop(self.holder)
        self.children += 1
        new = b.works(self.children, 40)
        if new == old:
            raise Gone("the same child")
        self.holder.wait(40)
        time.sleep(0.02)
        track.read()
        self.holder = waiting
        return track.spans[new][0] - track.spans[old][1], track.spans[new][0] - asked


def _soon(system: System) -> None:
    """A fault comes at any moment between two renewals and two looks, and not always so long after a start."""
    pause(random.uniform(0, max(POLLS, system.ttl * system.renewed)))


def crash(lab: Lab, system: System, n: int, at_once: int, *, elsewhere: bool = False) -> dict[str, Any]:
    """M2: everything of the holder is killed; ``elsewhere``: its host (a network namespace, for ours a pid namespace
    as well) is gone, so nobody tells the server, and nothing of it can be seen from the host of the one that waits."""
    wrap = floors.namespace() if elsewhere and system.ours else ()
    if elsewhere and lab.hosts.missing:
        raise Gone(lab.hosts.missing)
    if elsewhere and system.ours and not wrap:
        raise Gone("no pid namespace: the death would be seen")
    limit = min(4 * max(system.ttl, 10) + 20, 100)

    def one() -> float | str:
        with lab.host() if elsewhere else contextlib.nullcontext() as host, bench(lab, system, wrap) as b:
            if system.exclusive:
                holder = b.start(host=host)
                first = b.works(1, 60)
                waiting = b.start()
            else:  # the newest has it, and the first is the one that waits
                waiting = b.start()
                b.works(1, 60)
                holder = b.start(host=host)
                first = b.works(2, 60)
            b.waits(waiting)
            _soon(system)
            children = len(b.track.read())
            if host is not None:
                host.vanish()
            killed = boot()
            b.kill(holder)
            try:
                second = b.works(children + 1, limit)
            except Gone as e:
                return str(e)
            if first == second:
                raise Gone("the same child")
            return b.track.spans[second][0] - killed

    if elsewhere and not system.ttl:
        if isinstance(tried := one(), str):
            return {"took": [], "gone": [tried]}  # a session that nobody ends: once is enough
        return _sorted([tried, *together(n - 1, at_once, one)])
    return _sorted(together(n, at_once, one))


def preempt(lab: Lab, system: System, n: int) -> dict[str, Any]:
    """A second one is started while the first works, and nobody has told that one to stop. Gap: nobody works; below
    zero both do."""
    limit = min(4 * max(system.ttl, 10) + 20, 100)

    def one() -> tuple[float, float] | str:
        with bench(lab, system) as b:
            b.start()
            first = b.works(1, 60)
            pause(1)
            _soon(system)
            asked = boot()
            b.start()
            try:
                second = b.works(2, limit)
                until(lambda: boot() - b.track.read()[first][1] > 0.5, limit, "the first one's end")
            except Gone as e:
                return str(e)
            spans = b.track.spans
            return spans[second][0] - spans[first][1], spans[second][0] - asked

    found = together(n, AT_ONCE, one)
    took = [x for x in found if not isinstance(x, str)]
    gone = [x for x in found if isinstance(x, str)]
    return {"gap": [gap for gap, _ in took], "total": [total for _, total in took]} | ({"gone": gone} if gone else {})


def _sorted(found: list[float | str]) -> dict[str, Any]:
    gone = [x for x in found if isinstance(x, str)]
    return {"took": [x for x in found if not isinstance(x, str)]} | ({"gone": gone} if gone else {})


def resign(lab: Lab, system: System, n: int) -> dict[str, Any]:
    """M1 where the newest one has it: that one is told to stop, and the first one has it again."""
    limit = 4 * max(system.ttl, 10) + 20

    def one() -> tuple[float, float, float] | str:
        with bench(lab, system) as b:
            waiting = b.start()
            b.works(1, 60)
            holder = b.start()
            b.works(2, 60)
            b.waits(waiting)
            _soon(system)
            children = len(b.track.read())
            old = max(b.track.spans, key=lambda who: b.track.spans[who][0])
            asked = boot()
            b.stop(holder)
            try:
                new = b.works(children + 1, limit)
            except Gone as e:
                return str(e)
            time.sleep(0.02)
            spans = b.track.read()
            return spans[new][0] - spans[old][1], spans[new][0] - asked, max(0.0, spans[old][1] - spans[new][0])

    found = together(n, AT_ONCE, one)
    took = [x for x in found if not isinstance(x, str)]
    gone = [x for x in found if isinstance(x, str)]
    return {
        "gap": [gap for gap, _, _ in took],
        "total": [total for _, total, _ in took],
        "overlap": max((overlap for _, _, overlap in took), default=0.0),
    } | ({"gone": gone} if gone else {})


def child_dies(lab: Lab, system: System, n: int) -> dict[str, Any]:
    """Only the child is killed: until one works again, in the same place or another."""
    limit = min(3 * max(system.ttl, 10) + 20, 100)

    def one() -> float | str:
        with bench(lab, system) as b:
            b.start()
            child = b.works(1, 60)
            waiting = b.start()
            b.waits(waiting)
            _soon(system)
            killed = boot()
            os.kill(pid_of(child), signal.SIGKILL)
            try:
                b.works(2, limit)
            except Gone as e:
                return str(e)
            return max(span[0] for span in b.track.spans.values()) - killed

    return _sorted(together(n, AT_ONCE if system.slow else 1, one))


FAULTS = ("kill -9 of the supervisor", "supervisor stopped", "connection cut")


def overlap(lab: Lab, system: System, fault: str, n: int) -> dict[str, Any]:
    """M3: seconds for which two children worked. ``took over``: in how many runs the second one began at all;
    ``still``: in how many both were at work when watching ended; ``blind``: how short an overlap could have
    been and not be seen."""
    ttl = system.ttl or 4.0

    def one() -> tuple[float, bool, bool, float]:
        with bench(lab, system) as b:
            holder = b.start(wired=fault == "connection cut")
            b.works(1, 60)
            if system.exclusive:
                b.waits(b.start())
            _soon(system)
            if fault == "kill -9 of the supervisor":
                b.kill_alone(holder)
            elif fault == "supervisor stopped":
                os.kill(holder.pid, signal.SIGSTOP)
            else:
                for wire in b.wires:
                    wire.refuse = True
                    wire.cut()
            if not system.exclusive:  # one that comes now: before, it would just have taken over
                b.start()
            end = time.monotonic() + 2 * ttl
            while time.monotonic() < end:
                pause(0.1)
                b.track.read()
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGCONT)
            for wire in b.wires:
                wire.refuse = False
            pause(min(ttl, 10) + 3)
            b.track.read()
            latest = max(span[1] for span in b.track.spans.values())
            still = sum(latest - span[1] < 0.5 for span in b.track.spans.values()) > 1
            return b.track.overlap(), len(b.track.spans) > 1, still, b.track.blind

    found = together(n, AT_ONCE, one)
    return {
        "overlap": [f[0] for f in found],
        "took over": sum(f[1] for f in found),
        "still": sum(f[2] for f in found),
        "blind": [f[3] for f in found],
        "runs": n,
    }


PARTS = 3
"""Of a window: how much they differ says how far its figure can be trusted."""


def _window(system: System) -> float:
    """Seconds: five renewals at least."""
    least = 40 if system.ours or system.server == "postgres" else 20
    return max(least, 5 * system.ttl * system.renewed)


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
            # The first write of each page after the checkpoint is a whole one: 10 s until our heartbeat comes by. So
            # late, too, does an idle session of PostgreSQL report what it did at its start.
            time.sleep(12 if counted is not None else 1 + system.ttl / 3)
            asked = [w.requests for w in b.wires]
            if counted is not None:
                counted.start()
            used, moments = [[floors.cpu(pids(p)) for p in running]], [boot()]
            for _ in range(PARTS):
                time.sleep(seconds / PARTS)
                used.append([floors.cpu(pids(p)) for p in running])
                moments.append(boot())
            span = moments[-1] - moments[0]
            requests = [w.requests for w in b.wires]
            if counted is not None:
                out.setdefault("database", {})[name] = counted.stop()
            for n, process in enumerate(running):
                who = "holder" if n == 0 else "standby"
                parts = [
                    (b[n] - a[n]) / (then - since) * 3600
                    for a, b, since, then in zip(used, used[1:], moments, moments[1:], strict=False)
                ]
                out[who] = {
                    "cpu": (used[-1][n] - used[0][n]) / span * 3600,
                    "cpus": parts,
                    # alone: beside a standby it shares what a host of its own would not share
                    **{k: out[who][k] if who in out else floors.memory(pids(process))[k] for k in ("pss", "rss")},
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

    def one() -> float:
        with bench(lab, system) as b:
            began = time.perf_counter()
            process = b.start(child=("true",))
            late = threading.Timer(60, process.kill)
            late.start()
            process.wait()  # without a limit of its own: with one it would look each 50 ms
            took = time.perf_counter() - began
            late.cancel()
            if process.returncode:
                raise Gone(f"it ended with {process.returncode}")
            return took

    return together(n, AT_ONCE if system.returns and system.ttl > 10 else 1, one)  # an election of half a minute


# All of it -----------------------------------------------------------------------------------------------------------

Job = tuple[str, Callable[[], Any]]


def jobs(system: System) -> list[str]:
    """What is measured of it."""
    lab: Any = None  # nothing is begun
    return [name for name, _ in _jobs(lab, system, quick=False) if not system.only or name in system.only]


def _jobs(lab: Lab, system: System, *, quick: bool) -> Iterator[Job]:
    n = 6 if quick else 30
    if system.exclusive:  # where two at once is how it works, nobody waits for the holder's end
        many = 100 if system.ours and not quick else n  # of less the p99 is the largest
        yield "handover", lambda: handover(lab, system, many)
        if system.bare:
            yield "in-process", lambda: handover(lab, system, many, bare=True)
        yield "child", lambda: child_dies(lab, system, n)
    else:
        if system.returns:
            yield "handover", lambda: resign(lab, system, n)
        yield "preempt", lambda: preempt(lab, system, n)
    if system.exclusive or system.returns:
        # One by one where a crash is seen at once. Where a lease is waited out the machine has nothing to do meanwhile.
        yield "crash", lambda: crash(lab, system, n, AT_ONCE if system.ttl and not system.ours else 1)
        if system.server != "file":
            yield "elsewhere", lambda: crash(lab, system, n, AT_ONCE, elsewhere=True)
    if system.overlaps:
        for fault in FAULTS:
            if fault != "connection cut" or system.server != "file":
                yield fault, lambda fault=fault: overlap(lab, system, fault, n)  # type: ignore[misc]
    yield "idle", lambda: idle(lab, system, 10 if quick else _window(system))
    yield "start-up", lambda: start_up(lab, system, n)


def measure(
    lab: Lab,
    chosen: list[str],
    say: Say,
    keep: Callable[[list[dict[str, Any]]], object],
    known: list[dict[str, Any]],
    commit: str,
    *,
    quick: bool,
) -> list[dict[str, Any]]:
    """Every system whose name has one of ``chosen`` in it (or all), one by one; of what is ``known`` only what had
    failed. ``commit``: of what is measured. ``keep``: called with all that is known after each figure, for who may be
    cut off."""
    out = [*known]
    for system in systems():
        if chosen and not any(c in system.name for c in chosen):
            continue
        row = next((row for row in out if row["name"] == system.name), None)
        about = {"settings": system.settings, "ttl": system.ttl, "server": system.server, "ours": system.ours}
        if row is None:
            out.append(row := {"name": system.name})
        elif any(row.get(key) != value for key, value in about.items()):  # measured as something else
            name = row["name"]
            row.clear()
            row["name"] = name
        row |= about
        if missing := unavailable(system, lab.missing):
            if not row.get("version"):  # else it was there in an earlier part of this run
                row |= {"missing": missing, "version": ""}
            say(f"{system.name}: not measured: {missing}")
            continue
        row |= {"missing": "", "version": system.version()}
        commits = set(row.get("commits", []))
        for name, job in _jobs(lab, system, quick=quick):
            if (system.only and name not in system.only) or "failed" not in row.get(name, "failed"):
                continue
            if name == "handover":  # the machine of this hour
                row["start of the child"] = floors.starts(CHILD, lab.folder, 10 if quick else 30)
            began = time.monotonic()
            try:
                row[name] = job()
            except Exception as e:  # a peer that cannot be measured is a figure as well, and no reason to lose the rest
                row[name] = {"failed": f"{type(e).__name__}: {e}"}
            row["commits"] = sorted(commits | {commit})
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
