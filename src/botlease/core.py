"""Decide. The whole safety argument of botlease, as one pure function.

``step(state, event, now) -> (state, actions)`` knows no clock, no I/O, no randomness and no
logging. ``now`` is seconds on a clock that also counts suspended time (``CLOCK_BOOTTIME``); the
shell that calls it (:mod:`botlease.keeper`, and the simulation in the tests) owns that clock.
:func:`next_wakeup` says when it wants to be called again.

What it keeps true
==================
A *lease* row holds ``(term, beat, nonce, holder)`` and is only ever changed by compare-and-set::

      asked_at                 drain_at        trusted_until        asked_at + ttl*(1-rho)
         |--- renew, renew ...    |--- SIGTERM ---|--- SIGKILL, reap ---|
                                                   <-- kill_budget -->

* The holder's trust is counted from **before** the renewal was sent (``asked_at``): the row cannot
  have been written earlier. An answer that arrives after ``trusted_until`` counts for nothing (R1).
* A challenger takes the lease only if it was released (which is written after the work's process tree
  is gone), if it saw the same key unchanged for ``ttl*(1+rho)`` on its own clock, or if the kernel of
  the same host proved the holder dead (R3, in :mod:`botlease.evidence`). Its acquire is a compare-and-set on the key
  it saw, so a renewal that slips in between defeats it. After an expiry, however many deaths ago, it waits
  ``lock_delay``.
* Since clock rates differ by less than ``rho``, the last instant a holder can work lies before the first
  instant a challenger can: that is the whole proof. No timestamp of any other machine takes part.
* One question is in flight at a time and every answer names it: a late, repeated or reordered
  answer is dropped at the top of :func:`step`.
* A hold we do not believe in (a grant that came too late, an acquire with an unknown outcome, a
  release that was not confirmed) is *given back*, never adopted: no work runs under it.
* Every renewal and release names the beats it may find. A row that names us with a beat or a nonce that we never
  wrote is written by a copy of this process (a machine restored from a snapshot): we stop, and end without touching it.
* A row that is missing, was written under another database timeline, or went backwards is "not
  mine, not free": it is in *doubt* and must stay unchanged for a full ttl (R6, R7).
* After a stop signal nothing is acquired or claimed again (R8).

Who is newest is no matter of safety, only of whose turn it is
===============================================================
* A strictly newer deployment claims the assignment from a living holder once, when it is ready (a warm start: when
  its work waits at the gate). Everybody else only fills a vacancy. Nothing is claimed on news that was slept over.
* Such a takeover begins on *probation*. If the work dies on it, or proves no progress, and somebody else could take
  over, the term is given up (``FAILED``) and the superseded one has it again; if nobody could, it is started again
  where it is. A deployment that failed :data:`botlease.model.TRIES` times claims from nobody any more.
* When the probation has passed, the superseded one leaves (where its platform would not start it again) or stays.
* Paused, nobody acquires, and the holder drains and keeps the assignment.

Sources: trust from the time of asking is River's leader election; expiry by watching for change is
Kubernetes client-go and the DynamoDB lock client; fencing tokens and the lock-delay are Chubby's; the warning before
the end is the DynamoDB lock client's, the pause is kopf's, handing back to a named one is LiteFS's.
"""

from __future__ import annotations

import math
from enum import StrEnum

from botlease.evidence import Evidence
from botlease.model import (
    TRIES,
    Action,
    Arm,
    Ask,
    Claimed,
    Crashed,
    Danger,
    Denied,
    Done,
    Drain,
    End,
    Event,
    Failed,
    Granted,
    Healthy,
    Held,
    HolderDied,
    How,
    Kill,
    Lease,
    Mode,
    Peer,
    Probation,
    Question,
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
    Unhealthy,
    Verb,
    View,
    Watch,
    Woken,
    WorkEnded,
)
from botlease.value import replace, value

# State -----------------------------------------------------------------------------------------------


class Phase(StrEnum):
    JOINING = "joining"
    STANDBY = "standby"
    HOLDING = "holding"  # the lease is ours, the lock-delay runs
    WORKING = "active"
    DRAINING = "draining"
    RELEASING = "releasing"
    LEAVING = "leaving"
    ENDED = "ended"


@value
class Term:
    number: int
    nonce: str
    origin: str
    asked_at: float
    trusted_until: float
    start_at: float


@value
class Candidate:
    """Who we are and what we may do."""

    instance_id: str
    mode: Mode = Mode.PREEMPT
    warm: bool = False
    """The work is started up to its gate beforehand; a handover is asked for only when it has come there."""
    monitored: bool = False
    """The work must prove progress; a probation is not passed without."""
    leaves: bool = False
    """Superseded for good it ends (its platform would not start it again) instead of staying passive."""


