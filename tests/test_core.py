"""The decisions, one at a time. Names are the behaviour."""

from __future__ import annotations

import pytest

from botlease import core
from botlease.core import Candidate, Phase, State
from botlease.model import (
    Arm,
    Ask,
    Claimed,
    Crashed,
    Danger,
    Denied,
    Done,
    Drain,
    End,
    Failed,
    Granted,
    Healthy,
    HolderDied,
    How,
    Kill,
    Lease,
    Mode,
    Peer,
    Probation,
    Ready,
    Reason,
    Registered,
    Renewed,
    Restart,
    Seen,
    Start,
    StopAsked,
    Tick,
    Timing,
    TimingError,
    Unhealthy,
    Verb,
    View,
    Woken,
    WorkEnded,
)
from botlease.value import replace

TIMING = Timing()
FREE = Lease(3, 0, "x", None, 10.0, "db")
HELD = Lease(4, 7, "y", "other", 10.0, "db", "proof")
ME = Peer("me", 5, False, 0, 0.0)
OTHER = Peer("other", 4, False, 3, 0.5)


class Driver:
    """Feeds the core and remembers what it asked for."""

    def __init__(self, mode: Mode = Mode.PREEMPT, timing: Timing = TIMING, **me: bool) -> None:
        self.now = 100.0
        self.state: State = core.start(Candidate("me", mode, **me), timing, self.now)
        self.actions: list[core.Action] = []
        self.feed(Tick())

    def feed(self, event: core.Event, after: float = 0.0) -> list[core.Action]:
        self.now += after
        self.state, actions = core.step(self.state, event, self.now)
        self.actions += actions
        return actions

    @property
    def mine(self) -> Lease:
        """The row as our last confirmed renewal left it."""
        return Lease(4, dict(self.state.wrote).get("n", (0,))[0], "n", "me", 10.0, "db")

    @property
    def question(self) -> core.Question:
        assert self.state.asking is not None, self.state
        return self.state.asking

    def answer(self, make: object, *args: object, after: float = 0.0) -> list[core.Action]:
        return self.feed(make(self.question.serial, *args), after)  # type: ignore[operator]

    def joined(self, view: View) -> Driver:
        assert self.question.verb is Verb.REGISTER
        self.answer(Registered, view)
        return self

    @property
    def acquires(self) -> list[core.Question]:
        return [a.question for a in self.actions if isinstance(a, Ask) and a.question.verb is Verb.ACQUIRE]

    def woken(self, view: View, after: float = 0.0) -> None:
        """By something that was no release of what is handed to us."""
        self.feed(Woken(), after)
        assert (self.question.verb, self.question.how) == (Verb.ACQUIRE, How.RELEASED)
        self.answer(Denied)
        assert self.question.verb is Verb.READ
        self.answer(Seen, view)

    def renewed(self, after: float = 2.0) -> list[core.Action]:
        """The next renewal is asked for and confirmed."""
        self.feed(Tick(), after)
        while self.question.verb is not Verb.RENEW:
            self.answer(Done)
            self.feed(Tick())
        return self.answer(Renewed, True, False, "db")

    def took_over(self) -> Driver:
        """A newer deployment that has just taken over: it is on probation."""
        self.joined(View(replace(HELD, term=3), "db", OTHER, 5))
        self.answer(Claimed, True)
        self.answer(Seen, View(FREE, "db", ME, 5))
        assert self.question.verb is Verb.ACQUIRE and self.question.probation is Probation.ON
        self.answer(Granted, 4, "n", "db")
        assert self.state.phase is Phase.WORKING
        return self

    def working(self) -> Driver:
        self.joined(View(FREE, "db", ME, 5))
        assert self.question.verb is Verb.ACQUIRE
        self.answer(Granted, 4, "n", "db")
        assert self.state.phase is Phase.WORKING
        return self


def verbs(actions: list[core.Action]) -> list[Verb]:
    return [a.question.verb for a in actions if isinstance(a, Ask)]


