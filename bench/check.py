"""What the figures have to be. :func:`goals`: what we set out to reach, for the page. :func:`broken`: what must not
become worse, for ``scripts/bench --check``: times are judged by their ratio to a floor of the same run, never by
themselves, as the floor is as slow as the machine. Memory, bytes and counts are the same on every machine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import floors
from bench.capacity import FLOOR, MOST, POOLED
from bench.compare import FAULTS, jobs
from bench.hosts import MISSING
from bench.systems import System
from bench.turns import known

OURS = ("botlease, SQLite", "botlease, PostgreSQL")
SUPERVISED = (*OURS, "botlease-fast, PostgreSQL")


@dataclass(frozen=True)
class Goal:
    what: str
    most: float
    found: float | None
    """None: there is no figure."""
    unit: str
    least: bool = False
    """``most`` is the least that it has to be."""

    @property
    def met(self) -> bool:
        return self.found is not None and (self.found >= self.most if self.least else self.found <= self.most)


def _rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found.get("peers", []) if not row.get("missing")}


def _values(row: dict[str, Any], part: str, key: str) -> list[float]:
    """In which it was not seen to end, it never did."""
    value = row.get(part)
    if isinstance(value, list):
        return value
    return value.get(key, []) + [math.inf] * len(value.get("gone", [])) if isinstance(value, dict) else []


def goals(found: dict[str, Any]) -> list[Goal]:
    """What we set out to reach, each with its figure if there is one."""
    out: list[Goal] = []
    rows = _rows(found)

    def goal(what: str, most: float, unit: str, measure: Callable[[], float], *, least: bool = False) -> None:
        try:
            value = measure()
        except (KeyError, IndexError, ValueError, TypeError):
            value = None  # it was not measured, or failed
        out.append(Goal(what, most, value, unit, least))

    def ms(name: str, part: str, key: str, of: Callable[[list[float]], float] = median) -> float:
        return of(_values(rows[name], part, key)) * 1000

    turns = {name: median(gaps) * 1000 for name, gaps in known(found).items()}
    networked = {
        n: gap for n, gap in turns.items() if n in rows and not rows[n]["ours"] and rows[n]["server"] != "file"
    }
    if networked:
        best = min(networked, key=lambda name: networked[name])
        goal(
            f"planned gap with a child, PostgreSQL, beside the fastest peer's ({best}), in turn",
            networked[best],
            "ms",
            lambda: turns["botlease, PostgreSQL"],
        )
        goal(
            "the same for a program whose interpreter is not loaded ahead",
            networked[best],
            "ms",
            lambda: turns["botlease, any program, PostgreSQL"],
        )
    if "flock" in turns:
        goal(
            "planned gap with a child, SQLite, beside flock's and two commits, in turn",
            turns["flock"] + 2 * median(found["floors"]["a commit on SQLite"]) * 1000,
            "ms",
            lambda: turns["botlease, SQLite"],
        )
        goal(
            "the same for a program whose interpreter is not loaded ahead, SQLite",
            turns["flock"] + 2 * median(found["floors"]["a commit on SQLite"]) * 1000,
            "ms",
            lambda: turns["botlease, any program, SQLite"],
        )
    for name in OURS:
        goal(f"planned gap, p99, {name}", 50, "ms", lambda name=name: ms(name, "handover", "gap", floors.p99))
        goal(f"crash of the child, p99, {name}", 50, "ms", lambda name=name: ms(name, "child", "took", floors.p99))
        goal(f"crash on the same host, p99, {name}", 50, "ms", lambda name=name: ms(name, "crash", "took", floors.p99))
        goal(
            f"start-up, more than that of true, {name}",
            110,
            "ms",
            lambda name=name: ms(name, "start-up", "") - median(found["floors"]["true"]) * 1000,
        )
        most = 22.0 if "SQLite" in name else 26.0
        for who in ("holder", "standby"):
            goal(f"memory of the {who}, {name}", most, "MB", lambda name=name, who=who: rows[name]["idle"][who]["pss"])
        goal(f"idle holder, {name}", 1.5, "CPU s/h", lambda name=name: rows[name]["idle"]["holder"]["cpu"])
    bare = _values(rows.get("pg-advisory", {}), "in-process", "gap")
    for what, name, part in (
        ("in-process", "botlease.active, PostgreSQL", "in-process"),
        ("warm, with a child", "botlease, warm, PostgreSQL", "handover"),
    ):
        for beside, lock in (
            ("2.5 ms for a bare advisory lock, as it was when this was set", 2.5),
            ("pg-advisory in-process, in this run", median(bare or [0]) * 1000),
        ):
            if lock:
                goal(
                    f"{what}, PostgreSQL, beside 1.5 of {beside}",
                    1.5 * lock,
                    "ms",
                    lambda name=name, part=part: ms(name, part, "gap"),
                )
    for name in SUPERVISED:
        if name in rows and "SQLite" not in name:
            goal(
                f"another host is gone, worst, {name}",
                elsewhere(rows[name]["ttl"]),
                "s",
                lambda name=name: max(_values(rows[name], "elsewhere", "took")),
            )
    for name in SUPERVISED:
        for fault in FAULTS:
            if "SQLite" not in name or fault != "connection cut":
                goal(
                    f"overlap, {fault}, {name}",
                    0,
                    "ms",
                    lambda name=name, fault=fault: max(_values(rows[name], fault, "overlap")) * 1000,
                )
    writes = found.get("own", {}).get("PostgreSQL writes", {})
    goal("statements of a holder", 0.5, "/s", lambda: writes["holder"]["statements"])
    goal("WAL of a renewal", 250, "B", lambda: writes["holder"]["wal"])
    goal("renewals that are HOT", 1, "of 1", lambda: writes["holder"]["hot"], least=True)
    goal(
        "statements of a standby (it looks in step with the beats, or another host would be noticed later)",
        0.1,
        "/s",
        lambda: writes["holder and standby"]["statements"] - writes["holder"]["statements"],
    )
    goal("a standby writes but for its heartbeat each 10 s", 0.1, "in 10 s", lambda: _standby_writes(writes) - 1)
    for what, how in (("", MOST), (", behind a pooler", POOLED)):
        goal(
            f"holders of one server at ttl 3 s{what}",
            5000,
            "",
            lambda how=how: found["capacity"][how]["rate"] * 0.6,
            least=True,
        )
    for name in ("same host", "another host"):
        fleet = found.get("fleet", {}).get(name, {})
        goal(f"fleet of 10,000, a process killed, {name}", elsewhere(10, 1), "s", lambda fleet=fleet: fleet["again"])
        goal(f"bots moved that need not be, {name}", 0, "", lambda fleet=fleet: fleet["moved"])
        goal(f"overlap in the fleet, {name}", 0, "s", lambda fleet=fleet: fleet["overlap"])
    return out


def elsewhere(ttl: float, more: float = 0.2) -> float:
    """Seconds after which a dead host must have a successor: ttl*(1+rho), the lock-delay, and 0.2 s (a fleet: 1 s)."""
    return ttl * 1.01 + 1.0 + more


def _standby_writes(writes: dict[str, dict[str, float]]) -> float:
    return (writes["holder and standby"]["xids"] - writes["holder"]["xids"]) / 360


def broken(found: dict[str, Any], parts: Collection[str] = ("peers",), ours: Collection[System] = ()) -> list[str]:
    """A line for each bound that is broken, and for each of these parts, and of what is measured of ``ours``, that
    could not be judged, in words."""
    lines = [f"{what}: {why}" for what, why in _missing(found, parts)]
    lines += [f"{what}: was not measured" for what in _absent(found, parts, ours)]
    lines += [
        f"{what}: {value:.2f} {unit}, at most {most:g}" for what, value, most, unit in _bounds(found) if value > most
    ]
    return lines


def _absent(found: dict[str, Any], parts: Collection[str], ours: Collection[System]) -> Iterator[str]:
    rows = _rows(found)
    for system in ours if "peers" in parts else ():
        yield from (f"{system.name}: {job}" for job in jobs(system) if job not in rows.get(system.name, {}))
    if ours:
        yield from (part for part in parts if part not in found)


def _missing(found: dict[str, Any], parts: Collection[str]) -> Iterator[tuple[str, str]]:
    for part in ("turns", "own", "fleet", "capacity", "gateway"):
        if isinstance(found.get(part), dict) and "failed" in found[part]:
            yield part, found[part]["failed"]
    ours = [row for row in found.get("peers", []) if row["ours"]]
    if not ours and "peers" in parts:
        yield "botlease", "nothing of ours was measured"
    for row in ours:
        if row.get("missing"):
            yield row["name"], row["missing"]
        for job, value in row.items():
            if isinstance(value, dict) and MISSING in value.get("failed", "") and os.geteuid():
                continue  # who is not root cannot have hosts, and the page says so
            if isinstance(value, dict) and ("failed" in value or value.get("gone")):
                yield f"{row['name']}: {job}", value.get("failed") or value["gone"][0]
            elif job in FAULTS and value["took over"] < value["runs"]:
                yield f"{row['name']}: {job}", f"taken over in {value['took over']} of {value['runs']} runs"


def _tail(what: str, values: list[float], of: float, most: float) -> Iterator[tuple[str, float, float, str]]:
    """What one in a hundred had. It differs by twice on a noisy machine: this is for what takes a second at times."""
    yield f"{what}, p99", floors.p99(values) / of, most, "of the floor's own"


def _bounds(found: dict[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    """What, its figure, the most that it may be, and of what. The bounds are some 1.5 of what was measured
    (docs/benchmarks.md): two runs on a noisy machine differ by less."""
    floor = {name: median(values) for name, values in found["floors"].items()}
    python = floor["python -c 'import asyncio'"]
    lock = floor["PostgreSQL: an advisory lock, let go here and had there"]

    def commits(server: str) -> float:
        """Of the release and of the acquire: on PostgreSQL only the acquire waits for the disk. On a slow disk they are
        all of it."""
        return 2 * floor["a commit on SQLite"] if server == "file" else floor["PostgreSQL: a durable commit"]

    for name, row in _rows(found).items():
        if not row["ours"]:
            continue
        starts = row.get("start of the child") or found["floors"]["start of the child (python -I -S)"]
        least, bare = median(starts) + commits(row["server"]), lock + commits(row["server"])
        worst = floors.p99(starts) + commits(row["server"])
        if gaps := _values(row, "handover", "gap"):
            if "warm" in name:
                yield f"{name}: planned gap", median(gaps) / bare, 8.0, "bare advisory locks, and its commits"
            else:
                most = 2.0 if "any program" in name else 1.4  # of whose start the interpreter's part is done before
                yield f"{name}: planned gap", median(gaps) / least, most, "starts of the child, and its commits"
            yield f"{name}: overlap", row["handover"]["overlap"] * 1000, 0.0, "ms"
            yield from _tail(f"{name}: planned gap", gaps, *((bare, 30.0) if "warm" in name else (worst, 3.0)))
        if gaps := _values(row, "in-process", "gap"):
            yield f"{name}: in-process", median(gaps) / bare, 6.0, "bare advisory locks, and its commits"
            yield from _tail(f"{name}: in-process", gaps, bare, 30.0)
        if took := _values(row, "crash", "took"):
            yield f"{name}: crash", median(took) / least, 2.4, "starts of the child, and its commits"
            yield from _tail(f"{name}: crash", took, worst, 4.0)
        if took := _values(row, "child", "took"):
            yield f"{name}: the child's crash", median(took) / least, 2.5, "starts of the child, and its commits"
            yield from _tail(f"{name}: the child's crash", took, worst, 4.0)
        if took := _values(row, "elsewhere", "took"):  # of its own timing, which no machine makes faster
            yield f"{name}: another host is gone", max(took) / elsewhere(row["ttl"]), 1.05, "of its bound"
        for fault in FAULTS:
            if overlaps := _values(row, fault, "overlap"):
                yield f"{name}: overlap, {fault}", max(overlaps) * 1000, 0.0, "ms"
        if "holder" in row.get("idle", {}):
            most = 22.0 if row["server"] == "file" else 26.0
            for who in ("holder", "standby"):
                yield f"{name}: PSS of the {who}", row["idle"][who]["pss"], most, "MB"
            writes = found["idle floor"]["SQLite" if row["server"] == "file" else "PostgreSQL (asyncpg)"]["cpu"]
            beats = 10 / row["ttl"]  # the floor writes a row each two seconds
            for who, most in (("holder", 4.0), ("standby", 3.0)):
                cpu = row["idle"][who]["cpu"] / writes / beats
                yield f"{name}: CPU of the {who}", cpu, most, "programs that write as often, and do nothing else"
        if took := _values(row, "start-up", ""):
            most = 2.3 if row["server"] == "file" else 3.3
            yield f"{name}: start-up", median(took) / python, most, "Pythons with asyncio"
    own = found.get("own", {})
    if "PostgreSQL writes" in own:
        writes = own["PostgreSQL writes"]
        yield "holder's statements", writes["holder"]["statements"], 0.53, "/s"  # of a minute: one more or less
        both = writes["holder and standby"]["statements"]
        yield "statements of a standby", both - writes["holder"]["statements"], 0.7, "/s"
        yield "writes of a standby", _standby_writes(writes), 1.3, "in 10 s"
        yield "WAL of a renewal", writes["holder"]["wal"], 250.0, "B"
        yield "renewals that are not HOT", 1 - writes["holder"]["hot"], 0.0, "of 1"
    for what in [k for k in own if k.startswith("new deployment")]:
        server = "file" if "SQLite" in what else "postgres"
        if "warm" in what:
            yield what, median(own[what]) / (lock + commits(server)), 10.0, "bare advisory locks, and its commits"
        else:
            start = floor["start of the child (python -I -S)"]
            yield what, median(own[what]) / (start + commits(server)), 1.6, "starts of the child, and its commits"
    for name in ("same host", "another host"):
        if "again" in (fleet := found.get("fleet", {}).get(name, {})):
            yield f"fleet: active again, {name}", fleet["again"] / fleet["bound"], 1.0, "of its bound"
            yield f"fleet: moved, {name}", fleet["moved"], 0.0, "bots"
    for key in ("renewal", "read"):
        if sizes := found.get("capacity", {}).get("growth"):
            first, *_, last = (each[key] for each in sizes.values())
            yield f"a {key} among 10,000 bots", last / first, 2.0, "of it with one"
    if MOST in (capacity := found.get("capacity", {})):
        yield "a renewal on a full server", capacity[FLOOR]["rate"] / capacity[MOST]["rate"], 4.0, "bare updates"
