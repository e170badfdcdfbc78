"""What the journal of terms says: for people, and as proof that no two terms of a bot overlapped. Pure.

The times are the database's own, each written in the statement that began or ended the term. So the proof is about
what was recorded: a term is closed after its work was reaped, or by its successor with the evidence it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from botlease.model import How, Probation, Reason

KNOWN: Final = frozenset(str(r) for r in Reason)
RHO: Final = 0.01


@dataclass(frozen=True, slots=True)
class Finding:
    bot: str
    term: int
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`verify` found for one bot."""

    bot: str
    terms: int
    handovers: int
    longest_gap: float
    """Seconds between two terms in which nobody worked; a bot that was stopped counts, too."""
    findings: tuple[Finding, ...]


def moment(value: Any) -> datetime | None:
    """A time of either database: PostgreSQL gives it with a zone, SQLite as text in UTC. None where there is none.
    Raises ValueError for what is no time."""
    if value is None:
        return None
    if isinstance(value, datetime):
        if value.tzinfo is None or not 1970 < value.year < 9000:  # infinity
            raise ValueError("no moment")
        return value
    parsed = datetime.fromisoformat(str(value))
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def verify(terms: Iterable[dict[str, Any]], leases: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Go through the journal, term by term, and through the leases as they stand."""
    bots: dict[str, list[dict[str, Any]]] = {}
    for row in terms:
        bots.setdefault(row["bot"], []).append(row)
    rows = {lease["bot"]: lease for lease in leases}
    return [
        _verify(bot, sorted(bots.get(bot, []), key=lambda r: r["term"]), rows.get(bot))
        for bot in sorted({*bots, *rows})
    ]


def _verify(bot: str, terms: list[dict[str, Any]], lease: dict[str, Any] | None) -> Verdict:
    found: list[Finding] = []
    gaps = [0.0]

    def say(term: int, what: str) -> None:
        found.append(Finding(bot, term, what))

    latest: tuple[datetime, int] | None = None  # the latest end so far, and whose
    before: dict[str, Any] | None = None
    for row in terms:
        number = row["term"]
        try:
            begun, ended, _ = (moment(row[k]) for k in ("acquired_at", "released_at", "last_beat"))
        except ValueError:
            say(number, "has a time that is none")
            continue
        if begun is None:
            say(number, "has no beginning")
            continue
        if ended is not None and ended < begun:
            say(
                number,
                f"ended {_span(begun - ended)} before it began: that clock was set back, or somebody wrote here",
            )
        if ended is None and row is not terms[-1]:
            say(number, f"has no end, though term {terms[-1]['term']} began after it")
        if (row["reason"] is None) is not (ended is None) or (row["reason"] or str(Reason.STOPPED)) not in KNOWN:
            say(number, f"ended for {row['reason']!a}, which is no reason we know")
        if latest is not None:
            if begun < latest[0]:
                say(number, f"OVERLAPS term {latest[1]} by {_span(latest[0] - begun)}")
            else:
                gaps.append((begun - latest[0]).total_seconds())
        if before is not None:
            _check_evidence(row, before, begun, say)
        if latest is None or (ended or begun) > latest[0]:
            latest = (ended or begun, number)
        before = row
    _check_lease(lease, terms[-1] if terms else None, say)
    return Verdict(bot, len(terms), max(0, len(terms) - 1), max(gaps), tuple(found))


def _check_evidence(row: dict[str, Any], before: dict[str, Any], begun: datetime, say: Any) -> None:
    """How a term began must fit how the one before it ended."""
    try:
        ended, beat = moment(before["released_at"]), moment(before["last_beat"])
    except ValueError:
        return
    taken = before["reason"] in (str(How.EXPIRED), str(How.DIED))
    # By whoever took over in the very statement that began the next term. Else that one came later, as where a fleet
    # buried it and it was found released, or where the terms between were pruned.
    buried = ended is not None and ended < begun
    if taken and row["how"] != before["reason"] and not buried:
        say(row["term"], f"began as {row['how']!a}, though term {before['term']} is said to have {before['reason']}")
    elif before["reason"] == How.EXPIRED and beat is not None and before["ttl"]:
        silence = ((ended or begun) - beat).total_seconds()
        if silence < before["ttl"] * (1 - RHO):
            say(
                row["term"],
                f"took over {silence:.1f} s after the last beat of term {before['term']}, whose ttl was "
                f"{before['ttl']:g} s: too early, or the database's clock was stepped",
            )


def _check_lease(lease: dict[str, Any] | None, last: dict[str, Any] | None, say: Any) -> None:
    if lease is None:
        if last is not None:
            say(last["term"], "has no lease beside it: its row was deleted")
        return
    if last is None:
        if lease["holder"] is not None and lease["holder"] != "unknown":
            say(lease["term"], f"is held by {lease['holder']} and not journalled")
        return
    if lease["term"] > last["term"] and lease["holder"] not in (None, "unknown"):
        say(lease["term"], f"is held by {lease['holder']} and not journalled")
    if lease["term"] < last["term"]:
        say(last["term"], f"is above the lease's term {lease['term']}: the lease went backwards")
    open_one = last["instance_id"] if last["released_at"] is None else None
    if lease["term"] == last["term"] and lease["holder"] != open_one:
        say(
            last["term"],
            f"is open for {open_one or 'nobody'} in the journal, and held by {lease['holder'] or 'nobody'}",
        )


def _span(d: timedelta) -> str:
    seconds = abs(d.total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def rows(terms: Iterable[dict[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """The journal in the documented form, for people and for scripts; ``lasted`` in seconds, of an open term so far."""
    out = []
    for row in terms:
        begun, ended = _moment_or_none(row["acquired_at"]), _moment_or_none(row["released_at"])
        lasted = None if begun is None else max(0.0, ((ended or now) - begun).total_seconds())
        out.append(
            {
                "bot": row["bot"],
                "term": row["term"],
                "instance_id": row["instance_id"],
                "deployment": row["deployment"],
                "host": row["host"],
                "from": _text(begun),
                "until": _text(ended),
                "lasted": lasted,
                "began": row["how"],
                "ended": row["reason"],
                "probation": {Probation.ON: "on", Probation.PASSED: "passed"}.get(row["probation"]),
            }
        )
    return out


def _moment_or_none(value: Any) -> datetime | None:
    try:
        return moment(value)
    except ValueError:
        return None


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="milliseconds")


def table(shown: list[dict[str, Any]], *, many: bool = False) -> list[tuple[str, ...]]:
    """As rows of cells, the first one the heading."""
    head = ("TERM", "INSTANCE", "DEPLOYMENT", "HOST", "FROM (UTC)", "UNTIL", "LASTED", "BEGAN", "ENDED", "PROBATION")
    out: list[tuple[str, ...]] = [("BOT", *head) if many else head]
    for r in shown:
        cells = (
            *(r["term"], r["instance_id"], r["deployment"], r["host"]),
            *((r["from"] or "-")[:19], (r["until"] or "-")[:19]),
            "-" if r["lasted"] is None else _span(timedelta(seconds=r["lasted"])),
            *(r["began"], r["ended"] or "still on", r["probation"]),
        )
        shown_cells = tuple("-" if c is None else str(c) for c in cells)
        out.append((str(r["bot"]), *shown_cells) if many else shown_cells)
    return out