@value
class State:
    me: Candidate
    timing: Timing
    phase: Phase = Phase.JOINING
    asking: Question | None = None
    serial: int = 0
    # when what is due
    look_at: float = 0.0
    woken: bool = False  # since the last look was begun, which may not have seen why
    ask_after: float = 0.0  # a short pause after a failure
    touch_at: float = 0.0
    failures: int = 0
    contact_since: float = 0.0
    # what was seen
    view: View | None = None
    evidence: Evidence = Evidence()
    peer: tuple[str, int] | None = None
    peer_since: float = 0.0
    peer_seen: float = 0.0
    """When somebody was last seen to have the assignment."""
    dismissed: bool = False
    """Who had it was seen to lose it, and nobody got it: the operator's will, which was not meant for others alone."""
    claimed: bool = False
    # The database has been emptied since: no operator's will stands in it, and if all who live have had their turn in
    # the one before, nobody would begin.
    anew: bool = False
    generation: int = 0
    """Of our row when it was last seen."""
    was_active: bool = False
    ready: bool = True
    shown: str = "standby"  # what our row says we are
    give_back_at: float = 0.0
    # Our last nonces, and which beats the row may show with each: the last one confirmed, and those tried since.
    wrote: tuple[tuple[str, tuple[int, ...]], ...] = ()
    # what is held
    term: Term | None = None
    drain_until: float = 0.0
    killed: bool = False
    reason: Reason | None = None
    probation: Probation = Probation.NONE  # of the term that is held, or of the one that begins next
    work_since: float = 0.0
    healthy: bool = False
    ailing: bool = False  # crashed on probation, or without progress: somebody else may have to take over
    hung: bool = False  # ailing, though it runs
    danger: bool = False
    # the end
    stopping: bool = False
    leave_by: float = 0.0

    @property
    def label(self) -> str:
        """The word for the status table: a superseded instance is passive, not a mere standby."""
        if self.phase is not Phase.STANDBY:
            return str(self.phase)
        if self.was_active:
            return "passive"
        if self.view is not None and self.view.failures >= TRIES:
            return "quarantined"
        return "standby" if self.ready else "warming"


def start(me: Candidate, timing: Timing, now: float) -> State:
    return State(me=me, timing=timing, look_at=now, contact_since=now, touch_at=now + timing.ttl, ready=not me.warm)


def step(state: State, event: Event, now: float) -> tuple[State, list[Action]]:
    """Take in one event and say what to do. Same state, event and time: same answer."""
    actions: list[Action] = []
    # Deadlines come first: an answer that arrives after the end of trust finds the trust ended.
    state = _deadlines(state, now, actions)
    state = _absorb(state, event, now, actions)
    state = _deadlines(state, now, actions)
    state = _plan(state, now, actions)
    return state, actions


# Deadlines -------------------------------------------------------------------------------------------


def _deadlines(s: State, now: float, out: list[Action]) -> State:
    t = s.term
    if t is None:
        return s
    if s.phase is Phase.HOLDING and now >= t.trusted_until:
        return _disbelieve(s, now)
    if s.phase is Phase.WORKING:
        if now >= t.trusted_until:
            return _kill(s, Reason.SILENT, out)
        if now >= t.asked_at + s.timing.drain_after:
            return _drain(s, t.trusted_until, Reason.SILENT, out)
        if not s.danger and now >= t.asked_at + s.timing.danger_after:
            out.append(Danger(True))
            return replace(s, danger=True)
    if s.phase is Phase.DRAINING and not s.killed and now >= min(s.drain_until, t.trusted_until):
        return _kill(s, s.reason or Reason.SILENT, out)
    return s


def _drain(s: State, until: float, reason: Reason, out: list[Action]) -> State:
    out.append(Drain(until, reason))
    return replace(s, phase=Phase.DRAINING, drain_until=until, reason=reason, killed=False)


def _kill(s: State, reason: Reason, out: list[Action]) -> State:
    out.append(Kill(reason))
    return replace(s, phase=Phase.DRAINING, reason=reason, killed=True)


def _disbelieve(s: State, now: float) -> State:
    """Drop a hold under which no work runs. The row may still name us: it is read, then given back."""
    asking = None if s.asking is not None and s.asking.verb is Verb.RENEW else s.asking
    back = max(s.give_back_at, _release_from(s.term)) if s.term is not None else s.give_back_at
    return replace(s, phase=Phase.STANDBY, term=None, asking=asking, view=None, look_at=now, give_back_at=back)