def test_a_first_start_claims_acquires_and_works() -> None:
    d = Driver().joined(View(FREE, "db", None, 5))
    assert d.question.verb is Verb.CLAIM and d.question.source is None
    d.answer(Claimed, True)
    assert d.question.verb is Verb.READ
    d.answer(Seen, View(FREE, "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.how is How.RELEASED
    asked = d.question.asked_at
    actions = d.answer(Granted, 4, "n", "db", after=0.5)

    assert [type(a) for a in actions] == [Arm, Start]
    assert actions[0] == Arm(asked + TIMING.trust)


def test_trust_counts_from_the_asking_not_from_the_answer() -> None:
    d = Driver().working()
    d.feed(Tick(), after=TIMING.renew_every)
    asked = d.now
    actions = d.answer(Renewed, True, False, "db", after=1.4)

    assert Arm(asked + TIMING.trust) in actions


def test_a_grant_that_arrives_after_the_end_of_trust_is_given_back_and_never_worked_under() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    actions = d.answer(Granted, 4, "n", "db", after=TIMING.trust)
    assert not [a for a in actions if isinstance(a, Start)]
    assert d.question.verb is Verb.READ
    d.answer(Seen, View(replace(HELD, holder="me", nonce="n", beat=0), "db", ME, 5))
    assert d.question.verb is Verb.RELEASE and d.question.held is not None and d.question.held[:2] == (4, "n")


def test_a_renewal_that_arrives_after_the_end_of_trust_counts_for_nothing() -> None:
    d = Driver().working()
    d.feed(Tick(), after=TIMING.renew_every)
    serial = d.question.serial
    actions = d.feed(Renewed(serial, True, False, "db"), after=TIMING.trust)

    assert [type(a) for a in actions] == [Kill]


def test_every_renewal_writes_a_beat_of_its_own_and_names_those_it_may_find() -> None:
    d = Driver().working()
    d.feed(Tick(), after=2.0)
    first = d.question
    assert first.held is not None and first.held.beats == (0,) and first.beat > 0
    d.answer(Failed)
    d.feed(Tick(), after=0.2)
    second = d.question
    assert second.held is not None and second.held.beats == (0, first.beat) and second.beat > first.beat
    d.answer(Renewed, True, False, "db")
    d.feed(Tick(), after=2.0)
    assert d.question.held is not None and d.question.held.beats == (second.beat,)


def test_a_copy_that_renews_under_our_name_ends_us_and_its_hold_is_not_touched() -> None:
    d = Driver().working()
    d.feed(Tick(), after=2.0)
    assert d.answer(Denied) == [Kill(Reason.LOST)]
    d.feed(WorkEnded(4), after=0.1)
    assert d.question.verb is Verb.RELEASE
    d.answer(Denied)
    actions = d.answer(Seen, View(replace(d.mine, beat=12345), "db", ME, 5))
    assert actions == [End(Reason.COPIED)] and d.state.phase is Phase.ENDED


def test_a_term_that_a_copy_acquired_under_our_name_is_not_given_back() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    d.feed(Failed(d.question.serial, "asked"))
    d.feed(Tick(), after=0.2)
    actions = d.answer(Seen, View(replace(HELD, holder="me", nonce="not ours", beat=0), "db", ME, 5))
    assert End(Reason.COPIED) in actions and not verbs(actions)


def test_an_acquire_of_our_own_with_an_unknown_outcome_is_given_back() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    d.feed(Failed(d.question.serial, "asked"))
    d.feed(Tick(), after=0.2)
    d.answer(Seen, View(replace(HELD, holder="me", nonce="asked", beat=0), "db", ME, 5))
    assert d.question.verb is Verb.RELEASE and d.question.held == (4, "asked", (0,))


def test_a_hold_from_before_a_fail_over_is_given_back_and_not_taken_for_a_copys() -> None:
    d = Driver().joined(View(FREE, "db", OTHER, 5))
    d.answer(Claimed, False)
    d.answer(Seen, View(replace(HELD, holder="me", nonce="old"), "db+", ME, 5))
    assert d.question.verb is Verb.RELEASE


def test_a_copy_that_is_stopped_ends_without_ending_the_others_row() -> None:
    d = Driver().working()
    d.feed(Tick(), after=2.0)
    d.answer(Denied)
    d.feed(WorkEnded(4), after=0.1)
    d.answer(Denied)
    d.feed(StopAsked())
    assert d.answer(Seen, View(replace(d.mine, beat=12345), "db", ME, 5)) == [End(Reason.STOPPED)]


def test_an_instance_whose_row_was_ended_by_somebody_else_ends() -> None:
    d = Driver().joined(View(FREE, "db", OTHER, 5))
    d.answer(Claimed, False)
    assert d.answer(Seen, View(FREE, "db", OTHER, 5, ended=True)) == [End(Reason.COPIED)]


def test_an_answer_to_another_question_is_dropped() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    before = d.state
    assert d.feed(Granted(d.question.serial - 1, 9, "z", "db")) == []
    assert d.state == before


def test_the_release_is_asked_only_after_the_work_is_gone() -> None:
    d = Driver().working()
    actions = d.feed(StopAsked())
    assert [type(a) for a in actions] == [Drain]
    d.feed(Tick(), after=3)
    assert Verb.RELEASE not in verbs(d.actions)
    actions = d.feed(WorkEnded(4))
    assert verbs(actions) == [Verb.RELEASE]
    assert d.question.leave and d.question.pass_on and d.question.reason is Reason.STOPPED
    assert d.answer(Done) == [End(Reason.STOPPED)]


def test_a_drain_that_takes_too_long_is_killed() -> None:
    d = Driver().working()
    d.feed(StopAsked())
    for _ in range(5):
        d.feed(Tick(), after=TIMING.renew_every)
        if d.state.asking:
            d.answer(Renewed, True, False, "db")
    assert Kill(Reason.STOPPED) in d.actions


def test_without_renewals_the_work_is_drained_then_killed_in_time() -> None:
    d = Driver().working()
    began = d.now
    while Kill(Reason.SILENT) not in d.actions:
        at = core.next_wakeup(d.state)
        assert at is not None
        d.feed(Tick(), after=max(0.0, at - d.now) + 1e-6)
        if d.state.asking:
            d.answer(Failed, after=0.01)
    drains = [a for a in d.actions if isinstance(a, Drain)]
    assert drains == [Drain(began + TIMING.trust, Reason.SILENT)]
    assert d.now == pytest.approx(began + TIMING.trust, abs=0.5) and d.now <= began + TIMING.trust + 1e-3


def test_a_released_lease_of_somebody_else_is_acquired_without_a_lock_delay() -> None:
    assert Driver().working().now == 100.0


def test_the_release_of_what_is_handed_to_us_is_taken_without_another_look() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    assert verbs(d.feed(Woken(), after=0.1)) == [Verb.ACQUIRE]
    assert (d.question.how, d.question.key, d.question.floor) == (How.RELEASED, HELD.key, HELD.term)
    assert [a for a in d.answer(Granted, 5, "n", "db") if isinstance(a, Start)]


def test_the_next_in_line_asks_for_a_release_unread_at_word_of_a_change_and_looks_when_it_was_another() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 4, ahead=0))
    d.feed(Woken(), after=0.1)
    assert (d.question.verb, d.question.how) == (Verb.ACQUIRE, How.RELEASED)
    d.answer(Denied)
    assert d.question.verb is Verb.READ


