"""Planted bugs: each takes one safety rule away. The simulation must find every one of them.

A bug is a context manager that patches the production code; nothing here runs in production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from simulation import World

from botlease import core
from botlease.evidence import Evidence
from botlease.model import How
from botlease.stores import sqlitefile
from botlease.value import replace

Bug = Callable[[], Any]
BUGS: dict[str, Bug] = {}


def bug(f: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    BUGS[f.__name__] = contextmanager(f)
    return f


HOLD = "AND term = :term AND nonce = :nonce"


@contextmanager
def sql(name: str, old: str, new: str) -> Iterator[None]:
    text = getattr(sqlitefile, name)
    assert old in text, f"{name} does not contain {old!r} any more"
    with patch.object(sqlitefile, name, text.replace(old, new)):
        yield


@bug
def renewed_trust_counts_from_the_answer() -> Iterator[None]:
    real = core._renewed

    def wrong(s: Any, q: Any, event: Any, now: float, out: Any) -> Any:
        return real(s, replace(q, asked_at=now), event, now, out)

    with patch.object(core, "_renewed", wrong):
        yield


@bug
def granted_trust_counts_from_the_answer() -> Iterator[None]:
    real = core._granted

    def wrong(s: Any, q: Any, event: Any, now: float, out: Any) -> Any:
        return real(s, replace(q, asked_at=now), event, now, out)

    with patch.object(core, "_granted", wrong):
        yield


@bug
def no_margin_for_clock_rates() -> Iterator[None]:
    with (
        patch.object(core.Timing, "trust", property(lambda t: t.ttl - t.kill_budget)),
        patch.object(core.Timing, "patience", lambda t, row_ttl: max(t.ttl, row_ttl)),
    ):
        yield


@bug
def no_time_to_kill_in() -> Iterator[None]:
    with patch.object(core.Timing, "trust", property(lambda t: t.ttl * (1 - t.rho))):
        yield


@bug
def release_before_reap() -> Iterator[None]:
    real = core._drain

    def wrong(s: Any, until: float, reason: Any, out: Any) -> Any:
        return replace(real(s, until, reason, out), phase=core.Phase.RELEASING)

    with patch.object(core, "_drain", wrong):
        yield


@bug
def renew_by_name() -> Iterator[None]:
    by_name = sqlitefile.RENEW.partition("WHERE")[2].partition("RETURNING")[0]
    with sql("RENEW", by_name, " bot = :bot "):
        yield


@bug
def a_lease_whose_journal_is_gone_as_well_comes_back_free() -> Iterator[None]:
    with sql("ADD_LEASE", "AND NOT EXISTS (SELECT 1 FROM bot_deployments WHERE bot = :bot)", ""):
        yield


@bug
def copies_of_one_holder_renew_for_one_another() -> Iterator[None]:
    with sql("RENEW", "AND instr(:beats, ',' || beat || ',') > 0", ""):
        yield


@bug
def a_copy_gives_back_what_the_other_one_works_under() -> Iterator[None]:
    with patch.object(core, "_copied", lambda s, view, lease: False):
        yield


@bug
def the_clock_stands_still_while_the_machine_sleeps() -> Iterator[None]:
    with patch("simulation.Node.clock_counts_sleep", False):
        yield


@bug
def takeover_by_the_clock_of_the_database_alone() -> Iterator[None]:
    real = core._plan_standby

    def wrong(s: Any, now: float, out: Any) -> Any:
        lease = s.view.lease if s.view else None
        if lease is not None and lease.holder is not None and s.view.renewed_ago > lease.ttl:
            s = replace(s, evidence=replace(s.evidence, since=-1e9))
        return real(s, now, out)

    with patch.object(core, "_plan_standby", wrong):
        yield


@bug
def acquire_without_compare_and_set() -> Iterator[None]:
    with sql("ACQUIRE", HOLD, ""), sql("ACQUIRE", "ELSE beat = :beat AND holder IS :holder", "ELSE TRUE"):
        yield


@bug
def a_hold_that_may_have_been_released_is_taken_for_released() -> Iterator[None]:
    with sql("ACQUIRE", "THEN holder IS NULL AND proof = '' AND beat > :beat", "THEN TRUE"):
        yield


@bug
def a_release_is_taken_unread_from_a_row_that_went_backwards() -> Iterator[None]:
    real = Evidence.may_be_taken_unread

    def wrong(e: Any, lease: Any) -> bool:
        return real(replace(e, doubted=False), lease)

    with (
        patch.object(Evidence, "may_be_taken_unread", wrong),
        sql("ACQUIRE", HOLD, ""),
        sql("ACQUIRE", "AND proof = '' AND beat > :beat", ""),
    ):
        yield


@bug
def answers_do_not_name_their_question() -> Iterator[None]:
    real = core._absorb

    def wrong(s: Any, event: Any, now: float, out: Any) -> Any:
        if s.asking is not None and hasattr(event, "serial") and not isinstance(event, core.Failed):
            fits = {
                core.Granted: (core.Verb.ACQUIRE, core.Verb.RENEW),
                core.Renewed: (core.Verb.RENEW, core.Verb.ACQUIRE),
                core.Seen: (core.Verb.READ,),
                core.Done: (core.Verb.RELEASE, core.Verb.LEAVE, core.Verb.TOUCH),
                core.Denied: (core.Verb.RENEW, core.Verb.ACQUIRE, core.Verb.RELEASE),
            }.get(type(event), ())
            if s.asking.verb in fits:
                event = replace(event, serial=s.asking.serial)
        return real(s, event, now, out)

    with patch.object(core, "_absorb", wrong):
        yield


@bug
def a_grant_that_comes_too_late_is_believed() -> Iterator[None]:
    real = core._granted

    def wrong(s: Any, q: Any, event: Any, now: float, out: Any) -> Any:
        late = now >= q.asked_at + s.timing.trust
        return real(s, replace(q, asked_at=now) if late else q, event, now, out)

    with patch.object(core, "_granted", wrong):
        yield


@bug
def a_renewal_that_comes_too_late_counts() -> Iterator[None]:
    real_step, real_renewed = core.step, core._renewed

    def lax(s: Any, event: Any, now: float) -> Any:
        t = s.term
        if t is not None and isinstance(event, core.Renewed) and s.asking and s.asking.serial == event.serial:
            s = replace(s, term=replace(t, asked_at=now, trusted_until=now + 1))
        return real_step(s, event, now)

    def wrong(s: Any, q: Any, event: Any, now: float, out: Any) -> Any:
        late = s.term is not None and now >= q.asked_at + s.timing.trust
        return real_renewed(s, replace(q, asked_at=now) if late else q, event, now, out)

    with patch.object(core, "step", lax), patch.object(core, "_renewed", wrong):
        yield


@bug
def acquire_after_a_stop_signal() -> Iterator[None]:
    def wrong(s: Any, reason: Any, now: float, out: Any) -> Any:
        return s

    with patch.object(core, "_stop", wrong):
        yield


@bug
def no_lock_delay() -> Iterator[None]:
    real = core._granted

    def wrong(s: Any, q: Any, event: Any, now: float, out: Any) -> Any:
        return real(s, replace(q, lock_delay=0.0), event, now, out)

    with patch.object(core, "_granted", wrong):
        yield


@bug
def no_lock_delay_after_a_death_that_followed_an_expiry() -> Iterator[None]:
    with patch.object(Evidence, "unsettled", lambda e, how, rooted, timing, now: how is How.EXPIRED):
        yield


@bug
def a_missing_row_is_free() -> Iterator[None]:
    with sql("ADD_LEASE", "ELSE 'unknown' END", "ELSE NULL END"), sql("ADD_LEASE", "ELSE '-' END", "ELSE '' END"):
        yield


@bug
def another_timeline_is_not_doubted() -> Iterator[None]:
    real = core._saw

    def wrong(s: Any, view: Any, now: float, out: Any) -> Any:
        s = real(s, view, now, out)
        since = s.evidence.since
        if s.phase is core.Phase.STANDBY and view.lease is not None and view.lease.origin != view.origin:
            since = -1e9
        return replace(s, evidence=replace(s.evidence, doubted=False, since=since))

    with patch.object(core, "_saw", wrong):
        yield


@bug
def terms_of_a_lost_tail_are_used_again() -> Iterator[None]:
    real = core._ask

    def wrong(s: Any, now: float, out: Any, verb: Any, **fields: Any) -> Any:
        return real(s, now, out, verb, **({**fields, "floor": 0} if "floor" in fields else fields))

    with patch.object(core, "_ask", wrong):
        yield


@bug
def terms_do_not_rise() -> Iterator[None]:
    with (
        sql("ACQUIRE", "WHERE t.bot = :bot)) + 1", "WHERE t.bot = :bot))"),
        sql("OPEN_TERM", "INSERT INTO", "INSERT OR REPLACE INTO"),
    ):
        yield


@bug
def watching_begins_when_the_read_is_asked() -> Iterator[None]:
    real = core._saw

    def wrong(s: Any, view: Any, now: float, out: Any) -> Any:
        before = s.evidence.since
        s = real(s, view, now, out)
        if s.evidence.since == now and before != now:
            s = replace(s, evidence=replace(s.evidence, since=now - s.timing.attempt * 1.9))
        return s

    with patch.object(core, "_saw", wrong):
        yield


@bug
def the_own_ttl_counts_and_not_the_longer_one() -> Iterator[None]:
    with patch.object(core.Timing, "patience", lambda t, row_ttl: t.ttl * (1 + t.rho)):
        yield


@bug
def an_unbelieved_hold_is_worked_under() -> Iterator[None]:
    real = core._plan_standby

    def wrong(s: Any, now: float, out: Any) -> Any:
        view = s.view
        if view is not None and view.lease is not None and view.lease.holder == s.me.instance_id and now < s.look_at:
            lease = view.lease
            term = core.Term(lease.term, lease.nonce, lease.origin, now, now + s.timing.trust, now)
            return replace(s, phase=core.Phase.HOLDING, term=term)
        return real(s, now, out)

    with patch.object(core, "_plan_standby", wrong):
        yield


@bug
def a_hold_after_an_expiry_is_released_before_its_lock_delay() -> Iterator[None]:
    with patch.object(core, "_release_from", lambda t: 0.0):
        yield


@bug
def an_old_deployment_steals_back() -> Iterator[None]:
    real = core._may_claim

    def wrong(s: Any, view: Any, lease: Any, now: float) -> Any:
        peer = view.assigned
        older = peer is not None and view.generation < peer.generation and not s.claimed
        return older or real(s, view, lease, now)

    with patch.object(core, "_may_claim", wrong):
        yield


@bug
def quarantine_is_forgotten() -> Iterator[None]:
    with patch.object(core, "TRIES", 99):
        yield


@bug
def a_pause_is_overlooked() -> Iterator[None]:
    real = core._saw

    def wrong(s: Any, view: Any, now: float, out: Any) -> Any:
        return real(s, replace(view, paused=False), now, out)

    with patch.object(core, "_saw", wrong), sql("ACQUIRE", "AND NOT paused", ""):
        yield


@bug
def an_acquire_does_not_name_its_database() -> Iterator[None]:
    with sql("ACQUIRE", "AND :origin = :seen", ""):
        yield


@bug
def a_lost_lease_comes_back_with_the_ttl_of_whoever_puts_it_back() -> Iterator[None]:
    with sql("ADD_LEASE", "max(:ttl, coalesce(max(CASE WHEN released_at IS NULL THEN ttl END), 0))", ":ttl"):
        yield


@bug
def a_holder_that_was_taken_out_by_hand_counts_as_a_release() -> Iterator[None]:
    real = Evidence.vacancy

    def wrong(e: Any, lease: Any, timing: Any, now: float) -> Any:
        return real(e, replace(lease, proof="") if lease.holder is None else lease, timing, now)

    with patch.object(Evidence, "vacancy", wrong):
        yield


@bug
def in_an_emptied_database_nobody_begins() -> Iterator[None]:
    real = core._may_claim

    def wrong(s: Any, view: Any, lease: Any, now: float) -> Any:
        return real(replace(s, anew=False), view, lease, now)

    with patch.object(core, "_may_claim", wrong):
        yield


@bug
def a_grant_waits_for_no_disk() -> Iterator[None]:
    with patch.object(World, "lazy", {core.Verb.ACQUIRE}):
        yield


@bug
def whoever_lost_its_claim_in_a_fail_over_waits_for_ever() -> Iterator[None]:
    real = core._saw

    def wrong(s: Any, view: Any, now: float, out: Any) -> Any:
        after = real(s, view, now, out)
        return replace(after, claimed=True) if s.claimed else after

    with patch.object(core, "_saw", wrong):
        yield
