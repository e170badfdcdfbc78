"""The judge over real processes: what the witnesses wrote, on one clock that nobody can step.

Every process of a bot appends "who term boottime" every 2 ms to one file (``tests/witness.py --who``). ``who`` is the
instance and the process the work began with, so that whatever a bot forks is the same work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

THAWED_FOR = 0.02
"""Seconds. When a whole cgroup is thawed after the end of trust, the reaper dies by its kernel timer and the work with
it; until the reaper got a CPU to die on, the work can run on another one: a slice of the scheduler on a busy machine
(research, E7: 0.37 ms; here 2.4, 3.6 and, with five worlds on two cores, a little over 5 ms, seed 5005). It is counted,
and bounded by this; docs/reliability.md, assumption 5."""


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Work:
    who: str
    term: int
    first: float
    last: float
    margin: float | None = None
    """Seconds in which nobody worked before its term began, stamps at a thaw apart; None for the first one, and for one
    that was started again within its term, which waits for nobody."""
    before_thaws: float = 0.0


class Oracle:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.works: dict[str, Work] = {}
        self.findings: list[str] = []
        self.thaws: list[float] = []
        self.residue: list[float] = []
        self.stamps = 0
        self.last = 0.0
        self._offset = 0
        self.latest: Work | None = None

    @property
    def highest(self) -> int:
        """The latest term under which anybody worked."""
        return max((w.term for w in self.works.values()), default=0)

    def read(self) -> None:
        """Take in what was written since the last time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as f:
            f.seek(self._offset)
            data = f.read()
        whole = data[: data.rfind(b"\n") + 1]  # a write across the border of a page can be seen half done
        self._offset += len(whole)
        for line in whole.splitlines():
            # A witness that is killed in the middle of a write, at the border of a page, leaves a piece of a line, in
            # which the next one goes on (world 500148 of 29 November, once in ten thousand faults).
            who, term, at = line[line.rfind(b"bot-") :].split()
            self.take(who.decode(), int(term), float(at))

    def take(self, who: str, term: int, at: float) -> None:
        self.stamps += 1
        key = f"{who}/{term}"
        work = self.works.get(key)
        if work is None:
            self._begin(key, term, at)
        elif self.latest is not work and self.latest is not None and at > self.latest.first:
            if self._thawed(at):
                self.residue.append(min(at - thaw for thaw in self.thaws if at >= thaw))
            else:
                self._overlap(work, self.latest, at - self.latest.first)
        else:
            work.last = max(work.last, at)
            if not self._thawed(at):
                work.before_thaws = work.last
        self.last = max(self.last, at)

    def _thawed(self, at: float) -> bool:
        return any(0 <= at - thaw <= THAWED_FOR for thaw in self.thaws)

    def _begin(self, key: str, term: int, at: float) -> None:
        new = Work(key, term, at, at, before_thaws=at)
        instance = key.partition("/")[0]
        for other in self.works.values():
            if other.last >= at:
                self._overlap(other, new, other.last - at)
            if other.term == term and other.who.partition("/")[0] != instance:
                self.findings.append(f"term {term} was used twice: by {other.who} and by {key}")
            if other.term > term:
                self.findings.append(f"term {term} of {key} began after term {other.term} of {other.who}")
        if self.latest is not None and self.latest.term != term:
            new.margin = at - max(w.before_thaws for w in self.works.values())
        self.works[key] = self.latest = new

    def _overlap(self, old: Work, new: Work, by: float) -> None:
        text = f"OVERLAP of {old.who} (term {old.term}) with {new.who} (term {new.term}) at {new.first:.6f}"
        if not any(f.startswith(text) for f in self.findings):
            self.findings.append(f"{text}, by {by * 1000:.3f} ms at least")
