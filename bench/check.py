"""What must not become worse. Times are judged by their ratio to a floor of the same run, never by themselves: the
floor is as slow as the machine. Memory, bytes and counts are the same on every machine.

Memory, WAL and statements are bounded by what the design asks for. The ratios of times are first guesses, to be set
from the first whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any


def broken(found: dict[str, Any]) -> list[str]:
    """A line for each bound that is broken, in words."""
    return [
        f"{what}: {value:.2f} {unit}, at most {most:g}" for what, value, most, unit in _bounds(found) if value > most
    ]


def _bounds(found: dict[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    floor = {name: median(values) for name, values in found["floors"].items()}
    start, python = floor["start of the child (python -I -S)"], floor["python -c 'import asyncio'"]
    for row in found.get("peers", []):
        name = row["name"]
        if not row["ours"] or row.get("missing"):
            continue
        if "gap" in row.get("handover", {}):
            yield f"{name}: planned gap", median(row["handover"]["gap"]) / start, 2.5, "starts of the child"
            yield f"{name}: overlap", row["handover"]["overlap"] * 1000, 0.0, "ms"
        if "took" in row.get("crash", {}):
            yield f"{name}: crash on the same host", median(row["crash"]["took"]) / start, 5.0, "starts of the child"
        for fault in ("kill -9 of the supervisor", "supervisor stopped", "connection cut"):
            if "overlap" in row.get(fault, {}):
                yield f"{name}: overlap, {fault}", max(row[fault]["overlap"]) * 1000, 0.0, "ms"
        if "holder" in row.get("idle", {}):
            most = 22.0 if row["server"] == "file" else 26.0
            for who in ("holder", "standby"):
                yield f"{name}: PSS of the {who}", row["idle"][who]["pss"], most, "MB"
        if isinstance(row.get("start-up"), list):
            yield f"{name}: start-up", median(row["start-up"]) / python, 3.0, "Pythons with asyncio"
    own = found.get("own")
    if own:
        yield "holder's statements", own["PostgreSQL writes"]["holder"]["statements"], 0.52, "/s"
        yield "WAL of a renewal", own["PostgreSQL writes"]["holder"]["wal"], 250.0, "B"
        yield "renewals that are not HOT", 1 - own["PostgreSQL writes"]["holder"]["hot"], 0.0, "of 1"
        lock = median(own["advisory lock"])
        yield "in-process, PostgreSQL", median(own["in-process, PostgreSQL"]) / lock, 12.0, "bare advisory locks"