def test_whoever_was_granted_what_it_took_unread_has_had_its_turn() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 4))
    d.feed(Woken(), after=0.1)
    d.answer(Granted, 5, "n", "db")
    assert d.state.phase is Phase.WORKING and d.state.claimed


@pytest.mark.parametrize(
    "view",
    [
        View(HELD, "db", OTHER, 4, ahead=1),
        View(HELD, "db", ME, 5, paused=True),
        View(replace(HELD, origin="old"), "db", ME, 5),
        View(replace(HELD, holder=None), "db", ME, 5),
    ],
    ids=["another's turn", "paused", "from another database", "taken out by hand"],
)
def test_nothing_else_is_taken_without_another_look(view: View) -> None:
    d = Driver().joined(view)
    d.feed(Woken(), after=0.1)
    assert d.question.verb is Verb.READ


def test_of_the_dead_no_release_is_asked_for() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 4))
    d.feed(Tick(), after=2.3)
    d.feed(HolderDied(4, "y"))
    d.feed(Woken())
    d.answer(Seen, View(HELD, "db", OTHER, 4))
    assert How.RELEASED not in {q.how for q in d.acquires}


def test_while_the_database_does_not_answer_its_next_answer_is_to_a_look() -> None:
    """A side-car lock that is held denies an acquire as well, and says nothing of the database."""
    d = Driver().joined(View(HELD, "db", OTHER, 4))
    d.feed(Tick(), after=2.3)
    d.feed(Woken())
    d.answer(Failed)
    d.feed(Tick(), after=1.0)
    assert d.question.verb is Verb.READ
    d.answer(Seen, View(HELD, "db", OTHER, 4))
    d.feed(Woken())
    assert d.question.verb is Verb.ACQUIRE


def test_a_release_that_was_seen_is_not_looked_at_again_because_word_of_it_came_late() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    d.feed(Tick(), after=0.2)
    d.feed(Woken())
    released = replace(HELD, beat=8, holder=None, proof="")
    assert verbs(d.answer(Seen, View(released, "db", ME, 5), after=0.01)) == [Verb.ACQUIRE]
    assert d.question.key == released.key


def test_a_second_start_by_hand_looks_whether_somebody_lives() -> None:
    d = Driver(Mode.REFUSE)
    d.feed(Woken())
    d.answer(Registered, View(HELD, "db", OTHER, 4))
    assert d.question.verb is not Verb.ACQUIRE


def test_word_that_comes_while_an_acquire_is_on_its_way_is_looked_after() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE
    d.feed(Woken())
    d.answer(Granted, 4, "n", "db", after=0.01)
    assert d.state.phase is Phase.WORKING and d.question.verb is Verb.READ


def test_word_of_a_change_that_comes_while_we_look_makes_us_look_again() -> None:
    """What we were looking for may have happened after the look began."""
    behind = View(HELD, "db", OTHER, 4, ahead=1)
    d = Driver().joined(behind)
    d.feed(Woken())
    assert d.question.verb is Verb.READ
    d.feed(Woken())
    d.answer(Seen, behind, after=0.01)
    assert d.question.verb is Verb.READ
    d.answer(Seen, behind, after=0.01)
    assert d.state.asking is None

    d = Driver().working()
    d.feed(Woken(), after=0.1)
    d.feed(Woken())
    d.answer(Seen, View(d.mine, "db", ME, 5), after=0.01)
    assert d.question.verb is Verb.READ


def test_an_expired_lease_is_acquired_after_the_patience_and_worked_under_after_the_lock_delay() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    first_seen = d.now
    while d.state.asking is None or d.question.verb is not Verb.ACQUIRE:
        at = core.next_wakeup(d.state)
        assert at is not None
        d.feed(Tick(), after=at - d.now)
        if d.state.asking and d.question.verb is Verb.READ:
            d.answer(Seen, View(HELD, "db", ME, 5))
        elif d.state.asking and d.question.verb is Verb.TOUCH:
            d.answer(Done)
    assert d.now >= first_seen + TIMING.ttl * (1 + TIMING.rho)
    assert d.question.how is How.EXPIRED and d.question.key == HELD.key
    assert not [a for a in d.answer(Granted, 5, "n", "db") if isinstance(a, Start)]
    assert [a for a in d.feed(Tick(), after=TIMING.lock_delay) if isinstance(a, Start)]


def test_a_beat_starts_the_patience_anew() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    d.woken(View(replace(HELD, beat=8), "db", ME, 5), after=9)
    d.woken(View(replace(HELD, beat=8), "db", ME, 5), after=9)
    assert {q.how for q in d.acquires} == {How.RELEASED}


