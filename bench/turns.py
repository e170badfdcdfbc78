"""The planned handovers that are nearly equally fast, once more and in turn.

System by system takes hours, and the machine is not the same in each: two series of one system differ by more than two
systems do. Here each round has one handover of each and one start of the child alone: what slows one slows all.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from statistics import median
from typing import Any

from bench import floors
from bench.compare import Line
from bench.lab import Gone, Lab, Say, bench, pause
from bench.systems import CHILD, systems

NEAR = 1.25
"""Of the fastest one's median: what is slower than that is not fast for the hour."""
ALONE = "floor: start of the child"


def near(rows: list[dict[str, Any]]) -> list[str]:
    """Ours, and the peers' that come near the fastest one on a server."""
    medians = {row["name"]: median(row["handover"]["gap"]) for row in rows if row.get("handover", {}).get("gap")}
    rows = [row for row in rows if row["name"] in medians]
    fastest = min((medians[row["name"]] for row in rows if not row["ours"] and row["server"] != "file"), default=0.0)
    return [row["name"] for row in rows if row["ours"] or medians[row["name"]] <= NEAR * fastest]


def measure(lab: Lab, rows: list[dict[str, Any]], say: Say, *, quick: bool) -> dict[str, list[float]]:
    """The gaps of each, seconds, one of a round, and the starts of the child alone. Of which fails it has fewer."""
    names = near(rows)
    if not names:
        raise Gone("no handover was measured before: --only peers")
    out: dict[str, list[float]] = {ALONE: []} | {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        lines = {
            system.name: Line(stack.enter_context(bench(lab, system)), bare=False)
            for system in systems()
            if system.name in names
        }
        rounds = 3 if quick else 30
        for done in range(rounds):
            say(f"in turn: {len(lines)} systems, {done} of {rounds} rounds")
            for name in random.sample([*names, ALONE], len(names) + 1):  # who comes after whom is not to matter
                if name == ALONE:
                    pause(0.5)  # the others wait as well until the one that waits is quiet
                    out[ALONE] += floors.starts(CHILD, lab.folder, 1)
                elif name in lines:
                    try:
                        out[name].append(lines[name].hand_over()[0])
                    except (Gone, subprocess.TimeoutExpired) as e:
                        say(f"in turn: {name}: {e}")
                        del lines[name]
    out = {name: gaps for name, gaps in out.items() if gaps}
    for name, gaps in out.items():
        say(f"in turn: {name}: {floors.ms(gaps)}")
    return out


def known(found: dict[str, Any]) -> dict[str, list[float]]:
    """What was measured in turn: nothing, if it failed."""
    values: dict[str, Any] = found.get("turns", {})
    return {} if "failed" in values else values
