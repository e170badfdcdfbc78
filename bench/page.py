"""docs/benchmarks.md and its plots, from the figures of one run."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench import ROOT, floors, plot
from bench.compare import FAULTS
from botlease import clock

PLOTS = ROOT / "docs" / "benchmarks"


def _ms(values: Any, *, digits: int = 1) -> str:
    """median / p99 / max, in ms."""
    if values is None:
        return "–"
    if isinstance(values, dict):
        return "failed" if "failed" in values else "–"
    low, high, top = median(values), floors.p99(values), max(values)
    return f"{low * 1000:,.{digits}f} / {high * 1000:,.{digits}f} / {top * 1000:,.{digits}f}"


def _of(row: dict[str, Any], part: str, key: str) -> Any:
    value = row.get(part)
    return value.get(key, value if "failed" in value else None) if isinstance(value, dict) else value


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def _name(row: dict[str, Any]) -> str:
    return f"**{row['name']}**" if row["ours"] else row["name"]


def _plot(name: str, title: str, unit: str, rows: list[tuple[str, float, float, bool]]) -> list[str]:
    if not rows:
        return []
    PLOTS.mkdir(exist_ok=True)
    rows = sorted(rows, key=lambda r: r[1])
    (PLOTS / f"{name}.svg").write_text(plot.bars(title, unit, rows))
    return [f"![{title}](benchmarks/{name}.svg)", ""]


def _bars(rows: list[dict[str, Any]], part: str, key: str) -> list[tuple[str, float, float, bool]]:
    out = []
    for row in rows:
        values = _of(row, part, key)
        if isinstance(values, list) and values and median(values) > 0:
            out.append((row["name"], median(values) * 1000, floors.p99(values) * 1000, row["ours"]))
    return out


def _overlap(row: dict[str, Any], fault: str) -> str:
    value = row.get(fault)
    if value is None:
        return "–"
    if "failed" in value:
        return "failed"
    if not value["took over"]:
        return "no takeover"
    worst = max(value["overlap"]) * 1000
    if worst < 0.05:
        return "0"
    return f"**{worst:,.0f}**" + (f" ({value['still']} of {value['runs']} still open)" if value["still"] else "")


def write(found: dict[str, Any]) -> Path:
    rows: list[dict[str, Any]] = found.get("peers", [])
    measured = [r for r in rows if not r.get("missing")]
    own: dict[str, Any] = found.get("own", {})
    lines = [
        "# Measured against the peers",
        "",
        "Written by `scripts/bench`; every figure of one run, beside its floor of the same run. Times in ms: median / p99 / max. Nothing here says what another machine",
        "would show; compare within a table. How each peer is set up: `bench/systems.py` and `bench/holder.py`, a mini-supervisor that starts the child when a library has its lock,",
        "ends it at SIGTERM, waits for it and gives the lock back. The child is the same everywhere: it writes a stamp every 2 ms (`tests/witness.py`, `python -I -S`).",
        "",
        f"{datetime.fromtimestamp(clock.wall(), UTC):%d %B %Y}; {os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release().split('-')[0]}; "
        + ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())
        + "; one node of each, on loopback, at its default durability.",
        "",
        "## Floors",
        "",
        *_table(("what", "ms"), [(k, _ms(v, digits=2)) for k, v in found["floors"].items()]),
        "",
    ]
    if rows:
        lines += _peers(rows, measured)
    if own:
        lines += _own(own)
    if "gateway" in found:
        lines += ["## The Bot API gateway", "", *(f"- {line}" for line in found["gateway"]), ""]
    if "fleet" in found:
        lines += _fleet(found["fleet"])
    if "capacity" in found:
        lines += _capacity(found["capacity"])
    path = ROOT / "docs" / "benchmarks.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _peers(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[str]:
    out = ["## What is compared", ""]
    out += _table(
        ("system", "version", "server", "settings"),
        [(_name(r), r["version"] or "–", r["server"], r["settings"]) for r in measured],
    )
    out += ["", *(f"- not measured: {r['name']}: {r['missing']}" for r in rows if r.get("missing")), ""]
    out += ["## Planned handover: the holder is told to stop while another one waits", ""]
    out += ["Gap: nobody works. The child's own start is in it; in-process there is none.", ""]
    out += _plot("handover", "Planned handover with a child: gap", "ms", _bars(measured, "handover", "gap"))
    out += _table(
        ("system", "gap", "from SIGTERM to the new one's first act", "overlap, worst", "gap in-process"),
        [
            (
                *(_name(r), _ms(_of(r, "handover", "gap")), _ms(_of(r, "handover", "total"))),
                f"{_of(r, 'handover', 'overlap') * 1000:.1f}"
                if isinstance(_of(r, "handover", "overlap"), float)
                else "–",
                _ms(_of(r, "in-process", "gap")),
            )
            for r in measured
            if "handover" in r
        ],
    )
    out += ["", "## Crash: until somebody works again", ""]
    out += [
        "Everything of the holder is killed with -9; elsewhere: its host has vanished as well, so that no connection ends and no kernel can tell.",
        "",
    ]
    out += _plot("crash", "Crash on the same host", "ms", _bars(measured, "crash", "took"))
    out += _table(
        ("system", "same host", "runs", "another host", "runs", "idle lease ends after"),
        [
            (
                *(_name(r), _ms(_of(r, "crash", "took"), digits=0), str(len(_of(r, "crash", "took") or []))),
                *(_ms(_of(r, "elsewhere", "took"), digits=0), str(len(_of(r, "elsewhere", "took") or []))),
                f"{r['ttl']:g} s" if r["ttl"] else "session or process",
            )
            for r in measured
            if "crash" in r
        ],
    )
    out += ["", "## Overlap: two children at work, ms", ""]
    out += [
        "Each fault lasts for two ttl (4 s where there is none), then is healed and watched for as long as the ttl, and 3 s. *Still open*: both were at work when watching ended.",
        "*No takeover*: the lock stays with what is stopped, which is safe and no failover.",
        "",
    ]
    out += _table(
        ("system", *FAULTS),
        [(_name(r), *(_overlap(r, f) for f in FAULTS)) for r in measured if any(f in r for f in FAULTS)],
    )
    out += ["", "## Idle", ""]
    idle = [r for r in measured if isinstance(r.get("idle"), dict) and "holder" in r["idle"]]
    out += _plot(
        "memory",
        "Memory of the holder, the bot apart (PSS)",
        "MB",
        [(r["name"], r["idle"]["holder"]["pss"], 0, r["ours"]) for r in idle if r["idle"]["holder"]["pss"] > 0],
    )
    out += _table(
        ("system", "holder: CPU s/h", "PSS MB", "requests/s", "standby: CPU s/h", "PSS MB", "requests/s"),
        [
            (
                _name(r),
                *(
                    f"{r['idle'][w][k]:.{d}f}"
                    for w in ("holder", "standby")
                    for k, d in (("cpu", 2), ("pss", 1), ("requests", 2))
                ),
            )
            for r in idle
        ],
    )
    out += ["", "Requests are what the client sends, counted on the wire; on files there is no wire.", ""]
    out += ["## Start-up: the whole run of `true`", ""]
    out += _table(("system", "ms"), [(_name(r), _ms(r.get("start-up"))) for r in measured if "start-up" in r])
    return [*out, ""]


def _own(own: dict[str, Any]) -> list[str]:
    out = [
        "## A newer deployment takes over",
        "",
        "What no peer has but the seed and notifelect. The old one stops, and its process tree is gone, before the new one begins.",
        "",
    ]
    names = [k for k, v in own.items() if isinstance(v, list)]
    out += _table(
        ("what", "gap, ms"),
        [(k if k != "advisory lock" else "floor: a bare advisory lock", _ms(own[k])) for k in names],
    )
    out += ["", "## What it writes", ""]
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
        ("killed on", "all its bots active again, s", "bound, s", "other bots moved", "start of all, s", "CPU s/h of a member", "PSS MB of a member"),
        [
            (k, f"{v['again']:.2f}", f"{v['bound']:.1f}", f"{v['moved']:.0f}", f"{v['start']:.1f}", f"{v['cpu']:.1f}", f"{v['pss']:.0f}")
            for k, v in fleet.items()
        ],
    )  # fmt: skip
    return [*out, ""]


def _capacity(capacity: dict[str, Any]) -> list[str]:
    out = [
        "## How many on one PostgreSQL server",
        "",
        f"Renewals from 64 connections, prepared, as the store does it where there is no pooler; the clients are on the same {os.cpu_count()} cores.",
        "",
    ]
    out += _table(
        ("what", "renewals/s", "latency, ms", "behind schedule, ms", "cores of the server"),
        [
            (k, f"{v['rate']:,.0f}", f"{v['latency'] * 1000:.1f}", f"{v['lag'] * 1000:.1f}", f"{v['cores']:.2f}")
            for k, v in capacity.items()
            if k != "growth"
        ],
    )
    out += ["", "A bot more in the same database, each with a supervisor of its own:", ""]
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