def _release_from(t: Term) -> float:
    """Nothing may read "released" before the lock-delay has passed, even if no work began: whoever reads it starts at
    once, while the requests of the one before may still be on their way."""
    return t.start_at


# Taking in -------------------------------------------------------------------------------------------


def _absorb(s: State, event: Event, now: float, out: list[Action]) -> State:
    match event:
        case Tick():
            return s
        case Woken():
            return replace(s, look_at=min(s.look_at, now), woken=True)
        case StopAsked(reason):
            return _stop(s, reason, now, out)
        case WorkEnded():
            return _work_ended(s, event, now)
        case HolderDied(term, nonce):
            return replace(s, evidence=replace(s.evidence, proved=(term, nonce)))
        case Ready(ready):
            return replace(s, ready=ready)
        case Healthy() | Crashed() | Unhealthy():
            return _felt(s, event, now, out)
    q = s.asking
    if q is None or q.serial != event.serial:
        return s  # the answer to a question we gave up on: late, repeated or reordered
    s = replace(s, asking=None)
    if isinstance(event, Failed):
        return _failed(_may_have_written(s, event.nonce, (0,)) if event.nonce else s, q, now)
    if s.failures:
        s = replace(s, failures=0, contact_since=now)
    match event:
        case Registered(view=view) | Seen(view=view):
            s = replace(s, phase=Phase.STANDBY) if s.phase is Phase.JOINING else s
            s = _saw(s, view, now, out)
            if now > q.asked_at + s.timing.attempt:
                # We slept over it. Good enough to watch by, but nothing is claimed on the strength of old news.
                s = replace(s, view=None, look_at=min(s.look_at, now))
            return s
        case Claimed(ok=ok):
            return replace(
                s,
                claimed=s.claimed or ok,
                anew=s.anew and not ok,
                probation=s.probation if ok else Probation.NONE,
                view=None,
                look_at=now,
            )
        case Granted():
            return _granted(s, q, event, now, out)
        case Denied():
            return _denied(s, q, now, out)
        case Renewed():
            return _renewed(s, q, event, now, out)
        case Done():
            return _done(s, q, now, out)
    return s


def _stop(s: State, reason: Reason, now: float, out: list[Action]) -> State:
    if s.stopping:
        return s
    s = replace(s, stopping=True, leave_by=now + 3 * s.timing.attempt, ask_after=now)
    if s.phase is Phase.WORKING:
        return _drain(s, now + s.timing.stop_grace, reason, out)
    if s.phase is Phase.HOLDING:
        return replace(s, phase=Phase.RELEASING, reason=reason)
    return replace(s, reason=reason) if s.phase in (Phase.JOINING, Phase.STANDBY) else s


def _felt(s: State, event: Healthy | Crashed | Unhealthy, now: float, out: list[Action]) -> State:
    """How the work is. If it ails, the database is asked whether anybody could do better."""
    if s.phase is not Phase.WORKING or s.term is None or s.term.number != event.term:
        return s
    if isinstance(event, Healthy):
        return replace(s, healthy=True, ailing=s.ailing and not s.hung, hung=False)  # it has come round by itself
    hung = isinstance(event, Unhealthy)
    if not hung:
        # A probation begins anew with a new process, and what was said of the one before is over.
        s = replace(s, work_since=now, healthy=False, ailing=False, hung=False)
        if s.probation is not Probation.ON:
            out.append(Restart(hung=False))  # it has proved itself: it is started again within the term
            return s
    return replace(s, ailing=True, hung=s.hung or hung, look_at=now)


def _ails(s: State, others: int, now: float, out: list[Action]) -> State:
    """The answer. Somebody else is there: give the term up, and end. Nobody is: go on trying."""
    if others:
        s = replace(s, stopping=True, leave_by=now + 3 * s.timing.attempt)
        return _drain(
            s, now + s.timing.stop_grace, Reason.FAILED if s.probation is Probation.ON else Reason.UNHEALTHY, out
        )
    out.append(Restart(s.hung))
    return replace(s, ailing=False, hung=False)


def _work_ended(s: State, event: WorkEnded, now: float) -> State:
    if s.term is None or s.term.number != event.term or s.phase not in (Phase.WORKING, Phase.DRAINING):
        return s
    asking = s.asking
    if asking is not None and asking.verb is not Verb.ACQUIRE:
        asking = None  # its answer can no longer matter, and the release must not wait for it
    if s.phase is Phase.WORKING and event.unowned:
        s = replace(s, reason=Reason.WORK_ENDED)
    elif s.phase is Phase.WORKING:  # it ended by itself: the instance is finished
        failed = s.probation is Probation.ON and not event.done
        s = replace(s, reason=Reason.FAILED if failed else Reason.WORK_ENDED, stopping=True)
    return replace(
        s, phase=Phase.RELEASING, asking=asking, was_active=True, leave_by=now + 3 * s.timing.attempt, ask_after=now
    )


