"""The simulation of tests/simulation.py over many seeds, on every core."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from simulation import Violation, World

from soak.report import Report

CHUNK = 20


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


def chunk(seeds: range) -> Sum:
    total = Sum()
    for seed in seeds:
        run_seed(seed, total)
    return total


def results(seeds: range, workers: int, go_on: Callable[[], bool] = lambda: True) -> Iterator[Sum]:
    """The sums of the chunks, for as long as ``go_on`` says. A worker that dies (SQLite crashed once) is an error, and
    not waited for for ever. No more is handed out than the workers need: a pool whose futures are cancelled may never
    end (it hung once in CPython 3.11)."""
    chunks = (seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK))
    # spawned, not forked: each worker is a process of its own, as one that replays a seed by hand
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: set[Future[Sum]] = set()
        while True:
            if go_on():
                waiting |= {pool.submit(chunk, part) for part in islice(chunks, 2 * workers - len(waiting))}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def run(first: int, seeds: int, workers: int, minutes: float = math.inf, least: int = 0) -> Report:
    """Over these seeds; on a machine that needs longer than ``minutes`` for them, over as many as it had time for, if
    that were ``least`` faults."""
    report, total = Report("simulation"), Sum()

    def go_on() -> bool:
        return len(report.failures) <= 20 and report.seconds <= minutes * 60

    for part in results(range(first, first + seeds), workers, go_on):
        total.add(part)
        for seed, text in part.failures:
            report.fail(f"{text}; again: scripts/soak replay {seed}")
        report.progress(f"{total.seeds:,} of {seeds:,} seeds, {sum(total.faults.values()):,} faults")
    if total.seeds < seeds and not report.failures:
        report.figures["stopped"] = f"after {minutes:g} minutes of {seeds:,} seeds: this machine is slow"
        if sum(total.faults.values()) < least:
            report.fail(f"this machine is too slow: {sum(total.faults.values()):,} faults, at least {least:,}")
    report.figures |= {
        "seeds": f"{total.seeds:,} (from {first})",
        "faults": f"{sum(total.faults.values()):,}",
        "kinds of faults": str(len(total.faults)),
        "terms": f"{total.terms:,}",
        "virtual hours": f"{total.virtual / 3600:,.0f}",
        "steps": f"{total.steps:,}",
        "findings": str(len(total.failures)),
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
    except Exception as e:
        broken = f"seed {seed}: {type(e).__name__}: {e}"
    print(world.plan)
    for line in world.lines or []:
        print(line)
    print(broken or f"seed {seed}: nothing broken, {sum(world.faults.values())} faults, {world.handovers} terms")
    return 1 if broken else 0