def test_a_holder_that_the_kernel_proved_dead_is_followed_at_once() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5, rooted=How.RELEASED))
    actions = d.feed(HolderDied(4, "y"))
    assert verbs(actions) == [Verb.ACQUIRE] and d.question.how is How.DIED
    assert [a for a in d.answer(Granted, 5, "n", "db") if isinstance(a, Start)]


def test_one_that_died_right_after_an_expiry_leaves_its_lock_delay_to_its_successor() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5, rooted=How.EXPIRED))
    d.feed(HolderDied(4, "y"), after=0.1)
    assert d.question.how is How.DIED
    assert not [a for a in d.answer(Granted, 5, "n", "db") if isinstance(a, Start)]
    assert [a for a in d.feed(Tick(), after=TIMING.lock_delay + 0.01) if isinstance(a, Start)]


def test_a_lock_delay_that_was_seen_to_pass_is_not_waited_for_again() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5, rooted=How.EXPIRED))
    d.feed(Tick(), after=0.6)
    d.answer(Seen, View(replace(HELD, beat=8), "db", ME, 5, rooted=How.EXPIRED), after=0.5)
    d.feed(HolderDied(4, "y"))
    assert [a for a in d.answer(Granted, 5, "n", "db") if isinstance(a, Start)]


def test_the_proof_of_another_term_proves_nothing() -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    assert verbs(d.feed(HolderDied(3, "y"))) == []


def test_a_missing_row_is_put_back_and_never_taken_for_free() -> None:
    d = Driver().joined(View(None, "db", ME, 5))
    assert d.question.verb is Verb.REGISTER
    unknown = Lease(4, 0, "q", "unknown", 10.0, "db")
    d.answer(Registered, View(unknown, "db", ME, 5))
    assert Verb.ACQUIRE not in verbs(d.actions)


@pytest.mark.parametrize(
    "lease",
    [replace(FREE, origin="old"), replace(FREE, term=1)],
    ids=["written under another timeline", "a term that went backwards"],
)
def test_a_released_row_in_doubt_is_waited_out(lease: Lease) -> None:
    d = Driver().joined(View(HELD, "db", ME, 5))
    d.woken(View(lease, "db", ME, 5))
    assert d.state.asking is None
    d.feed(Woken())  # nor is it taken unread
    assert d.question.verb is Verb.READ
    d.answer(Seen, View(lease, "db", ME, 5))
    assert d.state.asking is None
    d.feed(Tick(), after=TIMING.ttl * 1.01)
    d.answer(Seen, View(lease, "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.how is How.EXPIRED and d.question.floor >= 4


@pytest.mark.parametrize(
    ("ago", "ahead", "wait"),
    [
        (0.0, 0, 2.1),
        (0.5, 0, 1.6),
        (1.9, 0, 0.2),
        (2.1, 0, 0.2),
        (2.5, 0, 0.6),
        (90.0, 0, 2.1),
        (-90.0, 0, 2.1),
        (0.5, 1, 2.0),
    ],
)
def test_the_next_in_line_looks_shortly_after_each_beat(ago: float, ahead: int, wait: float) -> None:
    """A renewal comes every 2 s. The last one counts as unchanged from when it was seen."""
    d = Driver().joined(View(HELD, "db", OTHER, 4, renewed_ago=ago, ahead=ahead))
    assert core.next_wakeup(d.state) == pytest.approx(d.now + wait)


@pytest.mark.parametrize("ttl", [40.0, 86400.0, 5.0])
def test_nobody_looks_more_seldom_than_his_own_interval_whatever_ttl_is_in_the_row(ttl: float) -> None:
    """Behind a pooler no notification tells of an assignment."""
    lease = replace(HELD, ttl=ttl)
    for ago in (0.0, 3.0, 86400.0):
        d = Driver().joined(View(lease, "db", OTHER, 4, renewed_ago=ago))
        assert core.next_wakeup(d.state) <= d.now + 1.05 * TIMING.renew_every


def test_a_renewal_in_five_is_the_heartbeat_of_the_instance() -> None:
    d = Driver().working()
    for _ in range(20):
        d.renewed()
    renewals = [a.question for a in d.actions if isinstance(a, Ask) and a.question.verb is Verb.RENEW]
    assert [q.label for q in renewals] == ["", "", "", "", "active"] * 4
    assert Verb.TOUCH not in verbs(d.actions)


def test_a_heartbeat_whose_renewal_failed_comes_with_the_next_one() -> None:
    d = Driver().working()
    for _ in range(4):
        d.renewed()
    d.feed(Tick(), after=2.0)
    assert d.question.label == "active"
    d.answer(Failed)
    d.feed(Tick(), after=0.2)  # something may stand in the way of the heartbeat, which must not stand in that of trust
    assert d.question.verb is Verb.RENEW and not d.question.label
    d.answer(Renewed, True, False, "db")
    d.feed(Tick(), after=2.0)
    assert d.question.label == "active"


def test_a_holder_that_meets_another_database_stops_at_once() -> None:
    d = Driver().working()
    d.feed(Tick(), after=TIMING.renew_every)
    assert d.answer(Renewed, True, False, "db2") == [Kill(Reason.CHANGED)]


def test_a_lost_term_ends_without_grace() -> None:
    d = Driver().working()
    d.feed(Tick(), after=TIMING.renew_every)
    assert d.answer(Denied) == [Kill(Reason.LOST)]


@pytest.mark.parametrize(("assigned", "reason"), [(OTHER, Reason.SUPERSEDED), (None, Reason.DEACTIVATED)])
def test_a_holder_that_is_not_assigned_any_more_drains(assigned: Peer | None, reason: Reason) -> None:
    d = Driver().working()
    d.feed(Woken(), after=0.1)
    mine = Lease(4, 0, "n", "me", 10.0, "db")
    actions = d.answer(Seen, View(mine, "db", assigned, 5))
    assert actions == [Drain(d.now + TIMING.stop_grace, reason)]


def test_a_strictly_newer_generation_claims_once() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 5))
    assert d.question.verb is Verb.CLAIM and d.question.source == ("other", 4, 3)
    d.answer(Claimed, True)
    d.answer(Seen, View(HELD, "db", OTHER, 5))  # the operator gave it back to the other one
    assert d.state.asking is None