def _failed(s: State, q: Question, now: float) -> State:
    pause = min(0.1 * 2 ** min(s.failures, 4), s.timing.renew_every)
    s = replace(s, failures=s.failures + 1, ask_after=now + pause)
    if q.verb in (Verb.ACQUIRE, Verb.CLAIM, Verb.RELEASE):
        s = replace(s, view=None, look_at=now)
        if q.verb is Verb.ACQUIRE and q.lock_delay:
            # Should it have been granted after all, the lock-delay must pass before we write "released".
            s = replace(s, give_back_at=q.asked_at + q.lock_delay)
        if q.verb is Verb.RELEASE and s.phase is Phase.RELEASING:
            s = replace(s, phase=Phase.STANDBY, term=None)
    return s


def _may_have_written(s: State, nonce: str, beats: tuple[int, ...]) -> State:
    """Remember it for :func:`_copied`. Eight: more acquires than can be in doubt before one is read back."""
    others = tuple(w for w in s.wrote if w[0] != nonce)
    return replace(s, wrote=(*others, (nonce, beats))[-8:])


def _copied(s: State, view: View, lease: Lease) -> bool:
    """The row names us, but we did not write it. (After a fail-over it may be an older one of ours.)"""
    if lease.origin != view.origin:
        return False
    return lease.beat not in _beats(s, lease.nonce)


def _beats(s: State, nonce: str) -> tuple[int, ...]:
    return dict(s.wrote).get(nonce, ())


def _held(s: State, t: Term) -> Held:
    return Held(t.number, t.nonce, _beats(s, t.nonce))


def _saw(s: State, view: View, now: float, out: list[Action]) -> State:
    """Take in one read. ``now`` is after the read completed: that is when the watching begins."""
    lease = view.lease
    if s.term is not None and s.phase in (Phase.WORKING, Phase.HOLDING, Phase.DRAINING):
        if view.origin != s.term.origin or (s.evidence.origin and s.evidence.origin != view.origin):
            return _term_over(_elsewhere(s, view.origin), Reason.CHANGED, now, out)
        held = _held(s, s.term)
        if lease is None or (lease.term, lease.nonce) != held[:2] or lease.beat not in held.beats:
            return _term_over(s, Reason.LOST, now, out)
        assigned = view.assigned is not None and view.assigned.instance_id == s.me.instance_id
        s = replace(s, look_at=now if s.woken else now + 3600.0)
        if not assigned or view.paused:
            return _unassigned(s, _why_not(view.paused, view.assigned is None), now, out)
        return _ails(s, view.others, now, out) if s.ailing and s.phase is Phase.WORKING else s
    origin = s.evidence.origin  # of the look before
    # Our row is gone; or it has another generation: a registration of ours was on its way when all was emptied.
    if view.generation != s.generation and (lease is None or lease.served == 0):
        s = replace(s, anew=s.anew or s.generation > 0)
    s = replace(s, generation=view.generation or s.generation)
    if origin and origin != view.origin and view.assigned is None:
        s = replace(s, claimed=False)  # the fail-over has lost our own claim, and nobody else would make it
    if lease is not None and lease.holder and lease.proof and s.evidence.is_new(lease):
        out.append(Watch(lease))
    look_at = now if s.woken else now + _interval(s, view, lease)
    s = replace(s, view=view, evidence=s.evidence.saw(lease, view.origin, now), look_at=look_at)
    if lease is None:
        return s
    if lease.ttl < s.timing.ttl:  # who has a longer ttl of its own shows itself as often as the lease is judged by
        s = replace(s, touch_at=min(s.touch_at, now + max(1.0, lease.ttl)))
    peer = (view.assigned.instance_id, view.assigned.beat) if view.assigned else None
    if peer is not None:
        s = replace(s, peer_seen=now, dismissed=False)
    elif s.peer is not None and origin == view.origin and now < s.peer_seen + s.timing.ttl:
        # Had he ended by himself, it would have been handed on to us, unless we looked dead then: we have not for long.
        # (Another database, or one that went back, may never have known of him.)
        s = replace(s, dismissed=True)
    if peer != s.peer:
        s = replace(s, peer=peer, peer_since=now)
    return s


