"""The simulation of tests/simulation.py over many seeds, on every core."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from simulation import Violation, World

from soak.report import Report

CHUNK = 100


@dataclass
class Sum:
    seeds: int = 0
    steps: int = 0
    virtual: float = 0.0
    terms: int = 0
    slowest: float = 0.0  # recovery, as a part of its bound
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Sum) -> None:
        for name in ("seeds", "steps", "virtual", "terms", "failures"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest = max(self.slowest, other.slowest)
        self.faults.update(other.faults)


def run_seed(seed: int, total: Sum) -> None:
    world = World(seed)
    begun = world.time
    try:
        world.run()
    except Violation as e:
        total.failures.append((seed, str(e)))
    except Exception as e:  # a crash of the code under test is a finding as well
        total.failures.append((seed, f"seed {seed}: {type(e).__name__}: {e}"))
    total.seeds += 1
    total.steps += world.steps
    total.virtual += world.time - begun
    total.terms += world.handovers
    total.slowest = max(total.slowest, world.recovery / world.bound())
    total.faults.update(world.faults)


def chunk(first: int) -> Sum:
    total = Sum()
    for seed in range(first, first + CHUNK):
        run_seed(seed, total)
    return total


def results(first: int, seeds: int, workers: int) -> Iterator[Sum]:
    chunks = range(first, first + seeds, CHUNK)
    # spawned, not forked: each worker is a process of its own, as one that replays a seed by hand
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(chunk, chunks)


def run(first: int, seeds: int, workers: int) -> Report:
    report, total = Report("simulation"), Sum()
    for part in results(first, seeds, workers):
        total.add(part)
        for _, text in part.failures:
            report.fail(f"{text}; again: scripts/soak replay {text.split(':')[0].removeprefix('seed ')}")
        report.progress(f"{total.seeds:,} of {seeds:,} seeds, {sum(total.faults.values()):,} faults")
        if len(report.failures) > 20:
            break
    report.figures |= {
        "seeds": f"{total.seeds:,} (from {first})",
        "faults": f"{sum(total.faults.values()):,}",
        "kinds of faults": str(len(total.faults)),
        "terms": f"{total.terms:,}",
        "virtual hours": f"{total.virtual / 3600:,.0f}",
        "steps": f"{total.steps:,}",
        "overlaps": str(len(total.failures)),
        "slowest recovery": f"{total.slowest:.0%} of its bound",
    }
    for kind, count in total.faults.most_common():
        report.figures[f"fault: {kind}"] = f"{count:,}"
    return report


def replay(seed: int) -> int:
    """Print the story of one seed. Returns 1 if it breaks an invariant."""
    world = World(seed, tracing=True)
    broken = ""
    try:
        world.run()
    except Violation as e:
        broken = str(e)
    print(world.plan)
    for line in world.lines or []:
        print(line)
    print(broken or f"seed {seed}: nothing broken, {sum(world.faults.values())} faults, {world.handovers} terms")
    return 1 if broken else 0