@pytest.mark.parametrize("generation", [4, 3])
def test_an_equal_or_older_generation_never_claims_from_a_living_one(generation: int) -> None:
    d = Driver().joined(View(HELD, "db", OTHER, generation))
    assert d.state.asking is None


def test_after_the_operator_deactivated_everybody_nobody_promotes_himself() -> None:
    served = replace(FREE, served=5)
    d = Driver().joined(View(served, "db", None, 5))
    assert d.state.asking is None
    assert Driver().joined(View(served, "db", None, 6)).question.verb is Verb.CLAIM


def test_who_was_there_when_everybody_was_deactivated_does_not_promote_himself_either() -> None:
    """A newer one, which had not come to its gate yet. One that was asleep then cannot tell that from an end."""
    served = replace(HELD, served=4)
    for asleep in (0, 10):
        d = Driver(warm=True).joined(View(served, "db", OTHER, 5))
        d.answer(Done)  # it shows that it warms up
        d.feed(Tick(), after=2.2 + asleep)
        d.answer(Seen, View(served, "db", None, 5))
        assert (d.state.asking is not None and d.question.verb is Verb.CLAIM) is bool(asleep)
        if not asleep:  # and so it stays
            d.feed(Tick(), after=2.2)
            d.answer(Seen, View(replace(FREE, served=4), "db", None, 5))
            assert d.state.asking is None
    d = Driver().joined(View(served, "db", replace(OTHER, generation=5), 5))
    d.feed(Tick(), after=2.2)
    d.answer(Seen, View(served, "a replica that lagged", None, 5))
    assert not d.state.dismissed  # it may never have known who had it


def test_a_holder_that_somebody_took_out_by_hand_is_waited_out() -> None:
    by_hand = replace(HELD, holder=None)  # a release takes the proof as well
    d = Driver().joined(View(by_hand, "db", ME, 5))
    assert d.state.asking is None
    d.feed(Tick(), after=TIMING.patience(10.0))
    d.answer(Seen, View(by_hand, "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.how is How.EXPIRED


@pytest.mark.parametrize(
    ("seen", "registered", "emptied"),
    [(0, 5, True), (5, 5, False), (5, 9, True)],
    ids=["our row was gone", "the lease alone was", "our row was gone when the registration came"],
)
def test_in_a_database_that_was_emptied_those_who_had_their_turn_claim_again(
    seen: int, registered: int, emptied: bool
) -> None:
    d = Driver().working()
    d.feed(Woken())
    d.answer(Seen, View(None, "db", None, seen))  # the row says that it is over
    d.feed(WorkEnded(4))
    d.answer(Denied)
    d.answer(Seen, View(None, "db", None, seen))
    assert d.question.verb is Verb.REGISTER
    d.answer(Registered, View(replace(FREE, term=0 if emptied else 4), "db", None, registered))
    assert (d.state.asking is not None and d.question.verb is Verb.CLAIM) is emptied


def test_a_second_start_by_hand_leaves_when_the_first_one_lives() -> None:
    d = Driver(Mode.REFUSE).joined(View(HELD, "db", OTHER, 5, renewed_ago=1.0))
    assert d.question.verb is Verb.LEAVE
    assert d.answer(Done) == [End(Reason.REFUSED)]


def test_after_a_stop_signal_nothing_is_acquired() -> None:
    d = Driver()
    d.feed(StopAsked())
    d.answer(Registered, View(FREE, "db", ME, 5))
    assert d.question.verb is Verb.LEAVE


def test_a_grant_that_crosses_a_stop_signal_is_released_without_work() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    d.feed(StopAsked())
    actions = d.answer(Granted, 4, "n", "db")
    assert verbs(actions) == [Verb.RELEASE] and not [a for a in actions if isinstance(a, Start)]


def test_an_acquire_with_an_unknown_outcome_is_read_back_before_anything_else() -> None:
    d = Driver().joined(View(FREE, "db", ME, 5))
    d.answer(Failed)
    d.feed(Tick(), after=1)
    assert d.question.verb is Verb.READ


def test_work_that_ends_by_itself_ends_the_instance_and_passes_the_assignment_on() -> None:
    d = Driver().working()
    d.feed(WorkEnded(4))
    assert d.question.verb is Verb.RELEASE and d.question.pass_on and d.question.reason is Reason.WORK_ENDED


def test_a_stop_ends_even_when_the_database_never_answers() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 3))
    d.feed(StopAsked())
    for _ in range(50):
        if d.state.phase is Phase.ENDED:
            break
        d.feed(Failed(d.question.serial) if d.state.asking else Tick(), after=0.2)
    assert d.state.phase is Phase.ENDED