def _elsewhere(s: State, origin: str) -> State:
    """Another database answers: what was seen in the one before is no evidence."""
    return replace(s, evidence=replace(s.evidence, origin=origin, key=None))


def _interval(s: State, view: View, lease: Lease | None) -> float:
    """How soon to look again where no notification comes: often while somebody is handing over to us. The next in line
    looks shortly after each beat: from when on the last one counts as unchanged depends on when it was seen, and at any
    other time it would be seen up to a whole interval later. (In step with one another only two look, not a hundred.)
    That the database's clock tells when the beats are does no harm: at worst it is as if it did not. Nobody looks more
    seldom for a holder that renews more seldom, or a ttl that somebody set to hours by hand: only this look tells it of
    its assignment where no notification comes."""
    mine = view.assigned is not None and view.assigned.instance_id == s.me.instance_id
    if mine:
        return min(0.2, s.timing.renew_every)
    if lease is None or lease.holder is None or view.ahead:
        return s.timing.renew_every
    every = max(1.0, lease.ttl) * s.timing.renew_every / s.timing.ttl  # no ttl is shorter, but by hand
    most = min(every, s.timing.renew_every)
    # A beat that is overdue: again soon, then ever later. It may be late by a little.
    return min(abs(view.renewed_ago - every), most) + 0.05 * most


def _why_not(paused: bool, vacant: bool) -> Reason:
    if paused:
        return Reason.PAUSED
    return Reason.DEACTIVATED if vacant else Reason.SUPERSEDED


def _unassigned(s: State, reason: Reason, now: float, out: list[Action]) -> State:
    if s.phase is Phase.WORKING:
        return _drain(s, now + s.timing.stop_grace, reason, out)
    if s.phase is Phase.HOLDING:
        return replace(s, phase=Phase.RELEASING, reason=reason)
    return s


def _term_over(s: State, reason: Reason, now: float, out: list[Action]) -> State:
    """The row says so: no grace, somebody may be waiting out the very last of it."""
    if s.phase is Phase.HOLDING:
        return _disbelieve(s, now)
    if s.phase in (Phase.WORKING, Phase.DRAINING) and not s.killed:
        return _kill(s, reason, out)
    return s  # RELEASING: no work runs, and the release itself will find out


def _granted(s: State, q: Question, event: Granted, now: float, out: list[Action]) -> State:
    until = q.asked_at + s.timing.trust
    s = _may_have_written(s, event.nonce, (0,))
    if now >= until or s.phase is not Phase.STANDBY:
        return _disbelieve(replace(s, give_back_at=q.asked_at + q.lock_delay), now)
    term = Term(event.term, event.nonce, event.origin, q.asked_at, until, now + q.lock_delay)
    floor = max(s.evidence.floor, event.term)
    s = replace(s, term=term, evidence=replace(s.evidence, floor=floor), killed=False, reason=None)
    # Only who is assigned is granted it; and its own row says so, with a heartbeat.
    s = replace(s, claimed=True, anew=False, touch_at=q.asked_at + s.timing.ttl, shown=str(Phase.WORKING))
    if s.stopping:
        return replace(s, phase=Phase.RELEASING, reason=Reason.GIVEN_BACK)
    return replace(s, phase=Phase.HOLDING)


def _denied(s: State, q: Question, now: float, out: list[Action]) -> State:
    if q.verb is Verb.RENEW:
        return _term_over(s, Reason.LOST, now, out)
    if q.verb is Verb.RELEASE:
        return _done(s, q, now, out)  # the term is not ours any more: just as good
    if q.verb is Verb.PASS:
        # The row itself decides whether the term is ours. Asked again and again it would be asked for ever.
        return replace(s, probation=Probation.NONE, look_at=now)
    return replace(s, view=None, look_at=now)


def _renewed(s: State, q: Question, event: Renewed, now: float, out: list[Action]) -> State:
    t = s.term
    if t is None or q.held is None or q.held[:2] != (t.number, t.nonce) or now >= t.trusted_until:
        return s  # it came after the end of trust: it counts for nothing
    if event.origin != t.origin:
        return _term_over(_elsewhere(s, event.origin), Reason.CHANGED, now, out)
    t = replace(t, asked_at=q.asked_at, trusted_until=q.asked_at + s.timing.trust)
    if q.label:
        s = replace(s, touch_at=q.asked_at + s.timing.ttl, shown=q.label)
    s = _may_have_written(replace(s, term=t), t.nonce, (q.beat,))
    if s.phase in (Phase.WORKING, Phase.DRAINING) and not s.killed:
        out.append(Arm(t.trusted_until))
    if s.danger and s.phase is Phase.WORKING:
        out.append(Danger(False))
        s = replace(s, danger=False)
    if event.assigned and not event.paused:
        return s
    return _unassigned(s, _why_not(event.paused, event.vacant), now, out)


