"""``verify`` believes what the journal says, and finds what cannot be true."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from botlease import journal
from botlease.commands.see import of_one_moment
from botlease.model import Held
from botlease.stores import open_store
from botlease.testing import DEADLINE, STOPPED, acquire, claim, lease_of, registration

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def term(number: int, begun: float, ended: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "bot": "b",
        "term": number,
        "instance_id": f"i{number}",
        "deployment": "d",
        "host": "h",
        "how": "released",
        "acquired_at": at(begun),
        "released_at": None if ended is None else at(ended),
        "reason": None if ended is None else "stopped",
        "probation": "",
        "last_beat": None,
        "ttl": None,
    }
    return row | more


def lease(number: int, holder: str | None) -> dict[str, Any]:
    return {"bot": "b", "term": number, "holder": holder}


GOOD = [
    term(1, 0, 10),
    term(2, 10.004, 20, reason="expired", last_beat=at(9), ttl=10.0) | {"last_beat": at(9.5), "released_at": at(20)},
    term(1005, 20, 30, how="expired", reason="died"),
    term(1006, 30, None, how="died"),
]


def found(terms: list[dict[str, Any]], row: dict[str, Any] | None) -> list[str]:
    return [f"{f.term}: {f.what}" for v in journal.verify(terms, [row] if row else []) for f in v.findings]


def test_a_journal_without_overlap_is_believed() -> None:
    (verdict,) = journal.verify(GOOD, [lease(1006, "i1006")])
    assert verdict.findings == () and (verdict.terms, verdict.handovers) == (4, 3)
    assert verdict.longest_gap == pytest.approx(0.004)


def test_a_term_that_a_fleet_has_buried_is_followed_by_one_that_found_it_released() -> None:
    silent = {"last_beat": at(9.5), "ttl": 10.0}
    buried = [term(1, 0, 21, reason="expired", **silent), term(2, 21.5, None)]
    assert found(buried, lease(2, "i2")) == []
    early = [term(1, 0, 15, reason="expired", **silent), term(2, 21.5, None)]
    assert "took over 5.5 s after the last beat of term 1" in found(early, lease(2, "i2"))[0]


def test_terms_between_two_others_that_were_pruned_are_not_missed() -> None:
    """What a quarantine rests on is kept for longer than what came after it."""
    pruned = [term(3, 0, 10, reason="died", probation="on"), term(5, 600, None, how="expired")]
    assert found(pruned, lease(5, "i5")) == []


def test_no_journal_is_no_finding() -> None:
    assert journal.verify([], []) == []
    assert found([], lease(0, None)) == [] and found([], lease(3, "unknown")) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({1: {"acquired_at": at(9)}}, "2: OVERLAPS term 1 by 1.0 s"),
        ({1: {"acquired_at": at(9.9999)}}, "2: OVERLAPS term 1 by 0 ms"),
        ({0: {"released_at": None, "reason": None}}, "1: has no end, though term 1006 began after it"),
        ({0: {"released_at": at(25)}}, "2: OVERLAPS term 1 by 15.0 s"),
        ({0: {"released_at": at(-5)}}, "1: ended 5.0 s before it began"),
        ({0: {"released_at": "yesterday"}}, "1: has a time that is none"),
        ({0: {"acquired_at": None}}, "1: has no beginning"),
        ({0: {"released_at": datetime.max}}, "1: has a time that is none"),  # infinity
        ({0: {"acquired_at": datetime.min.replace(tzinfo=UTC)}}, "1: has a time that is none"),
        ({0: {"reason": "felt like it"}}, "1: ended for 'felt like it', which is no reason we know"),
        ({0: {"reason": None}}, "1: ended for None, which is no reason we know"),
        ({2: {"how": "released"}}, "1005: began as 'released', though term 2 is said to have expired"),
        ({1: {"last_beat": at(15)}}, "1005: took over 5.0 s after the last beat of term 2, whose ttl was 10 s"),
    ],
)
def test_what_cannot_be_true_is_found(change: dict[int, dict[str, Any]], says: str) -> None:
    terms = [row | change.get(n, {}) for n, row in enumerate(GOOD)]
    assert any(line.startswith(says) for line in found(terms, lease(1006, "i1006"))), found(terms, lease(1006, "i1006"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (None, "1006: has no lease beside it"),
        (lease(1005, "i1005"), "1006: is above the lease's term 1005"),
        (lease(1006, None), "1006: is open for i1006 in the journal, and held by nobody"),
        (lease(1006, "other"), "1006: is open for i1006 in the journal, and held by other"),
        (lease(1007, "i1007"), "1007: is held by i1007 and not journalled"),
    ],
)
def test_a_lease_that_does_not_fit_its_journal_is_found(row: dict[str, Any] | None, says: str) -> None:
    assert any(line.startswith(says) for line in found(GOOD, row))


def test_a_lease_that_was_never_journalled_is_found() -> None:
    assert found([], lease(3, "i3")) == ["3: is held by i3 and not journalled"]


def test_times_of_sqlite_are_read_as_utc() -> None:
    assert journal.moment("2026-01-01 00:00:01.500") == at(1.5)


def test_an_open_term_has_lasted_until_now() -> None:
    (row,) = journal.rows([term(1, 0, None)], at(65))
    assert (row["lasted"], row["until"], row["ended"], row["from"]) == (65.0, None, None, "2026-01-01 00:00:00.000")
    assert "still on" in journal.table([row])[1]


async def test_a_handover_while_journal_and_leases_are_read_is_no_finding(any_url: str) -> None:
    """Found by the nemesis (seed 500151): a term that began between the two was held and not journalled."""
    store = open_store(any_url)
    await store.open(DEADLINE)
    names = [f"i{n}" for n in range(8)]
    for name in names:
        await store.register(registration(name), DEADLINE)
    real, turn = store.terms, iter(names)
    assert await claim(store, next(turn))
    lease = (await store.read("bot", "i0", DEADLINE)).lease
    assert lease is not None and await acquire(store, "i0", lease) is not None
    holder = "i0"

    async def terms(*args: Any) -> Any:
        nonlocal holder
        found = await real(*args)
        if (following := next(turn, None)) is not None:  # right behind our back
            peer = (await store.read("bot", following, DEADLINE)).assigned
            assert await store.claim("bot", following, peer.key if peer else None, DEADLINE)
            held = lease_of(await store.read("bot", following, DEADLINE))
            assert await store.release("bot", holder, Held(held.term, held.nonce, (held.beat,)), **STOPPED)
            assert await acquire(store, following, lease_of(await store.read("bot", following, DEADLINE))) is not None
            holder = following
        return found

    store.terms = terms  # type: ignore[method-assign]
    (verdict,) = journal.verify(*await of_one_moment(store, None))
    assert verdict.findings == () and verdict.terms == len(names)
    await store.aclose()