# Probation -----------------------------------------------------------------------------------------------------------


def test_a_term_filled_from_a_vacancy_is_not_on_probation() -> None:
    for view in (View(FREE, "db", None, 5), View(FREE, "db", replace(OTHER, ended=True), 5)):
        d = Driver().joined(view)
        d.answer(Claimed, True)
        d.answer(Seen, View(FREE, "db", ME, 5))
        assert d.question.verb is Verb.ACQUIRE and d.question.probation is Probation.NONE


def test_probation_is_passed_when_the_work_has_lived_through_it() -> None:
    d = Driver().took_over()
    for _ in range(14):
        d.renewed()
    d.feed(Tick(), after=1.9)
    assert d.state.asking is None
    d.feed(Tick(), after=0.1)
    d.answer(Renewed, True, False, "db")
    assert d.question.verb is Verb.PASS and d.question.held is not None and d.question.held[:2] == (4, "n")
    d.answer(Done)
    assert d.state.probation is Probation.PASSED


def test_a_probation_that_cannot_be_recorded_is_not_asked_for_for_ever() -> None:
    d = Driver().took_over()
    for _ in range(15):
        d.renewed()
    assert d.question.verb is Verb.PASS
    d.answer(Denied)
    assert d.question.verb is Verb.READ
    d.answer(Seen, View(d.mine, "db", ME, 5, others=1))
    assert d.state.asking is None and d.state.phase is Phase.WORKING


def test_work_that_must_prove_progress_passes_only_when_it_has() -> None:
    d = Driver(monitored=True).took_over()
    for _ in range(20):
        d.renewed()
    assert d.state.probation is Probation.ON and d.state.asking is None
    d.feed(Healthy(4))
    assert d.question.verb is Verb.PASS


def test_a_crash_on_probation_gives_the_term_back_if_somebody_can_take_it() -> None:
    d = Driver().took_over()
    d.feed(Crashed(4))
    assert d.question.verb is Verb.READ
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=1)) == [Drain(d.now + 10, Reason.FAILED)]
    d.feed(WorkEnded(4))
    assert d.question.verb is Verb.RELEASE and d.question.pass_on and d.question.leave
    assert d.question.reason is Reason.FAILED


def test_a_crash_on_probation_with_nobody_else_is_restarted_in_its_term() -> None:
    d = Driver().took_over()
    assert Restart(False) not in d.feed(Crashed(4))  # not before it is known that nobody could take it back
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=0)) == [Restart(False)]
    assert d.state.phase is Phase.WORKING and d.state.probation is Probation.ON


def test_a_crash_begins_the_probation_anew() -> None:
    d = Driver().took_over()
    for _ in range(10):
        d.renewed()
    d.feed(Crashed(4))
    d.answer(Seen, View(d.mine, "db", ME, 5))
    for _ in range(14):
        d.renewed()
    assert d.state.probation is Probation.ON and d.state.asking is None


def test_a_crash_after_the_probation_asks_nobody() -> None:
    d = Driver().working()
    assert d.feed(Crashed(4)) == [Restart(False)]
    assert d.state.asking is None and d.state.phase is Phase.WORKING


def test_work_that_ends_on_probation_has_failed_whatever_its_exit_code() -> None:
    d = Driver().took_over()
    d.feed(WorkEnded(4))
    assert d.question.verb is Verb.RELEASE and d.question.reason is Reason.FAILED


def test_hung_work_gives_the_term_up_to_somebody_else_or_is_restarted() -> None:
    d = Driver().working()
    d.feed(Unhealthy(4))
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=1)) == [Drain(d.now + 10, Reason.UNHEALTHY)]
    d = Driver().working()
    d.feed(Unhealthy(4))
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=0)) == [Restart(True)]
    assert d.state.phase is Phase.WORKING


@pytest.mark.parametrize(("passed", "after"), [(False, Probation.ON), (True, Probation.PASSED)])
def test_an_interruption_ends_neither_a_probation_nor_what_it_proved(passed: bool, after: Probation) -> None:
    d = Driver().took_over()
    if passed:
        for _ in range(15):
            d.renewed()
        d.answer(Done)
    d.feed(Tick(), after=2)
    d.answer(Renewed, True, False, "db", True)  # paused
    d.feed(WorkEnded(4))
    d.answer(Done)
    d.answer(Seen, View(replace(FREE, term=4), "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.probation is after


def test_a_turn_that_is_over_ends_the_probation() -> None:
    d = Driver().took_over()
    d.feed(Woken())
    d.answer(Seen, View(d.mine, "db", OTHER, 5))
    d.feed(WorkEnded(4))
    d.answer(Done)
    assert d.state.probation is Probation.NONE


def test_a_crash_that_crosses_the_end_of_the_probation_is_restarted_as_any_other() -> None:
    d = Driver().took_over()
    for _ in range(15):
        d.renewed()
    d.feed(Crashed(4))
    assert Restart(False) in d.answer(Done)  # it had passed
    d.answer(Seen, View(d.mine, "db", ME, 5, others=1))
    assert d.state.phase is Phase.WORKING and not d.state.stopping


def test_without_a_probation_a_takeover_has_passed_at_once() -> None:
    d = Driver(timing=Timing(probation=0)).joined(View(HELD, "db", OTHER, 5))
    d.answer(Claimed, True)
    d.answer(Seen, View(replace(FREE, term=4), "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.probation is Probation.PASSED


def test_a_crash_takes_what_was_said_of_the_hung_one_with_it() -> None:
    """Else the new process would be ended for it when the database answers."""
    d = Driver().working()
    d.feed(Unhealthy(4))
    assert d.feed(Crashed(4)) == [Restart(False)]
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=0)) == []
    d = Driver().took_over()  # on probation it is asked, but of a crash
    d.feed(Unhealthy(4))
    d.feed(Crashed(4))
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=0)) == [Restart(False)]


