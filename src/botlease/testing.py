"""Public helpers for tests: the conformance suite every store must pass, against the real thing.

.. code-block:: python

    from botlease.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def stores(self): yield await open_two_connections_to_one_empty_database()

The suite needs pytest with pytest-asyncio in auto mode; nothing else of botlease imports this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from botlease.model import Held, How, Lease, Probation, Reason, View
from botlease.stores import Registration, Store
from botlease.value import replace

DEADLINE = 5.0
STOPPED: Any = {"reason": Reason.STOPPED, "pass_on": False, "leave": False, "deadline": DEADLINE}


def registration(instance_id: str, deployment: str = "d1", bot: str = "bot") -> Registration:
    return Registration(instance_id, bot, deployment, "host", 1, "1", 10.0)


async def acquire(
    store: Store,
    me: str,
    lease: Lease,
    *,
    bot: str = "bot",
    floor: int = 0,
    origin: str | None = None,
    nonce: str = "",
    probation: Probation = Probation.NONE,
    how: How | None = None,
) -> Any:
    """What was seen, unless it is to be the release of a holder that was seen."""
    return await store.acquire(
        bot,
        me,
        lease.key,
        nonce=nonce or f"nonce-{me}",
        floor=floor,
        origin=lease.origin if origin is None else origin,
        how=how or (How.RELEASED if lease.holder is None else How.EXPIRED),
        ttl=10.0,
        proof="proof",
        probation=probation,
        deadline=DEADLINE,
    )


async def claim(store: Store, me: str, source: str | None = None, *, bot: str = "bot") -> bool:
    """A claim from ``source``, as whoever has just read the row makes it."""
    peer = (await store.read(bot, me, DEADLINE)).assigned
    return await store.claim(
        bot, me, None if source is None else (source, *(peer.key[1:] if peer else (0, 0))), DEADLINE
    )


def lease_of(view: View) -> Lease:
    assert view.lease is not None
    return view.lease


class StoreContract:
    """What :class:`botlease.stores.Store` promises. The fixture ``stores`` gives two on one database,
    and ``execute`` a function that runs one statement of an operator."""

    async def held(self, a: Store, me: str = "a") -> Any:
        view = await a.register(registration(me), DEADLINE)
        assert await claim(a, me)
        grant = await acquire(a, me, lease_of(view))
        assert grant is not None
        return grant

    async def test_a_new_bot_has_a_free_lease(self, stores: Sequence[Store]) -> None:
        view = await stores[0].register(registration("a"), DEADLINE)

        assert lease_of(view).holder is None and view.assigned is None and view.generation > 0

    async def test_registering_twice_changes_nothing(self, stores: Sequence[Store]) -> None:
        a, b = stores
        first = await a.register(registration("a"), DEADLINE)
        again = await b.register(registration("a"), DEADLINE)

        assert first.lease == again.lease and first.generation == again.generation

    async def test_generations_follow_the_first_sight_of_a_deployment(self, stores: Sequence[Store]) -> None:
        a, b = stores
        one = await a.register(registration("a1", "z-first"), DEADLINE)
        two = await b.register(registration("b1", "a-second"), DEADLINE)
        again = await a.register(registration("a2", "z-first"), DEADLINE)

        assert one.generation == again.generation < two.generation

    async def test_acquire_needs_the_assignment(self, stores: Sequence[Store]) -> None:
        view = await stores[0].register(registration("a"), DEADLINE)

        assert await acquire(stores[0], "a", lease_of(view)) is None

    async def test_acquire_is_a_compare_and_set(self, stores: Sequence[Store]) -> None:
        a, b = stores
        view = await a.register(registration("a"), DEADLINE)
        await b.register(registration("b"), DEADLINE)
        await claim(a, "a")
        assert await acquire(a, "a", lease_of(view)) is not None
        assert await claim(b, "b", "a")

        for wrong in (
            lease_of(view),
            replace(lease_of(await b.read("bot", "b", DEADLINE)), beat=7),
            replace(lease_of(await b.read("bot", "b", DEADLINE)), nonce="?"),
            replace(lease_of(await b.read("bot", "b", DEADLINE)), holder=None),
        ):
            assert await acquire(b, "b", wrong) is None

    async def test_of_a_holder_just_its_release_is_acquired(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)
        held = lease_of(await a.read("bot", "a", DEADLINE))
        await b.register(registration("b"), DEADLINE)
        assert await claim(b, "b", "a")
        assert await acquire(b, "b", held, how=How.RELEASED) is None  # it is held yet
        assert await a.release("bot", "a", Held(grant.term, "nonce-a"), **STOPPED)
        for wrong in (
            replace(held, nonce="?"),
            replace(held, term=held.term + 1),
            replace(held, beat=held.beat + 1),  # the database went back: it is the release of an earlier beat
            replace(held, holder=None),
        ):
            assert await acquire(b, "b", wrong, how=How.RELEASED) is None
        assert await acquire(b, "b", held, how=How.DIED) is None  # nothing but a release is met unread
        assert await acquire(b, "b", held, how=How.EXPIRED) is None
        assert await acquire(b, "b", held, how=How.RELEASED) is not None
        assert await acquire(b, "b", held, how=How.RELEASED) is None

    async def test_who_was_taken_out_by_hand_has_not_released(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, b = stores
        await self.held(a)
        held = lease_of(await a.read("bot", "a", DEADLINE))
        await b.register(registration("b"), DEADLINE)
        assert await claim(b, "b", "a")
        await execute("UPDATE bot_leases SET holder = NULL, beat = beat + 1")
        assert await acquire(b, "b", held, how=How.RELEASED) is None

    async def test_an_acquire_that_meets_another_database_is_refused(self, stores: Sequence[Store]) -> None:
        a, _ = stores
        view = await a.register(registration("a"), DEADLINE)
        await claim(a, "a")
        assert await acquire(a, "a", lease_of(view), origin=view.origin + "+") is None
        assert await acquire(a, "a", lease_of(view), origin=view.origin) is not None

    async def test_a_lease_row_that_vanished_is_put_back_with_the_longer_ttl(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, b = stores
        await self.held(a)
        await execute("DELETE FROM bot_leases")
        view = await b.register(replace(registration("b", "d2"), ttl=3.0), DEADLINE)
        assert lease_of(view).ttl == 10.0  # that of the term which may still run

    async def test_of_many_acquires_at_once_one_is_granted(self, stores: Sequence[Store]) -> None:
        a, b = stores
        view = await a.register(registration("a"), DEADLINE)
        await claim(a, "a")
        grants = await asyncio.gather(
            *(acquire(s, "a", lease_of(view), nonce=f"n{i}") for i, s in enumerate((a, b) * 4)), return_exceptions=True
        )

        assert sum(g is not None and not isinstance(g, BaseException) for g in grants) == 1

    async def test_terms_rise_above_the_floor_and_above_the_journal(self, stores: Sequence[Store]) -> None:
        a, _ = stores
        grant = await self.held(a)
        assert await a.release("bot", "a", Held(grant.term, "nonce-a"), **STOPPED)
        lease = lease_of(await a.read("bot", "a", DEADLINE))
        again = await acquire(a, "a", lease, floor=500)

        assert again.term == 501

    async def test_a_renewal_with_a_label_is_a_heartbeat_too(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)

        async def shown() -> tuple[int, str]:
            (row,) = (await b.overview(DEADLINE))["instances"]
            peer = (await b.read("bot", "b", DEADLINE)).assigned
            assert peer is not None
            return peer.beat, row["state"]

        before, _ = await shown()
        assert await a.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE) is not None
        assert (await shown())[0] == before
        assert await a.renew("bot", "a", Held(grant.term, "nonce-a", (7,)), 8, DEADLINE, "busy") is not None
        assert await shown() == (before + 1, "busy")
        assert await a.renew("bot", "a", Held(grant.term, "other"), 9, DEADLINE, "late") is None
        assert await shown() == (before + 1, "busy")

    async def test_renew_touches_exactly_one_term(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)

        assert await a.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE) is not None
        assert await b.renew("bot", "a", Held(grant.term, "other", (0, 7)), 8, DEADLINE) is None
        assert await b.renew("bot", "a", Held(grant.term + 1, "nonce-a", (0, 7)), 8, DEADLINE) is None
        assert await b.renew("bot", "b", Held(grant.term, "nonce-a", (0, 7)), 8, DEADLINE) is None
        assert lease_of(await b.read("bot", "a", DEADLINE)).beat == 7

    async def test_of_two_copies_of_one_holder_only_one_goes_on(self, stores: Sequence[Store]) -> None:
        a, copy = stores
        grant = await self.held(a)
        first, second = Held(grant.term, "nonce-a", (0,)), Held(grant.term, "nonce-a", (0, 8, 9))
        assert await a.renew("bot", "a", first, 7, DEADLINE) is not None
        assert await copy.renew("bot", "a", second, 10, DEADLINE) is None
        assert not await copy.release("bot", "a", second, **STOPPED)

        tried = Held(grant.term, "nonce-a", (5, 7))  # of the last renewal no answer came
        assert await a.renew("bot", "a", tried, 12, DEADLINE) is not None
        assert await a.release("bot", "a", Held(grant.term, "nonce-a", (12,)), **STOPPED)

    async def test_a_released_term_cannot_be_renewed(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)
        assert await a.release("bot", "a", Held(grant.term, "nonce-a"), **STOPPED)

        assert await b.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE) is None
        assert lease_of(await b.read("bot", "a", DEADLINE)).holder is None

    async def test_release_is_scoped_to_one_term(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)

        assert not await b.release("bot", "a", Held(grant.term - 1, "nonce-a"), **STOPPED)
        assert not await b.release("bot", "a", Held(grant.term, "other"), **STOPPED)
        assert lease_of(await b.read("bot", "a", DEADLINE)).holder == "a"

    async def test_a_claim_takes_the_assignment_from_exactly_one(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)

        assert not await claim(b, "b")
        assert not await claim(b, "b", "somebody")
        assert await claim(b, "b", "a")
        renewal = await a.renew("bot", "a", Held(1, "nonce-a"), 7, DEADLINE)
        assert renewal is not None and not renewal.assigned and not renewal.vacant

    async def test_a_claim_that_comes_late_is_refused(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)
        peer = (await b.read("bot", "b", DEADLINE)).assigned
        assert peer is not None
        kinds: Any = {"reason": Reason.SILENT, "pass_on": False, "leave": False, "deadline": DEADLINE}
        assert await a.release("bot", "a", Held(grant.term, "nonce-a"), **kinds)
        assert await acquire(a, "a", lease_of(await a.read("bot", "a", DEADLINE)), nonce="again") is not None
        assert not await b.claim("bot", "b", peer.key, DEADLINE)  # decided when "a" seemed dead

    async def test_of_many_claims_at_once_one_wins(self, stores: Sequence[Store]) -> None:
        a, b = stores
        for n in range(20):
            for name in (f"a{n}", f"b{n}"):
                await a.register(registration(name, bot=f"many{n}"), DEADLINE)
            won = await asyncio.gather(claim(a, f"a{n}", bot=f"many{n}"), claim(b, f"b{n}", bot=f"many{n}"))
            assert sorted(won) == [False, True]

    async def test_a_release_and_a_claim_at_once_do_not_hinder_each_other(self, stores: Sequence[Store]) -> None:
        a, b = stores
        for n in range(20):
            bot, one, two = f"bot{n}", f"a{n}", f"b{n}"
            view = await a.register(registration(one, "d1", bot), DEADLINE)
            await b.register(registration(two, "d2", bot), DEADLINE)
            assert await claim(a, one, bot=bot)
            grant = await acquire(a, one, lease_of(view), bot=bot)
            kinds: Any = {"reason": Reason.STOPPED, "pass_on": True, "leave": n % 2 == 0, "deadline": DEADLINE}
            await asyncio.gather(
                a.release(bot, one, Held(grant.term, f"nonce-{one}"), **kinds), claim(b, two, one, bot=bot)
            )
            view = await b.read(bot, two, DEADLINE)
            assert view.assigned is not None and view.assigned.instance_id == two
            assert lease_of(view).holder is None

    async def test_an_instance_that_left_never_acquires(self, stores: Sequence[Store]) -> None:
        a, b = stores
        view = await a.register(registration("a"), DEADLINE)
        await claim(a, "a")
        await a.leave("bot", "a", reason=Reason.STOPPED, pass_on=True, deadline=DEADLINE)

        assert await acquire(b, "a", lease_of(view)) is None

    async def test_stopping_passes_the_assignment_to_the_newest_live_standby(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)
        for name, deployment in (("old", "d1"), ("new", "d2"), ("gone", "d3")):
            await b.register(registration(name, deployment), DEADLINE)
        await b.leave("bot", "gone", reason=Reason.STOPPED, pass_on=True, deadline=DEADLINE)
        assert await a.release(
            "bot", "a", Held(grant.term, "nonce-a"), reason=Reason.STOPPED, pass_on=True, leave=True, deadline=DEADLINE
        )
        view = await b.read("bot", "new", DEADLINE)

        assert view.assigned is not None and view.assigned.instance_id == "new"
        assert lease_of(view).holder is None

    async def test_with_nobody_to_pass_it_to_the_assignment_stays(self, stores: Sequence[Store]) -> None:
        a, _ = stores
        grant = await self.held(a)
        await a.release(
            "bot", "a", Held(grant.term, "nonce-a"), reason=Reason.STOPPED, pass_on=True, leave=True, deadline=DEADLINE
        )
        view = await a.read("bot", "a", DEADLINE)

        assert view.assigned is not None and view.assigned.instance_id == "a" and view.assigned.ended

    async def test_a_lease_row_that_vanished_is_put_back_as_held(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, _ = stores
        grant = await self.held(a)
        await execute("DELETE FROM bot_leases")
        assert (await a.read("bot", "a", DEADLINE)).lease is None
        assert await a.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE) is None
        view = await a.register(registration("a"), DEADLINE)

        assert lease_of(view).holder is not None and lease_of(view).term >= grant.term
        # Only a release clears the proof: should the holder be typed out of this row, it must not look like one.
        assert lease_of(view).proof

    async def test_a_lease_row_that_vanished_with_its_journal_is_put_back_as_held_for_a_newcomer_too(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, b = stores
        grant = await self.held(a)
        for table in ("bot_leases", "bot_terms"):
            await execute(f"DELETE FROM {table}")  # noqa: S608
        view = await b.register(registration("b", "d2"), DEADLINE)
        assert lease_of(view).holder is not None and lease_of(view).proof and lease_of(view).term >= grant.term

        for table in ("bot_leases", "bot_terms", "bot_instances"):
            await execute(f"DELETE FROM {table}")  # noqa: S608
        view = await b.register(registration("c", "d3"), DEADLINE)
        assert lease_of(view).holder is not None and lease_of(view).proof

    async def test_the_operators_statements_keep_at_most_one_active(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, b = stores
        await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)
        await execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = 'b'")
        rows = await execute("SELECT * FROM bot_instances WHERE is_active = TRUE")
        assert [r["instance_id"] for r in rows] == ["b"]
        await execute("UPDATE bot_instances SET is_active = FALSE")
        renewal = await a.renew("bot", "a", Held(1, "nonce-a"), 7, DEADLINE)

        assert renewal is not None and renewal.vacant and not renewal.assigned

    async def test_bots_do_not_disturb_one_another(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.held(a)
        odd = "naïve '\"; DROP TABLE bot_leases; -- \U0001f916"
        view = await b.register(registration("b", bot=odd), DEADLINE)
        assert await claim(b, "b", bot=odd)
        assert await acquire(b, "b", lease_of(view), bot=odd) is not None

        assert await a.renew("bot", "a", Held(1, "nonce-a"), 7, DEADLINE) is not None

    async def test_a_change_of_assignment_or_holder_is_noticed_by_the_others(self, stores: Sequence[Store]) -> None:
        a, b = stores
        noticed = asyncio.Event()
        b.on_change = noticed.set
        await self.held(a)

        if not getattr(b, "pooled", False):
            await asyncio.wait_for(noticed.wait(), 5)

    async def test_every_term_is_journalled(self, stores: Sequence[Store], execute: Callable[[str], Any]) -> None:
        a, b = stores
        await self.held(a)
        view = await b.register(registration("b", "d2"), DEADLINE)
        await claim(b, "b", "a")
        await acquire(b, "b", lease_of(view), how=How.EXPIRED)
        rows = await execute("SELECT term, instance_id, reason FROM bot_terms ORDER BY term")

        assert [tuple(r.values()) if isinstance(r, dict) else tuple(r) for r in rows] == [
            (1, "a", "expired"),
            (2, "b", None),
        ]

    # Who is newest -------------------------------------------------------------------------------------------------

    async def handed_over(
        self, a: Store, b: Store, *, reason: Reason, probation: Probation = Probation.ON, back: str = "a"
    ) -> View:
        """ "a" of d1 holds, "b" of d2 takes over on probation and ends for ``reason``. What ``back`` sees."""
        first = await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)
        assert await claim(b, "b", "a")
        release: Any = {"deadline": DEADLINE, "pass_on": False, "leave": False, "reason": Reason.SUPERSEDED}
        assert await a.release("bot", "a", Held(first.term, "nonce-a"), **release)
        grant = await acquire(b, "b", lease_of(await b.read("bot", "b", DEADLINE)), probation=probation)
        assert await b.release(
            "bot", "b", Held(grant.term, "nonce-b"), **{**release, "pass_on": True, "leave": True, "reason": reason}
        )
        return await a.read("bot", back, DEADLINE)

    async def test_a_failed_probation_gives_back_and_is_counted(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await b.register(registration("b2", "d2"), DEADLINE)  # newer than "a", but of the deployment that fails
        view = await self.handed_over(a, b, reason=Reason.FAILED)
        other = await b.read("bot", "b2", DEADLINE)

        assert view.assigned is not None and view.assigned.instance_id == "a"
        assert (view.failures, other.failures) == (0, 1)

    async def test_a_planned_end_on_probation_is_no_failure(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.STOPPED)
        view = await b.register(registration("b2", "d2"), DEADLINE)

        assert view.failures == 0

    async def test_a_holder_that_dies_on_probation_has_failed(self, stores: Sequence[Store]) -> None:
        a, b = stores
        view = await a.register(registration("a"), DEADLINE)
        await claim(a, "a")
        await acquire(a, "a", lease_of(view), probation=Probation.ON)
        await b.register(registration("b", "d2"), DEADLINE)
        await claim(b, "b", "a")
        await acquire(b, "b", lease_of(await b.read("bot", "b", DEADLINE)), how=How.DIED)
        view = await a.register(registration("a2", "d1"), DEADLINE)

        assert view.failures == 1

    async def test_a_failed_probation_is_forgotten_when_a_later_one_is_passed(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.FAILED)
        assert (await b.register(registration("b2", "d2"), DEADLINE)).failures == 1
        assert await claim(b, "b2", "a")
        grant = await acquire(b, "b2", lease_of(await b.read("bot", "b2", DEADLINE)), probation=Probation.ON)
        assert await b.passed("bot", "b2", Held(grant.term, "nonce-b2"), DEADLINE)
        assert (await b.read("bot", "b2", DEADLINE)).failures == 0

    async def test_a_failed_probation_gives_back_to_the_newest_that_is_not_in_quarantine(
        self, stores: Sequence[Store]
    ) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.FAILED)  # one failure of d2; "a" of d1 has it again
        await b.register(registration("b2", "d2"), DEADLINE)
        await b.register(registration("c", "d3"), DEADLINE)
        assert await claim(b, "c", "a")
        grant = await acquire(b, "c", lease_of(await b.read("bot", "c", DEADLINE)), probation=Probation.ON)
        release: Any = {"deadline": DEADLINE, "pass_on": True, "leave": True, "reason": Reason.FAILED}
        assert await b.release("bot", "c", Held(grant.term, "nonce-c"), **release)
        view = await a.read("bot", "a", DEADLINE)
        assert view.assigned is not None and view.assigned.instance_id == "b2"

    async def test_a_probation_that_was_passed_is_no_failure_and_is_seen(self, stores: Sequence[Store]) -> None:
        a, b = stores
        view = await a.register(registration("a"), DEADLINE)
        await claim(a, "a")
        grant = await acquire(a, "a", lease_of(view), probation=Probation.ON)
        assert (await b.read("bot", "a", DEADLINE)).probation is Probation.ON
        assert not await a.passed("bot", "a", Held(grant.term, "another nonce"), DEADLINE)
        assert await a.passed("bot", "a", Held(grant.term, "nonce-a"), DEADLINE)
        assert await a.passed("bot", "a", Held(grant.term, "nonce-a"), DEADLINE)  # the answer may have been lost
        assert (await b.read("bot", "a", DEADLINE)).probation is Probation.PASSED

    async def test_an_older_deployment_chosen_by_hand_becomes_the_newest(
        self, stores: Sequence[Store], execute: Callable[[str], Any]
    ) -> None:
        a, b = stores
        await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)
        assert await claim(b, "b", "a")
        one, two = [await s.read("bot", name, DEADLINE) for s, name in ((a, "a"), (b, "b"))]
        assert one.generation < two.generation
        await execute("UPDATE bot_instances SET is_active = FALSE")
        await execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = 'a'")
        view = await b.register(registration("b2", "d2"), DEADLINE)
        assert view.assigned is not None and view.assigned.generation > view.generation == two.generation
        assert (await b.register(registration("c", "d3"), DEADLINE)).generation > view.assigned.generation
        assert not await b.claim("bot", "b2", ("a", one.generation, view.assigned.beat), DEADLINE)  # on old news

    async def test_a_claim_from_a_newer_one_that_failed_does_not_make_the_claimer_newer(
        self, stores: Sequence[Store]
    ) -> None:
        a, b = stores
        before = (await a.register(registration("a"), DEADLINE)).generation
        await b.register(registration("b", "d2"), DEADLINE)
        assert await claim(b, "b")
        assert await claim(a, "a", "b")
        assert (await a.read("bot", "a", DEADLINE)).generation == before

    async def test_a_roll_back_that_reuses_its_key_is_the_newest_once_the_newer_is_stopped(
        self, stores: Sequence[Store]
    ) -> None:
        a, b = stores
        await a.register(registration("a", "d1"), DEADLINE)
        view = await b.register(registration("b", "d2"), DEADLINE)
        await claim(b, "b")
        await acquire(b, "b", lease_of(view))
        await a.leave("bot", "a", reason=Reason.STOPPED, pass_on=True, deadline=DEADLINE)
        old = await a.register(registration("a2", "d1"), DEADLINE)
        assert old.generation < view.generation
        release: Any = {"deadline": DEADLINE, "pass_on": True, "leave": True, "reason": Reason.STOPPED}
        await b.release("bot", "b", Held(lease_of(await b.read("bot", "b", DEADLINE)).term, "nonce-b"), **release)
        again = await b.register(registration("b2", "d2"), DEADLINE)

        assert again.assigned is not None and again.assigned.instance_id == "a2"
        assert again.generation < again.assigned.generation

    async def test_an_old_one_that_crashed_and_was_restarted_does_not_become_the_newest(
        self, stores: Sequence[Store]
    ) -> None:
        a, b = stores
        await a.register(registration("a", "d1"), DEADLINE)
        view = await b.register(registration("b", "d2"), DEADLINE)
        await claim(b, "b")
        await acquire(b, "b", lease_of(view))
        await a.register(registration("a2", "d1"), DEADLINE)  # "a" never said goodbye
        release: Any = {"deadline": DEADLINE, "pass_on": True, "leave": True, "reason": Reason.STOPPED}
        await b.release("bot", "b", Held(lease_of(await b.read("bot", "b", DEADLINE)).term, "nonce-b"), **release)
        again = await b.register(registration("b2", "d2"), DEADLINE)

        assert again.assigned is not None and again.assigned.instance_id in ("a", "a2")
        assert again.generation > again.assigned.generation

    async def test_one_left_over_from_before_does_not_become_the_newest_when_the_newer_restarts(
        self, stores: Sequence[Store]
    ) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.STOPPED, probation=Probation.NONE)
        again = await b.register(registration("b2", "d2"), DEADLINE)

        assert again.assigned is not None and again.assigned.instance_id == "a"
        assert again.generation > again.assigned.generation

    # The operator ----------------------------------------------------------------------------------------------------

    async def test_a_pause_keeps_everybody_out_and_the_assignment_where_it_is(self, stores: Sequence[Store]) -> None:
        a, b = stores
        grant = await self.held(a)
        assert await b.pause("bot", True, DEADLINE) == 1 and await b.pause("bot", True, DEADLINE) == 0
        renewal = await a.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE)
        assert renewal is not None and renewal.paused and renewal.assigned
        release: Any = {"deadline": DEADLINE, "pass_on": False, "leave": False, "reason": Reason.PAUSED}
        assert await a.release("bot", "a", Held(grant.term, "nonce-a", (7,)), **release)
        view = await a.read("bot", "a", DEADLINE)
        assert view.paused and await acquire(a, "a", lease_of(view), nonce="again") is None
        assert await b.pause(None, False, DEADLINE) == 1
        assert await acquire(a, "a", lease_of(view), nonce="again") is not None

    async def test_deactivating_takes_the_assignment_away(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.held(a)
        assert await b.deactivate("bot", "nobody", DEADLINE) == 0
        assert await b.deactivate("bot", "a", DEADLINE) == 1
        assert (await a.read("bot", "a", DEADLINE)).assigned is None

    async def test_the_journal_tells_how_each_term_came_and_went(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.FAILED)
        second, first = await a.terms("bot", 10, DEADLINE)

        assert (first["instance_id"], first["reason"], first["probation"]) == ("a", "superseded", "")
        assert (second["instance_id"], second["reason"], second["probation"]) == ("b", "failed", "on")
        assert first["acquired_at"] <= first["released_at"] <= second["acquired_at"] <= second["released_at"]
        assert await a.terms("another", 10, DEADLINE) == [] and len(await a.terms(None, 1, DEADLINE)) == 1

    async def test_a_term_that_ran_out_is_journalled_with_its_last_beat(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.held(a)
        await b.register(registration("b", "d2"), DEADLINE)
        await claim(b, "b", "a")
        await acquire(b, "b", lease_of(await b.read("bot", "b", DEADLINE)), how=How.EXPIRED)
        _, first = await a.terms("bot", 10, DEADLINE)

        assert first["reason"] == "expired" and first["ttl"] == 10.0
        assert first["acquired_at"] <= first["last_beat"] <= first["released_at"]

    async def test_pruning_keeps_what_lives(self, stores: Sequence[Store]) -> None:
        a, b = stores
        await self.handed_over(a, b, reason=Reason.STOPPED)
        assert await a.prune("bot", 1.0, DEADLINE) == (0, 0)
        assert await a.prune("bot", -1.0, DEADLINE) == (1, 1)  # "a" has the assignment, and the last term numbers on
        assert (await a.read("bot", "a", DEADLINE)).assigned is not None
