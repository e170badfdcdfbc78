"""Whether the journal says what the witnesses say, and how much of a difference a fault explains. Pure."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from soak.oracle import Work

EXACT = 0.05
"""Seconds: the journal has the wall clock, which is slewed; the witnesses have the clock of the boot."""
NEXT = 2
"""How many terms that begin after a fault can still show it: the one that was on its way, and the one that follows."""
WHAT = {
    "clock": "before it began|too early",
    "edited": "lease|not journalled|took over|is open for",
    "lost": "",
    "emptied": "",
    "typed": "",
}
"""The words of what each can leave behind."""


@dataclass
class Harm:
    """What a fault did to the database: "clock" (stepped), "edited" (a lease, by hand), "lost" (its last rows),
    "emptied", "typed" (whatever an operator thought of); and the highest terms seen before and after it."""

    kind: str
    first: int
    last: int = -1  # while it goes on

    def end(self, terms: list[int]) -> int:
        """The last of these (sorted) that can still show it."""
        after = bisect_right(terms, self.last)
        return terms[after + NEXT - 1] if after + NEXT <= len(terms) else 1 << 62


def differences(
    rows: Iterable[dict[str, Any]],
    said: Iterable[dict[str, Any]],
    works: Iterable[Work],
    harms: list[Harm],
    offset: float | None,
) -> tuple[list[str], int]:
    """What nothing explains of what ``verify`` said (its findings), and of where ``history`` (its rows) and the
    witnesses differ; and how many differences a fault does explain. ``offset``: what the wall clock is ahead of the
    witnesses' clock; None where it is stepped."""
    journal = {row["term"]: row for row in rows}
    works = list(works)
    terms = sorted({*journal, *(w.term for w in works)})

    def explains(harm: Harm, term: int, what: str) -> bool:
        overlap = re.match(r"OVERLAPS term (\d+)", what)
        if harm.kind == "clock" and overlap:  # the step lies between the two
            return int(overlap[1]) <= harm.end(terms) and term >= harm.first
        if term > harm.end(terms) or overlap or (term < harm.first and harm.kind != "emptied"):
            return False
        return bool(re.search(WHAT[harm.kind], what))

    found = [(f["term"], f"verify: term {f['term']} {f['what']}") for f in said]
    for work in works:
        row = journal.get(work.term)
        if row is None:
            found.append((work.term, f"the journal has no term {work.term}, under which {work.who} worked"))
            continue
        if row["instance_id"] != work.who.partition("/")[0]:
            found.append((work.term, f"the journal gives term {work.term} of {work.who} to {row['instance_id']}"))
        if offset is None:
            continue
        early = _seconds(row["from"]) - work.first - offset
        # What escaped a stopped holder may outlive the end that its successor writes, until that has killed it.
        released = row["until"] and row["ended"] not in ("expired", "died")
        late = work.before_thaws + offset - _seconds(row["until"]) if released else 0.0
        if early > EXACT:
            found.append((work.term, f"{work.who} worked {early:.3f} s before its term began in the journal"))
        if late > EXACT:
            found.append((work.term, f"{work.who} worked {late:.3f} s after its term had ended in the journal"))
    left = [
        text
        for term, text in found
        if not any(explains(h, term, text.removeprefix(f"verify: term {term} ")) for h in harms)
    ]
    return left, len(found) - len(left)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