def test_hung_work_that_comes_round_before_the_database_answers_goes_on() -> None:
    d = Driver().working()
    d.feed(Unhealthy(4))
    d.feed(Healthy(4))
    assert d.answer(Seen, View(d.mine, "db", ME, 5, others=1)) == []
    assert d.state.phase is Phase.WORKING and not d.state.stopping


def test_what_is_said_about_the_health_of_an_earlier_term_is_ignored() -> None:
    d = Driver().working()
    for event in (Unhealthy(3), Crashed(3), Healthy(3)):
        d.feed(event)
    assert d.state.asking is None and not d.state.healthy


@pytest.mark.parametrize("failures", [1, 2, 7])
def test_after_two_failed_probations_a_deployment_does_not_take_over_any_more(failures: int) -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 5, failures=failures))
    assert d.question.verb is (Verb.TOUCH if failures >= 2 else Verb.CLAIM)  # what it is, is said at once
    assert d.state.label == ("quarantined" if failures >= 2 else "standby")


def test_quarantined_or_not_a_vacancy_is_filled() -> None:
    d = Driver().joined(View(FREE, "db", replace(OTHER, ended=True), 5, failures=2))
    assert d.question.verb is Verb.CLAIM


@pytest.mark.parametrize(
    ("probation", "leaves"), [(Probation.ON, False), (Probation.PASSED, True), (Probation.NONE, False)]
)
def test_the_superseded_one_leaves_when_the_newcomer_has_passed(probation: Probation, leaves: bool) -> None:
    newer = Peer("other", 6, False, 3, 0.5)
    for stays in (False, True):
        d = Driver(leaves=not stays).working()
        d.renewed()
        d.feed(Woken())
        d.answer(Seen, View(d.mine, "db", newer, 5))
        d.feed(WorkEnded(4))
        d.answer(Done)
        d.answer(Seen, View(HELD, "db", newer, 5, probation=probation))
        if leaves and not stays:
            assert d.question.verb is Verb.LEAVE and d.question.reason is Reason.SUPERSEDED
        else:
            assert d.state.asking is None and d.state.label == "passive"


def test_moved_by_hand_to_an_older_one_the_newer_one_stays() -> None:
    d = Driver(leaves=True).working()
    d.feed(Woken())
    d.answer(Seen, View(d.mine, "db", OTHER, 5))
    d.feed(WorkEnded(4))
    d.answer(Done)
    d.answer(Seen, View(HELD, "db", OTHER, 5, probation=Probation.PASSED))
    assert d.state.asking is None


# Warm, paused, in danger ------------------------------------------------------------------------------------------


def test_a_warm_newcomer_asks_when_its_work_has_come_to_the_gate() -> None:
    d = Driver(warm=True).joined(View(HELD, "db", OTHER, 5))
    assert d.question.verb is Verb.TOUCH and d.question.label == "warming"
    d.answer(Done)
    assert d.state.asking is None
    d.feed(Ready(True))
    assert d.question.verb is Verb.CLAIM


def test_a_vacancy_is_filled_without_waiting_for_the_gate() -> None:
    d = Driver(warm=True).joined(View(FREE, "db", None, 5))
    assert d.question.verb is Verb.CLAIM