def _done(s: State, q: Question, now: float, out: list[Action]) -> State:
    if q.verb is Verb.TOUCH:
        return replace(s, touch_at=now + s.timing.ttl, shown=q.label)
    if q.verb is Verb.PASS:
        if s.ailing and not s.hung:
            out.append(Restart(hung=False))  # a crash that crossed it, as any other
        return replace(s, probation=Probation.PASSED, ailing=s.hung)
    if q.verb is Verb.LEAVE or q.leave:
        return replace(s, phase=Phase.ENDED, term=None)
    if q.verb is Verb.RELEASE:
        phase = Phase.STANDBY if s.phase is Phase.RELEASING else s.phase
        s = replace(s, phase=phase, term=None, view=None, look_at=now, give_back_at=0.0)
        if q.reason in (Reason.SUPERSEDED, Reason.DEACTIVATED):
            # Its turn is over. After an interruption the probation begins anew.
            s = replace(s, probation=Probation.NONE)
        return replace(s, shown="passive")  # the release wrote it
    return s


# Planning --------------------------------------------------------------------------------------------


def _plan(s: State, now: float, out: list[Action]) -> State:
    """Look at the facts and do the next thing that is due."""
    t = s.term
    if s.phase is Phase.HOLDING and t is not None and now >= t.start_at:
        out.append(Arm(t.trusted_until))
        out.append(Start(t.number, t.nonce, t.trusted_until))
        # Word that came while the acquire was on its way may be an operator's, and not of that acquire itself.
        look_at = now if s.woken else now + 3600.0
        s = replace(s, phase=Phase.WORKING, was_active=True, look_at=look_at, work_since=now)
        s = replace(s, healthy=False, ailing=False, hung=False, danger=False)
    if s.phase is Phase.ENDED:
        out.append(End(s.reason or Reason.STOPPED))
        return s
    if s.stopping and now >= s.leave_by and s.phase in (Phase.JOINING, Phase.STANDBY, Phase.LEAVING, Phase.RELEASING):
        # The database does not answer. No work runs; the lease, if any, runs out by itself.
        out.append(End(s.reason or Reason.STOPPED))
        return replace(s, phase=Phase.ENDED, asking=None)
    if s.asking is not None or now < s.ask_after:
        return s
    match s.phase:
        case Phase.JOINING:
            return _finish(s, now, out) if s.stopping else _ask(s, now, out, Verb.REGISTER)
        case Phase.STANDBY:
            return _plan_standby(s, now, out)
        case Phase.HOLDING | Phase.WORKING | Phase.DRAINING:
            return _plan_hold(s, now, out)
        case Phase.RELEASING:
            assert t is not None
            if now < _release_from(t):
                return s
            last = s.stopping
            return _ask(
                s,
                now,
                out,
                Verb.RELEASE,
                held=_held(s, t),
                reason=s.reason or Reason.STOPPED,
                pass_on=last,
                leave=last,
            )
        case Phase.LEAVING:
            return _finish(s, now, out)
    return s


def _ask(s: State, now: float, out: list[Action], verb: Verb, **fields: object) -> State:
    q = Question(verb, s.serial + 1, now, **fields)  # type: ignore[arg-type]
    out.append(Ask(q))
    looks = verb in (Verb.READ, Verb.REGISTER, Verb.ACQUIRE)
    return replace(s, asking=q, serial=q.serial, woken=s.woken and not looks)


def _finish(s: State, now: float, out: list[Action]) -> State:
    return _ask(replace(s, phase=Phase.LEAVING), now, out, Verb.LEAVE, reason=s.reason or Reason.STOPPED, pass_on=True)


def _plan_hold(s: State, now: float, out: list[Action]) -> State:
    t = s.term
    assert t is not None
    if now >= t.asked_at + s.timing.renew_every and not s.killed:
        # Two copies must not write the same beat, or each would take the other's for its own: the nanosecond differs.
        held = _held(s, t)
        beat = max(held.beats) + 1 + int(now * 1e9) % 2**20
        # The own heartbeat is written by the renewal that comes closest to its time: a statement and a commit less.
        shows = s.phase is Phase.WORKING and now >= s.touch_at - s.timing.renew_every / 2 and not s.failures
        s = _ask(s, now, out, Verb.RENEW, held=held, beat=beat, label=s.label if shows else "")
        return _may_have_written(s, t.nonce, (*held.beats, beat))
    if now >= s.look_at and s.phase is not Phase.DRAINING:
        return _ask(s, now, out, Verb.READ)
    if s.phase is Phase.WORKING and now >= _passed_at(s):
        return _ask(s, now, out, Verb.PASS, held=_held(s, t))
    return s


