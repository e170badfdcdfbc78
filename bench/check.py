"""What the figures have to be. :func:`goals`: what we set out to reach, for the page. :func:`broken`: what must not
become worse, for ``scripts/bench --check``: times are judged by their ratio to a floor of the same run, never by
themselves, as the floor is as slow as the machine. Memory, bytes and counts are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import floors
from bench.compare import FAULTS

OVERLAPPING = ("botlease, SQLite", "botlease, PostgreSQL", "botlease-fast, PostgreSQL")


@dataclass(frozen=True)
class Goal:
    what: str
    most: float
    found: float
    unit: str
    least: bool = False
    """``most`` is the least that it has to be."""

    @property
    def met(self) -> bool:
        return self.found >= self.most if self.least else self.found <= self.most


def _rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found.get("peers", []) if not row.get("missing")}


def _values(row: dict[str, Any], part: str, key: str) -> list[float]:
    value = row.get(part)
    if isinstance(value, list):
        return value
    return value.get(key, []) if isinstance(value, dict) else []


def goals(found: dict[str, Any]) -> list[Goal]:
    """Those for which there are figures."""
    out: list[Goal] = []
    rows = _rows(found)

    def goal(what: str, most: float, unit: str, measure: Callable[[], float], *, least: bool = False) -> None:
        try:
            out.append(Goal(what, most, measure(), unit, least))
        except (KeyError, IndexError, ValueError, TypeError):
            return  # it was not measured, or failed, and the tables say so

    def ms(name: str, part: str, key: str) -> float:
        return median(_values(rows[name], part, key)) * 1000

    networked = [
        (median(_values(row, "handover", "gap")) * 1000, name)
        for name, row in rows.items()
        if not row["ours"] and row["server"] != "file" and _values(row, "handover", "gap")
    ]
    commit, flock = (median(found["floors"][k]) * 1000 for k in ("a commit on SQLite", "flock: to a waiting process"))
    if networked:
        best, name = min(networked)
        goal(
            f"planned gap with a child, PostgreSQL, beside the fastest peer's ({name})",
            best,
            "ms",
            lambda: ms("botlease, PostgreSQL", "handover", "gap"),
        )
    if "flock" in rows and _values(rows["flock"], "handover", "gap"):
        goal(
            "planned gap with a child, SQLite, beside flock's and its commits",
            ms("flock", "handover", "gap") + 2 * commit + flock,
            "ms",
            lambda: ms("botlease, SQLite", "handover", "gap"),
        )
    for name in ("botlease, SQLite", "botlease, PostgreSQL"):
        goal(
            f"planned gap, p99, {name}",
            50,
            "ms",
            lambda name=name: floors.p99(_values(rows[name], "handover", "gap")) * 1000,
        )
        goal(f"crash on the same host, {name}", 50, "ms", lambda name=name: ms(name, "crash", "took"))
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
            ("2.5 ms for a bare advisory lock", 2.5),
            ("pg-advisory in-process", median(bare or [0]) * 1000),
        ):
            if bare:
                goal(
                    f"{what}, PostgreSQL, beside 1.5 of {beside}",
                    1.5 * lock,
                    "ms",
                    lambda name=name, part=part: ms(name, part, "gap"),
                )
    for name in ("botlease, PostgreSQL", "botlease-fast, PostgreSQL"):
        if name in rows:
            goal(
                f"another host is gone, worst, {name}",
                rows[name]["ttl"] * 1.01 + 1.2,
                "s",
                lambda name=name: max(_values(rows[name], "elsewhere", "took")),
            )
    for name in OVERLAPPING:
        for fault in FAULTS:
            goal(
                f"overlap, {fault}, {name}",
                0,
                "ms",
                lambda name=name, fault=fault: max(_values(rows[name], fault, "overlap")) * 1000,
            )
    own = found.get("own", {})
    writes = own.get("PostgreSQL writes", {})
    goal("statements of a holder", 0.5, "/s", lambda: writes["holder"]["statements"])
    goal("WAL of a renewal", 250, "B", lambda: writes["holder"]["wal"])
    goal("renewals that are HOT", 1, "of 1", lambda: writes["holder"]["hot"], least=True)
    goal(
        "statements of a standby (it looks in step with the beats, or another host would be noticed later)",
        0.1,
        "/s",
        lambda: writes["holder and standby"]["statements"] - writes["holder"]["statements"],
    )
    most_rate = found.get("capacity", {}).get("as many as it can", {})
    goal("holders of one server at ttl 3 s", 5000, "", lambda: most_rate["rate"] * 0.6, least=True)
    for name, value in found.get("fleet", {}).items():
        if isinstance(value, dict) and "again" in value:
            goal(f"fleet of 10,000, a process killed, {name}", value["bound"], "s", lambda value=value: value["again"])
            goal(f"bots moved that need not be, {name}", 0, "", lambda value=value: value["moved"])
    return out


def broken(found: dict[str, Any], parts: Collection[str] = ("peers",)) -> list[str]:
    """A line for each bound that is broken, and for each of these parts that could not be judged, in words."""
    lines = [f"{what}: {why}" for what, why in _missing(found, parts)]
    lines += [
        f"{what}: {value:.2f} {unit}, at most {most:g}" for what, value, most, unit in _bounds(found) if value > most
    ]
    return lines


def _missing(found: dict[str, Any], parts: Collection[str]) -> Iterator[tuple[str, str]]:
    for part in ("own", "fleet", "capacity", "gateway"):
        if isinstance(found.get(part), dict) and "failed" in found[part]:
            yield part, found[part]["failed"]
    ours = [row for row in found.get("peers", []) if row["ours"]]
    if not ours and "peers" in parts:
        yield "botlease", "nothing of ours was measured"
    for row in ours:
        if row.get("missing"):
            yield row["name"], row["missing"]
        for job, value in row.items():
            if isinstance(value, dict) and ("failed" in value or value.get("gone")):
                yield f"{row['name']}: {job}", value.get("failed") or value["gone"][0]
            elif job in FAULTS and job != "supervisor stopped" and value["took over"] < value["runs"]:
                yield f"{row['name']}: {job}", f"taken over in {value['took over']} of {value['runs']} runs"


def _bounds(found: dict[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    floor = {name: median(values) for name, values in found["floors"].items()}
    start, python = floor["start of the child (python -I -S)"], floor["python -c 'import asyncio'"]

    def commits(server: str) -> float:
        """Of the release and of the acquire: on PostgreSQL only the acquire waits for the disk. On a slow disk they are
        all of it."""
        return 2 * floor["a commit on SQLite"] if server == "file" else floor["PostgreSQL: a durable commit"]

    lock = floor["PostgreSQL: an advisory lock, let go here and had there"]
    for name, row in _rows(found).items():
        if not row["ours"]:
            continue
        least = start + commits(row["server"])
        if gaps := _values(row, "handover", "gap"):
            yield f"{name}: planned gap", median(gaps) / least, 2.5, "starts of the child, and its commits"
            yield f"{name}: overlap", row["handover"]["overlap"] * 1000, 0.0, "ms"
        if gaps := _values(row, "in-process", "gap"):
            bare = lock + commits(row["server"])
            yield f"{name}: in-process", median(gaps) / bare, 10.0, "bare advisory locks, and its commits"
        if took := _values(row, "crash", "took"):
            yield f"{name}: crash", median(took) / least, 5.0, "starts of the child, and its commits"
        if took := _values(row, "child", "took"):  # a bot that crashed is started again after a second
            yield f"{name}: the child's crash", (median(took) - 1) / least, 5.0, "starts of the child, and its commits"
        for fault in FAULTS:
            if overlaps := _values(row, fault, "overlap"):
                yield f"{name}: overlap, {fault}", max(overlaps) * 1000, 0.0, "ms"
        if "holder" in row.get("idle", {}):
            most = 22.0 if row["server"] == "file" else 26.0
            for who in ("holder", "standby"):
                yield f"{name}: PSS of the {who}", row["idle"][who]["pss"], most, "MB"
            writes = found["idle floor"]["SQLite" if row["server"] == "file" else "PostgreSQL (asyncpg)"]["cpu"]
            beats = 10 / row["ttl"]  # the floor writes a row each two seconds
            cpu = row["idle"]["holder"]["cpu"] / writes / beats
            yield f"{name}: CPU of the holder", cpu, 5.0, "programs that write as often, and do nothing else"
        if took := _values(row, "start-up", ""):
            yield f"{name}: start-up", median(took) / python, 3.0, "Pythons with asyncio"
    own = found.get("own", {})
    if "PostgreSQL writes" in own:
        yield "holder's statements", own["PostgreSQL writes"]["holder"]["statements"], 0.52, "/s"
        yield "WAL of a renewal", own["PostgreSQL writes"]["holder"]["wal"], 250.0, "B"
        yield "renewals that are not HOT", 1 - own["PostgreSQL writes"]["holder"]["hot"], 0.0, "of 1"
    for what in [k for k in own if k.startswith("new deployment")]:
        least = start + commits("file" if "SQLite" in what else "postgres")
        yield what, median(own[what]) / least, 3.0, "starts of the child, and its commits"