def test_a_pause_drains_the_holder_and_keeps_it_waiting_with_the_assignment() -> None:
    d = Driver().working()
    d.feed(Tick(), after=2)
    assert Drain(d.now + 10, Reason.PAUSED) in d.answer(Renewed, True, False, "db", True)
    d.feed(WorkEnded(4))
    assert d.question.verb is Verb.RELEASE and not d.question.pass_on
    d.answer(Done)
    d.answer(Seen, View(replace(FREE, term=4), "db", ME, 5, paused=True))
    assert d.state.asking is None
    d.feed(Woken())
    d.answer(Seen, View(replace(FREE, term=4), "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE


def test_a_newcomer_waits_while_the_bot_is_paused() -> None:
    d = Driver().joined(View(HELD, "db", OTHER, 5, paused=True))
    assert d.state.asking is None


def test_the_work_is_warned_before_the_end_of_trust_and_told_when_it_is_over() -> None:
    d = Driver().working()
    d.feed(Tick(), after=2)
    late = d.question.serial
    assert d.feed(Tick(), after=2) == [Danger(True)]
    assert Danger(False) in d.feed(Renewed(late, True, False, "db"))
    assert d.feed(Tick(), after=0.1) == []


def test_danger_comes_before_the_drain() -> None:
    for timing in (TIMING, Timing.for_ttl(3), Timing(renew_every=3.0, attempt=1.5)):
        assert timing.renew_every + timing.attempt <= timing.danger_after <= timing.drain_after


@pytest.mark.parametrize("age", [1.0, 1.6])
def test_nothing_is_claimed_on_news_that_we_slept_over(age: float) -> None:
    d = Driver()
    d.answer(Registered, View(HELD, "db", OTHER, 5), after=age)
    assert d.question.verb is (Verb.CLAIM if age < 1.5 else Verb.READ)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ttl": 0.5}, "at least 1 s"),
        ({"renew_every": 6.0}, r"renew_every \+ 2\*attempt = 6 \+ 2\*1.5 = 9 s"),
        ({"kill_budget": 4.0}, r"10\*0.99 - 4 = 5.9 s"),
        ({"lock_delay": -1.0}, "between 0 and 86400"),
    ],
)
def test_timings_that_contradict_each_other_are_refused_with_the_arithmetic(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(TimingError, match=says):
        Timing(**wrong)  # type: ignore[arg-type]


def test_every_ttl_has_timings_that_agree() -> None:
    for tenths in range(10, 6000, 7):
        assert Timing.for_ttl(tenths / 10).trust > 0


def expired_hold() -> Driver:
    """Holding after an expiry, with the lock-delay before us."""
    d = Driver().joined(View(HELD, "db", ME, 5))
    d.state = replace(d.state, evidence=replace(d.state.evidence, since=d.now - 60))
    d.feed(Tick())
    assert d.question.how is How.EXPIRED
    d.answer(Granted, 5, "n", "db")
    assert d.state.phase is Phase.HOLDING
    return d


def test_a_hold_after_an_expiry_is_not_released_before_its_lock_delay_has_passed() -> None:
    d = expired_hold()
    assert verbs(d.feed(StopAsked(), after=0.1)) == []
    assert core.next_wakeup(d.state) == pytest.approx(d.now - 0.1 + TIMING.lock_delay)
    assert verbs(d.feed(Tick(), after=TIMING.lock_delay)) == [Verb.RELEASE]


def test_a_renewal_that_is_denied_during_a_release_does_not_strand_the_instance() -> None:
    d = Driver(timing=Timing.for_ttl(3.0)).joined(View(HELD, "db", ME, 5))
    d.state = replace(d.state, evidence=replace(d.state.evidence, since=d.now - 60))
    d.feed(Tick())
    d.answer(Granted, 5, "n", "db")
    d.feed(Tick(), after=0.65)
    assert d.question.verb is Verb.RENEW
    d.feed(StopAsked())
    d.answer(Denied)
    assert core.next_wakeup(d.state) is not None
    d.feed(Tick(), after=1)
    assert d.question.verb is Verb.RELEASE
    assert d.answer(Denied) == [End(Reason.STOPPED)]


def test_after_meeting_another_database_a_row_seen_before_is_in_doubt() -> None:
    # Found by the simulation (seed 174): the restored row looked just like one that had been seen as free.
    d = Driver().working()
    d.feed(Tick(), after=TIMING.renew_every)
    d.answer(Renewed, True, False, "db2")
    d.feed(WorkEnded(4))
    assert d.question.verb is Verb.RELEASE
    d.answer(Denied)
    d.answer(Seen, View(FREE, "db2", ME, 5))
    assert Verb.ACQUIRE not in verbs(d.actions[-1:])
    assert d.state.evidence.doubted


def test_a_term_whose_owner_was_killed_is_over_and_the_instance_begins_another_one() -> None:
    """The lease names the reaper that is dead: to whoever asks on this host its term looks like that of nobody."""
    d = Driver().took_over()
    d.feed(WorkEnded(4, unowned=True))
    q = d.question
    assert (q.verb, q.reason, q.leave, q.pass_on) == (Verb.RELEASE, Reason.WORK_ENDED, False, False)
    d.answer(Done)
    d.answer(Seen, View(replace(FREE, term=4), "db", ME, 5))
    assert d.question.verb is Verb.ACQUIRE and d.question.probation is Probation.ON
    d.answer(Granted, 5, "m", "db")
    assert d.state.phase is Phase.WORKING and not d.state.stopping


def test_who_lost_its_claim_in_a_fail_over_claims_again() -> None:
    """The first start of a bot: nobody else would, and it waited for ever."""
    d = Driver().joined(View(FREE, "db", None, 5))
    d.answer(Claimed, True)
    d.answer(Seen, View(replace(FREE, origin="other"), "other", None, 5))
    d.feed(Tick(), after=30)
    assert d.question.verb is Verb.CLAIM and d.question.source is None


def test_a_ttl_of_nothing_by_hand_makes_nobody_ask_without_end() -> None:
    d = Driver().joined(View(replace(HELD, ttl=0.0), "db", replace(OTHER, generation=9), 5))
    looks, until = 0, d.now + 10
    while d.now < until:
        if d.state.asking is None:
            at = core.next_wakeup(d.state)
            assert at is not None
            d.feed(Tick(), after=max(0.0, at - d.now))
        elif d.question.verb is Verb.READ:
            looks += 1
            assert looks < 1000
            d.answer(Seen, View(replace(HELD, ttl=0.0), "db", replace(OTHER, generation=9), 5), after=0.001)
        else:
            d.answer(Done, after=0.001)
