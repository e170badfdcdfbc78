"""docs/benchmarks.md and its plots, from the figures of one run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import ROOT, check, floors, plot
from bench.capacity import FLOOR
from bench.compare import FAULTS
from bench.systems import systems
from bench.turns import ALONE, known

PLOTS = ROOT / "docs" / "benchmarks"


def _ms(values: Any, *, digits: int = 1) -> str:
    """median / p99 / max, in ms, and of how many where it is not thirty."""
    if values is None:
        return "–"
    if isinstance(values, dict):
        return values.get("failed", "–")
    if not values:
        return "–"
    low, high, top = (x * 1000 for x in (median(values), floors.p99(values), max(values)))
    count = "" if len(values) == 30 else f" (of {len(values)})"
    return f"{low:,.{digits}f} / {high:,.{digits}f} / {top:,.{digits}f}{count}"


def _took(row: dict[str, Any], part: str, key: str = "took", *, digits: int = 0) -> str:
    value = row.get(part)
    if not isinstance(value, dict) or "failed" in value:
        return _ms(value)
    gone = value.get("gone", [])
    words = [_ms(value[key], digits=digits)] if value[key] else []
    words += [f"{gone[0]}: {len(gone)} of {len(gone) + len(value[key])}"] if gone else []
    return "; ".join(words)


def _of(row: dict[str, Any], part: str, key: str) -> Any:
    value = row.get(part)
    return value.get(key, value if "failed" in value else None) if isinstance(value, dict) else value


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]


def _name(row: dict[str, Any]) -> str:
    return f"**{row['name']}**" if row["ours"] else row["name"]


def _plot(
    name: str, title: str, unit: str, rows: list[tuple[str, float, float, str]], *, log: bool = True
) -> list[str]:
    if not rows:
        return []
    PLOTS.mkdir(exist_ok=True)
    rows = sorted(rows, key=lambda r: r[1])
    drawing = plot.dots(f"{title} (median, and a line to the p99)", unit, rows) if log else plot.bars(title, unit, rows)
    (PLOTS / f"{name}.svg").write_text(drawing)
    return [f"![{title}](benchmarks/{name}.svg)", ""]


def _bars(
    rows: list[dict[str, Any]], part: str, key: str, scale: float = 1000.0
) -> list[tuple[str, float, float, str]]:
    out = []
    for row in rows:
        values = _of(row, part, key)
        if isinstance(values, list) and values and median(values) > 0:
            colour = plot.OURS if row["ours"] else plot.THEIRS
            out.append((row["name"], median(values) * scale, floors.p99(values) * scale, colour))
    return out


def _floor(found: dict[str, Any], what: str, scale: float = 1000.0) -> list[tuple[str, float, float, str]]:
    values = found["floors"].get(what, [])
    return [(f"floor: {what}", median(values) * scale, floors.p99(values) * scale, plot.FLOOR)] if values else []


def _overlap(row: dict[str, Any], fault: str) -> str:
    value = row.get(fault)
    if value is None:
        return "–"
    if "failed" in value:
        return str(value["failed"])
    if not value["took over"]:
        return "no takeover"
    some = "" if value["took over"] == value["runs"] else f" (taken over in {value['took over']} of {value['runs']})"
    if max(value["overlap"]) < 0.00005:
        return "0" + some
    if value["still"] == value["took over"]:  # how long it was is how long we looked
        return f"**never ended** ({min(v for v in value['overlap'] if v):,.1f} s and more were watched)" + some
    still = f" ({value['still']} of {value['runs']} never ended)" if value["still"] else ""
    return f"**{_ms(value['overlap'], digits=0)}**" + some + still


def _blind(measured: list[dict[str, Any]]) -> str:
    """How short an overlap may not have been seen."""
    worst = [v * 1000 for r in measured for f in FAULTS for v in (r.get(f) or {}).get("blind", [])]
    if not worst:
        return ""
    return f" Two stamps of a child were at most {median(worst):.0f} ms apart in half of the runs, {max(worst):.0f} ms in the worst: an overlap shorter than that may not have been seen."


def _short(found: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """What somebody wants to know who reads nothing else."""
    rows = {r["name"]: r for r in measured}
    peers = [r for r in measured if not r["ours"]]

    def least(server: bool, figure: Callable[[dict[str, Any]], float | None]) -> str:
        """Of the peers on a server, or on files."""
        values = [(v, r["name"]) for r in peers if (r["server"] != "file") is server and (v := figure(r)) is not None]
        if not values:
            return "–"
        value, name = min(values)
        return f"{value:,.1f} ({name})"

    def ours(name: str, figure: Callable[[dict[str, Any]], float | None]) -> str:
        value = figure(rows[name]) if name in rows else None
        return "–" if value is None else f"{value:,.1f}"

    def of(part: str, key: str, *, scale: float = 1000) -> Callable[[dict[str, Any]], float | None]:
        def figure(row: dict[str, Any]) -> float | None:
            values = _of(row, part, key)
            return median(values) * scale if isinstance(values, list) and values else None

        return figure

    def used(what: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: (row.get("idle", {}).get("holder") or {}).get(what)

    def open_for(row: dict[str, Any]) -> float | None:
        """Of who took over each time: who never does has no overlap either."""
        found = [row[f] for f in FAULTS if f in row]
        if not found or any("failed" in f or f["took over"] < f["runs"] for f in found):
            return None
        return max(max(f["overlap"]) for f in found)

    floor = {k: f"{median(v) * 1000:,.1f}" for k, v in found["floors"].items() if v}
    start = floor.get("start of the child (python -I -S)", "–")
    lock = floor.get("PostgreSQL: an advisory lock, let go here and had there", "–")
    plain, warm, inside = "botlease, {}", "botlease, warm, {}", "botlease.active, {}"
    table = [
        (what, *(ours(name.format(where), figure) for where in ("PostgreSQL", "SQLite")), *(least(server, figure) for server in (True, False)), beside)
        for what, name, figure, beside in (
            ("planned handover of a program, ms", plain, of("handover", "gap"), start),
            ("the same, of one that waits at its gate (peers: in a program)", warm, of("handover", "gap"), lock),
            ("planned handover in a program, ms", inside, of("in-process", "gap"), lock),
            ("crash of the child, ms", plain, of("child", "took"), start),
            ("crash of everything, same host, ms", plain, of("crash", "took"), start),
            ("the host is gone, s", plain, of("elsewhere", "took", scale=1), "–"),
            ("longest overlap in three faults, s", plain, open_for, "0"),
            ("processor time of an idle holder, s/h", plain, used("cpu"), "–"),
            ("memory of a holder (PSS), MB", plain, used("pss"), "–"),
        )
    ]  # fmt: skip
    out = ["## In short", ""]
    out += _table(
        ("median", "botlease, PostgreSQL", "SQLite", "least of the peers on a server", "on files", "floor"), table
    )
    return [
        *out,
        "",
        "Of the peers it is another one in nearly every row: none has them all. Of the overlap only those count that took over in each fault. Ours are the defaults; a Python bot's interpreter is loaded while its instance stands by, see *any program* below for others.",
        "",
    ]


def _goals(found: dict[str, Any]) -> list[str]:
    goals = check.goals(found)
    if not goals:
        return []
    out = ["## What we set out to reach", ""]
    out += _table(
        ("what", "asked", "measured", ""),
        [
            (g.what, f"{'≥' if g.least else '≤'} {g.most:,.4g} {g.unit}", *_judged(g))
            for g in goals
        ],
    )  # fmt: skip
    return [
        *out,
        "",
        'Why what was missed was missed: [design.md](design.md), "What we set out to reach and did not".',
        "",
    ]


def _judged(goal: check.Goal) -> tuple[str, str]:
    if goal.found is None:
        return "–", "not measured"
    return "never" if goal.found == math.inf else f"{goal.found:,.4g}", "met" if goal.met else "**missed**"


def write(found: dict[str, Any]) -> Path:
    order = {system.name: n for n, system in enumerate(systems())}  # and not that in which parts of a run measured them
    rows: list[dict[str, Any]] = sorted(found.get("peers", []), key=lambda row: order.get(row["name"], len(order)))
    measured = [r for r in rows if not r.get("missing")]
    lines = [
        "# Measured against the peers",
        "",
        "Written by `scripts/bench`; every figure stands beside its floor. Times in ms: median / p99 / max, of thirty runs if nothing else is said (of thirty the p99 is the largest). Nothing here says",
        "what another machine would show; compare within a table. How each peer is set up: `bench/systems.py` and `bench/holder.py`, a mini-supervisor that starts the child when a library has its lock,",
        "ends it at SIGTERM, waits for it and gives the lock back. The child is the same everywhere: it writes a stamp every 2 ms (`tests/witness.py`, `python -I -S`).",
        "",
        f"{' and '.join(found.get('days', ['?']))}; {'; '.join(found.get('machines', ['?']))}; "
        + ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())
        + "; one node of each, on loopback, at the settings that it has by itself, but for PostgreSQL's autovacuum and timed checkpoints, which are off where bytes and times are measured, as they come when they like (redis and files on the same disk as the rest)."
        + (
            " It was measured in parts, with the servers started anew for each: the floors are of all of them."
            if len(found.get("days", [])) > 1 or " and " in found.get("versions", {}).get("botlease", "")
            else ""
        ),
        "",
    ]
    if rows:
        lines += _short(found, measured)
        lines += _peers(found, measured)
    lines += _newer(found.get("own", {}), measured)
    for part, show in (("own", _own), ("gateway", _gateway), ("fleet", _fleet), ("capacity", _capacity)):
        value = found.get(part)
        if isinstance(value, dict) and "failed" in value:
            lines += [f"## {part}", "", f"Not measured: {value['failed']}", ""]
        elif value:
            lines += show(value)
    lines += _goals(found)
    if rows:
        lines += _compared(rows, measured)
    lines += ["## Floors", "", *_table(("what", "ms"), [(k, _ms(v, digits=2)) for k, v in found["floors"].items()])]
    path = ROOT / "docs" / "benchmarks.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _in_turn(found: dict[str, Any]) -> list[str]:
    if not (gaps := known(found)):
        return []
    alone = median(gaps[ALONE])
    return [
        "",
        "The nearly fastest ones once more, in turn: each round had one handover of each, in any order, and one start of the child. The series above are hours apart, and what slowed one did not slow the next.",
        "",
        *_table(
            ("system", "gap", "median, beyond the child's start"),
            [
                (f"**{name}**" if name.startswith("botlease") else name, _ms(values), "–" if name == ALONE else f"{(median(values) - alone) * 1000:.1f}")
                for name, values in sorted(gaps.items(), key=lambda of: median(of[1]))
            ],
        ),
    ]  # fmt: skip


def _compared(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[str]:
    out = ["## What is compared", ""]
    out += _table(
        ("system", "version", "server", "settings", "measured at"),
        [(_name(r), r["version"] or "–", r["server"], r["settings"], " ".join(r.get("commits", ["?"]))) for r in measured],
    )  # fmt: skip
    known = {r["name"] for r in rows}
    out += ["", *(f"- not measured: {r['name']}: {r['missing']}" for r in rows if r.get("missing"))]
    return [*out, *(f"- not measured yet: {s.name}" for s in systems() if s.name not in known), ""]


def _peers(found: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    out = ["## Planned handover: the holder is told to stop while another one waits", ""]
    out += [
        "Gap: nobody works. The child's own start is in it: with ours that of the program alone, as a standby has loaded its interpreter; all of it with *any program* (`--no-ahead`), as for a bot in another language. In-process, and warm, there is none. The holder is told at any moment between two looks of those that look. In notifelect's election the newest one has it, and when that is told to stop the first one has it again. In the seed's plain design nobody waits.",
        "",
    ]
    child = _floor(found, "start of the child (python -I -S)")
    out += _plot("handover", "Planned handover with a child: gap", "ms", [*_bars(measured, "handover", "gap"), *child])
    lock = _floor(found, "PostgreSQL: an advisory lock, let go here and had there")
    lock += _floor(found, "flock: to a waiting process")
    out += _plot("in-process", "Planned handover in-process: gap", "ms", [*_bars(measured, "in-process", "gap"), *lock])
    out += _table(
        ("system", "gap", "the child's start alone, just before", "from SIGTERM to the new one's first act", "overlap, worst", "gap in-process"),
        [
            (
                *(_name(r), _took(r, "handover", "gap", digits=1), _ms(r.get("start of the child")), _ms(_of(r, "handover", "total"))),
                f"{_of(r, 'handover', 'overlap') * 1000:.1f}"
                if isinstance(_of(r, "handover", "overlap"), float)
                else "–",
                _took(r, "in-process", "gap", digits=1),
            )
            for r in measured
            if "handover" in r or "in-process" in r
        ],
    )  # fmt: skip
    out += _in_turn(found)
    out += ["", "## Crash: until somebody works again", ""]
    out += [
        "The child alone is killed with -9 (ours is started again in its place; with the peers the holder ends, and the one that waits follows); everything of the holder is;",
        "another host: that of the holder, a network namespace, has vanished, so that no connection ends and no kernel can tell. Where a session holds the lock the server must find out by itself: after two",
        "hours as Linux has it, sooner where it is told to look (pg-advisory-fast). Faults come at any moment between two renewals. Where a lease is waited out fifteen run at once. Who never took over is not in the plot.",
        "",
    ]
    death = _floor(found, "a death, seen by pidfd")
    out += _plot("crash", "Crash on the same host", "ms", [*_bars(measured, "crash", "took"), *child, *death])
    out += _plot("another-host", "The holder's host is gone", "s", _bars(measured, "elsewhere", "took", 1.0))
    out += _table(
        ("system", "the child", "everything, same host", "another host", "idle lease ends after"),
        [
            (
                *(_name(r), *(_took(r, part) for part in ("child", "crash", "elsewhere"))),
                f"{r['ttl']:g} s" if r["ttl"] else "session or process",
            )
            for r in measured
            if "crash" in r or "elsewhere" in r
        ],
    )
    out += ["", "## Overlap: two children at work, ms", ""]
    out += [
        "Each fault lasts for two ttl (4 s where there is none), then is healed and watched for as long as the ttl, and 3 s; where a second one does not wait (the seed, notifelect) it comes just after the fault. *Never ended*: both were at work when watching ended.",
        "*No takeover*: the lock stays with what is stopped, which is safe and no failover. Where a system waits for half a minute and longer by default, and for tooz-zk and python-redis-lock, the faster settings stand for it. What a library does about a lost lock",
        "is wired by us for kazoo, redis-py, dislock, mithril, pg-advisory-fast and the seed: the child is killed. The others say nothing of it. A program that has its work inside, without a child, leaves no child when it is killed."
        + _blind(measured),
        "",
    ]
    out += _table(
        ("system", *FAULTS),
        [(_name(r), *(_overlap(r, f) for f in FAULTS)) for r in measured if any(f in r for f in FAULTS)],
    )
    return [*out, "", *_idle(found, measured)]


def _idle(found: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    out = ["## Idle", ""]
    out += [
        "One window each, of five renewals and of 40 s (where there is no PostgreSQL 20 s) at least, in three parts: of the processor time their least and most stand in brackets.",
        "",
    ]
    idle = [r for r in measured if isinstance(r.get("idle"), dict) and "holder" in r["idle"]]
    colour = {True: plot.OURS, False: plot.THEIRS}
    out += _plot(
        "memory",
        "Memory of the holder, the bot apart (PSS)",
        "MB",
        [(r["name"], r["idle"]["holder"]["pss"], 0, colour[r["ours"]]) for r in idle if r["idle"]["holder"]["pss"] > 0],
        log=False,
    )

    def cells(r: dict[str, Any]) -> Iterator[str]:
        for who in ("holder", "standby"):
            its = r["idle"].get(who)
            for key, digits in (("cpu", 2), ("pss", 1), ("rss", 1), ("requests", 2)):
                spread = its.get("cpus") if its and key == "cpu" else None
                more = f" ({min(spread):.{digits}f} to {max(spread):.{digits}f})" if spread else ""
                yield "–" if its is None or its.get(key) is None else f"{its[key]:.{digits}f}{more}"

    out += _table(
        ("system", "holder: CPU s/h", "PSS MB", "RSS MB", "requests/s", "standby: CPU s/h", "PSS MB", "RSS MB", "requests/s"),
        [(_name(r), *cells(r)) for r in idle]
        + [
            (f"floor: a row each 2 s, {name}", f"{its['cpu']:.2f}", f"{its['pss']:.1f}", f"{its.get('rss', 0):.1f}", *"–––––")
            for name, its in found.get("idle floor", {}).items()
        ],
    )  # fmt: skip
    failed = [f"- {r['name']}: {r['idle']['failed']}" for r in measured if "failed" in r.get("idle", {})]
    out += ["", *failed, *([""] if failed else [])]
    out += [
        "Requests are what the client sends, counted on the wire; on files there is no wire. The floor is a program that does nothing but write one row each two seconds. The holder's memory is measured alone; a standby's beside it, with which it shares pages. RSS counts what two processes share twice. The bench is a Python beside them, so that PSS is some 1 MB less than alone. mithril's processor time has our look four times a second in it, notifelect's our ten.",
        "",
    ]
    asked = [r for r in idle if "database" in r["idle"]]
    if asked:
        out += ["What the PostgreSQL server does for it in an hour:", ""]
        out += _table(
            ("system", "holder: transactions", "WAL, kB", "transaction ids", "with a standby: transactions", "WAL, kB", "transaction ids"),
            [
                (
                    _name(r),
                    *(
                        f"{r['idle']['database'][who][key] / scale:,.0f}" if who in r["idle"]["database"] else "–"
                        for who in ("holder", "holder and standby")
                        for key, scale in (("statements", 1), ("wal", 1000), ("xids", 1))
                    ),
                )
                for r in asked
            ]
            + [
                ("floor: nobody", *(f"{found['nobody'][k] / s:,.0f}" for k, s in (("statements", 1), ("wal", 1000), ("xids", 1))), "–", "–", "–")
            ],
        )  # fmt: skip
        out += [""]
    out += ["## Start-up: the whole run of `true`", ""]
    out += _table(
        ("system", "ms"),
        [
            ("floor: `true` alone", _ms(found["floors"].get("true"))),
            *((_name(r), _ms(r.get("start-up"))) for r in measured if "start-up" in r),
        ],
    )
    return [*out, ""]


def _gateway(lines: list[str]) -> list[str]:
    return ["## The Bot API gateway", "", *(f"- {line}" for line in lines), ""]


def _newer(own: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    out = [
        "## A newer deployment takes over",
        "",
        "A second one is started while the first works, and nobody tells that one to stop. What no peer has but the seed and notifelect. With us the old one stops, and its process tree is gone, before the new one",
        "begins. Below zero both worked.",
        "",
    ]
    ours = [(f"**{k}**", _ms(v), "0") for k, v in own.items() if isinstance(v, list)]
    theirs = [(r["name"], _took(r, "preempt", "gap"), _longest(r["preempt"])) for r in measured if "preempt" in r]
    return [*out, *_table(("what", "gap, ms", "longest overlap, ms"), [*ours, *theirs]), ""] if ours or theirs else []


def _longest(preempt: dict[str, Any]) -> str:
    if any("the first one's end" in why for why in preempt.get("gone", [])):
        return "did not end"
    return f"{max(0.0, -min(preempt['gap'])) * 1000:,.0f}" if preempt.get("gap") else "–"


def _own(own: dict[str, Any]) -> list[str]:
    out = ["## What it writes", ""]
    rows = [
        (name, f"{w['statements']:.2f}", f"{w['wal']:.0f}", f"{w['hot']:.0%}", f"{w['xids']:,.0f}")
        for name, w in own["PostgreSQL writes"].items()
    ]
    out += _table(
        ("PostgreSQL, ttl 10 s", "statements/s", "bytes of WAL per renewal", "HOT", "transaction ids per hour"), rows
    )
    return [*out, "", f"SQLite: {own['SQLite commits']:.2f} commits/s of holder and standby together.", ""]


def _fleet(fleet: dict[str, Any]) -> list[str]:
    out = [
        "## Many bots in one program",
        "",
        "`botlease.Fleet`: 10,000 bots over 4 processes, ttl 10 s, one process killed ([fleet.md](fleet.md)).",
        "",
    ]
    out += _table(
        ("killed on", "all its bots active again, s", "bound, s", "other bots moved", "start of all, s", "CPU s/h of a member", "PSS MB of a member", "transactions/s", "WAL kB/s", "cores of the server"),
        [
            (k, f"{v['again']:.2f}", f"{v['bound']:.1f}", f"{v['moved']:.0f}", f"{v['start']:.1f}", f"{v['cpu']:.1f}", f"{v['pss']:.0f}", f"{v['statements']:.2f}", f"{v['wal'] / 1000:.1f}", f"{v['cores']:.3f}")
            for k, v in fleet.items()
            if k != "growth"
        ],
    )  # fmt: skip
    out += ["", "One run each. One process alone, and more and more bots in it:", ""]
    out += _table(
        ("bots", "CPU s/h", "PSS MB", "transactions/s", "WAL kB/s", "cores of the server"),
        [
            (f"{int(k):,}", f"{v['cpu']:.1f}", f"{v['pss']:.0f}", f"{v['statements']:.2f}", f"{v['wal'] / 1000:.1f}", f"{v['cores']:.3f}")
            for k, v in fleet.get("growth", {}).items()
        ],
    )  # fmt: skip
    return [*out, ""]


def _capacity(capacity: dict[str, Any]) -> list[str]:
    out = [
        "## How many on one PostgreSQL server",
        "",
        "Renewals from 64 connections, each fifth with the instance's heartbeat in it, as the store has it, for a minute, with vacuum and checkpoints; prepared if nothing else is said, as where there is no pooler; the clients are on the same cores as the server. So many holders need a pooler, or a fleet: each supervisor by itself has a",
        "connection of its own, and a process of the server. What the pooler itself takes is not in it. A standby adds a read for each renewal.",
        "",
    ]
    out += _table(
        ("what", "renewals/s", "leases at ttl 10 s", "at ttl 3 s", "latency, ms", "behind schedule, ms", "cores of the server"),
        [
            (k, f"{v['rate']:,.0f}", *(f"{v['rate'] * 0.2 * ttl:,.0f}" if k != FLOOR else "–" for ttl in (10, 3)), f"{v['latency'] * 1000:.1f}", f"{v['lag'] * 1000:.1f}", f"{v['cores']:.2f}")
            for k, v in capacity.items()
            if k != "growth"
        ],
    )  # fmt: skip
    out += ["", "A holder renews each fifth of its ttl: so many renewals are so many leases, times 0.2 ttl.", ""]
    out += ["A bot more in the same database, each with a supervisor of its own:", ""]
    out += _table(
        ("bots", "a renewal, ms", "a read, ms"),
        [
            (f"{int(k):,}", f"{v['renewal'] * 1000:.2f}", f"{v['read'] * 1000:.2f}")
            for k, v in capacity["growth"].items()
        ],
    )
    return [*out, ""]


if __name__ == "__main__":
    import json

    print(write(json.loads(Path(sys.argv[1]).read_text())))