def _passed_at(s: State) -> float:
    """When the probation is over, as things are now."""
    if s.probation is not Probation.ON or s.ailing or (s.me.monitored and not s.healthy):
        return math.inf
    return s.work_since + s.timing.probation


def _plan_standby(s: State, now: float, out: list[Action]) -> State:
    view = s.view
    if view is not None and s.woken and _may_take_unread(s, view, now):
        return _acquire(s, view, How.RELEASED, now, out)
    if view is None or now >= s.look_at:
        return _ask(s, now, out, Verb.READ)
    lease = view.lease
    if lease is None or not view.generation:
        # The lease row or our own row vanished. Registering puts back what is missing, in doubt, never free.
        return _finish(s, now, out) if s.stopping else _ask(s, now, out, Verb.REGISTER)
    if view.ended or (lease.holder == s.me.instance_id and _copied(s, view, lease)):
        # Without a word to the database: what stands there is another's. A new start has a name of its own.
        reason = s.reason or Reason.STOPPED if s.stopping else Reason.COPIED
        out.append(End(reason))
        return replace(s, phase=Phase.ENDED, reason=reason)
    if lease.holder == s.me.instance_id:
        if now >= s.give_back_at:
            reason = Reason.GIVEN_BACK if s.reason is None else s.reason
            held = Held(lease.term, lease.nonce, (lease.beat,))
            return _ask(s, now, out, Verb.RELEASE, held=held, reason=reason)
        return s
    if s.stopping:
        return _finish(s, now, out)
    if s.me.mode is Mode.REFUSE and _somebody_lives(s, view, now):
        return _finish(replace(s, stopping=True, leave_by=now + s.timing.attempt * 2, reason=Reason.REFUSED), now, out)
    if s.was_active and s.me.leaves and _superseded_for_good(view, lease):
        return _finish(
            replace(s, stopping=True, leave_by=now + s.timing.attempt * 2, reason=Reason.SUPERSEDED), now, out
        )
    if view.paused:
        return _touch(s, now, out)
    if view.assigned is not None and view.assigned.instance_id == s.me.instance_id:
        s = replace(s, claimed=True, anew=False)
        how = s.evidence.vacancy(lease, s.timing, now)
        if how is not None:
            return _acquire(s, view, how, now, out)
    elif _may_claim(s, view, lease, now):
        peer = view.assigned
        # With nobody to give it back to there is no probation.
        newcomer = peer is not None and not peer.ended and view.generation > peer.generation
        s = replace(
            s,
            probation=Probation.NONE if not newcomer else Probation.ON if s.timing.probation > 0 else Probation.PASSED,
        )
        return _ask(s, now, out, Verb.CLAIM, source=peer.key if peer else None)
    return _touch(s, now, out)


def _may_take_unread(s: State, view: View, now: float) -> bool:
    """It is our turn, or would be next, and there is word of a change: it may be the release. The acquire asks for it
    in the row itself, and for all else that a look would; so the look, which the bot would stand still for, is saved.
    It is no release after all: then the acquire is refused, and we look. (A release that was seen is not looked at
    again either because of word that came meanwhile.)"""
    lease = view.lease
    if lease is None or view.ended or view.paused or s.stopping or s.me.mode is Mode.REFUSE:
        return False
    mine = view.assigned is not None and view.assigned.instance_id == s.me.instance_id
    how = s.evidence.vacancy(lease, s.timing, now)
    if lease.holder is None:
        return mine and how is How.RELEASED
    if how is not None or s.failures:  # the dead release nothing; and a silent database is asked what it answers itself
        return False
    next_in_line = mine or view.ahead == 0
    return next_in_line and lease.holder != s.me.instance_id and s.evidence.may_be_taken_unread(lease)


def _acquire(s: State, view: View, how: How, now: float, out: list[Action]) -> State:
    lease = view.lease
    assert lease is not None
    return _ask(
        s,
        now,
        out,
        Verb.ACQUIRE,
        key=lease.key,
        floor=s.evidence.floor_of(lease, view.origin, view.era),
        origin=view.origin,
        how=how,
        lock_delay=s.timing.lock_delay if s.evidence.unsettled(how, view.rooted, s.timing, now) else 0.0,
        probation=s.probation,
    )


def _touch(s: State, now: float, out: list[Action]) -> State:
    """A standby's heartbeat; at once when it has become something else, for those who watch."""
    due = now >= s.touch_at or s.label != s.shown
    return _ask(s, now, out, Verb.TOUCH, label=s.label) if due else s


def _superseded_for_good(view: View, lease: Lease) -> bool:
    """A newer one took over, works, and has passed its probation."""
    peer = view.assigned
    if peer is None or lease.holder != peer.instance_id:
        return False
    return view.probation is Probation.PASSED and peer.generation > view.generation


def _somebody_lives(s: State, view: View, now: float) -> bool:
    lease, peer = view.lease, view.assigned
    assert lease is not None
    if lease.holder is not None and s.evidence.vacancy(lease, s.timing, now) is None:
        return view.renewed_ago < s.timing.patience(lease.ttl)
    if peer is None or peer.instance_id in (s.me.instance_id, lease.holder):
        return False  # whoever held it is dead or gone
    return not peer.ended and peer.age < 2 * s.timing.ttl


def _may_claim(s: State, view: View, lease: Lease, now: float) -> bool:
    peer = view.assigned
    if peer is None:
        # Nobody is assigned: the first start, or the operator's will. Only a deployment that has not
        # had its turn may end that; nobody promotes himself back.
        new = lease.served == 0 if s.me.mode is Mode.WAIT else view.generation > lease.served
        return new and (not (s.claimed or s.dismissed) or (s.anew and lease.served == 0))
    newest = s.me.mode is Mode.PREEMPT and not s.claimed and view.generation > peer.generation
    if newest and s.ready and view.failures < TRIES:
        return True
    return now >= _failover_at(s, view, lease, peer)


def _failover_at(s: State, view: View, lease: Lease, peer: Peer) -> float:
    """When the assigned instance counts as dead for us. Only a matter of liveness: the lease decides safety."""
    wait = view.ahead * s.timing.renew_every
    if peer.ended:
        return s.evidence.since + wait
    if lease.holder == peer.instance_id:
        if s.evidence.died(lease):
            return s.evidence.since + wait
        # After an outage of the database the assigned one gets a moment to come back first.
        back = s.contact_since + 2 * s.timing.renew_every
        return max(s.evidence.since + s.timing.patience(lease.ttl), back) + wait
    # It shows itself once in its own ttl, which the lease's row knows.
    return max(s.peer_since, s.contact_since) + 2.5 * max(s.timing.ttl, lease.ttl) + wait


# When to wake ----------------------------------------------------------------------------------------


def next_wakeup(s: State) -> float | None:
    """The next moment at which :func:`step` has something to do without an event, or None."""
    if s.phase is Phase.ENDED:
        return None
    due: list[float] = []
    t = s.term
    if t is not None:
        if s.phase is Phase.HOLDING:
            due += [t.start_at, t.trusted_until]
        elif s.phase is Phase.WORKING:
            due += [t.asked_at + s.timing.drain_after, t.trusted_until]
            if not s.danger:
                due.append(t.asked_at + s.timing.danger_after)
        elif s.phase is Phase.DRAINING and not s.killed:
            due += [s.drain_until, t.trusted_until]
    if s.stopping and s.phase in (Phase.JOINING, Phase.STANDBY, Phase.LEAVING, Phase.RELEASING):
        due.append(s.leave_by)
    if s.asking is None:
        ask = _next_question(s)
        if ask is not None:
            due.append(max(ask, s.ask_after))
    return min(due) if due else None


def _next_question(s: State) -> float | None:
    t = s.term
    if s.phase in (Phase.HOLDING, Phase.WORKING, Phase.DRAINING):
        assert t is not None
        due = [] if s.killed else [t.asked_at + s.timing.renew_every]
        if s.phase is not Phase.DRAINING:
            due.append(s.look_at)
        if s.phase is Phase.WORKING:
            due.append(_passed_at(s))
        return min(due) if due else None
    if s.phase is Phase.RELEASING and t is not None:
        return max(s.ask_after, _release_from(t))
    view = s.view
    if s.phase is not Phase.STANDBY or view is None or view.lease is None or not view.generation:
        return s.ask_after
    due = [s.look_at]
    if view.lease.holder == s.me.instance_id:
        due.append(s.give_back_at)
        return min(due)
    due.append(s.touch_at)
    if view.paused:
        return min(due)
    if view.assigned is not None and view.assigned.instance_id == s.me.instance_id:
        due.append(s.evidence.since + s.timing.patience(view.lease.ttl))
    elif view.assigned is not None:
        due.append(_failover_at(s, view, view.lease, view.assigned))
    return min(due)
