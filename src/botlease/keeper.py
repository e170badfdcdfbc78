"""Do. The only loop: events in, :func:`botlease.core.step`, actions out.

One inbox, one timer. Actions become store calls or words to the work; their answers come back as events.
Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from botlease import clock, core
from botlease.core import Phase, State
from botlease.model import (
    Action,
    Arm,
    Ask,
    Claimed,
    Danger,
    Denied,
    Done,
    Drain,
    End,
    Event,
    Failed,
    Granted,
    HolderDied,
    How,
    Kill,
    Lease,
    Question,
    Reason,
    Registered,
    Renewed,
    Restart,
    Seen,
    Start,
    StopAsked,
    Tick,
    Timing,
    Verb,
    View,
    Watch,
    Woken,
    WorkEnded,
)
from botlease.stores import Registration, Store, StoreRefused
from botlease.text import safe
from botlease.work import proof
from botlease.work.base import Work

log = logging.getLogger("botlease")


class Keeper:
    """Runs one instance of one bot until it is told to stop or its work has ended."""

    def __init__(
        self,
        store: Store,
        registration: Registration,
        candidate: core.Candidate,
        timing: Timing,
        work: Work,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.store = store
        self.registration = registration
        self.timing = timing
        self.work = work
        self.say = say
        self.state: State = core.start(candidate, timing, clock.now())
        self._waits_for: str | None = None  # what was said last of why it does not work
        self._refused: dict[Verb, str] = {}  # what was said of a verb that the database refuses
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[Reason] = self._loop.create_future()
        self._calls: set[asyncio.Task[Any]] = set()
        self._watched: dict[int, tuple[Lease, proof.Owner]] = {}
        self._alive: tuple[str, str | None] | None = None  # proof and holder of whom the kernel will tell the end
        self._granted = ""  # the proof that stands in the row of our last grant
        self._owner: tuple[str, str] | None = None  # proof and instance of the last holder on this host that was seen
        self._ran_out: set[tuple[str, str]] = set()  # of these the lease ran out: nothing of theirs may be left
        work.tell = self.feed
        store.on_change = lambda: self.feed(Woken())

    async def run(self) -> Reason:
        """Until the end of this instance. Returns why it ended."""
        self.feed(Tick())
        try:
            return await self._ended
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.store.on_change = None
            self._unwatch()
            for task in self._calls:
                task.cancel()

    def stop(self, reason: Reason = Reason.STOPPED) -> None:
        self.feed(StopAsked(reason))

    # The loop ------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        if self._ended.done():
            return
        try:
            self._step(event)
        except Exception as e:
            # A bug of ours. Nobody would renew or listen any more: end, and the work with us, rather than hang.
            if not self._ended.done():
                self._ended.set_exception(e)

    def _step(self, event: Event) -> None:
        before = self.state.phase
        self.state, actions = core.step(self.state, event, clock.now())
        for action in actions:
            self._act(action)
        if self.state.phase is not before:
            log.debug("%s -> %s on %s", before, self.state.phase, type(event).__name__)
            self._tell()
            if before is Phase.STANDBY and not self._ran_out:
                # What comes of the one before is of no interest, and takes a look at all processes. But if its lease
                # ran out, something of it may be left that falls to nobody when its owners die.
                self._unwatch()
            if self.state.phase is Phase.STANDBY and self.state.me.warm and not self.state.stopping:
                self.work.prepare()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = core.next_wakeup(self.state)
        if at is not None and not self._ended.done():
            # A millisecond late is always safe; early would only make an idle turn.
            self._timer = self._loop.call_later(max(0.0, at - clock.now()) + 0.001, self.feed, Tick())

    def _act(self, action: Action) -> None:
        match action:
            case Ask(question=question):
                task = self._loop.create_task(self._ask(question))
                self._calls.add(task)
            case Arm(until=until):
                self.work.arm(until)
            case Start(term=term, nonce=nonce, until=until):
                # Here and not at the grant: its answer may have been lost, and the term that begins be another one.
                for owner, holder in self._ran_out:
                    proof.sweep(owner, self.registration.bot, holder)
                self._ran_out.clear()
                guard = self.store.guard_fd(self.registration.bot)
                if self.work.proof == self._granted:
                    self.work.start(term, nonce, until, guard)
                else:  # who was to own it has died, and the row names him
                    if guard is not None:
                        os.close(guard)
                    self._loop.call_soon(self.feed, WorkEnded(term, unowned=True))
            case Drain(until=until, reason=reason):
                self.say(f"draining: term {self._term}: {_because(reason)}")
                self.work.drain(until, reason)
            case Kill(reason=reason):
                self.say(f"killing the work: term {self._term}: {_because(reason)}")
                self.work.kill(reason)
            case Restart(hung=hung):
                if hung:
                    self.say(f"no progress: term {self._term}: nobody else can take over: starting the bot again")
                self.work.restart(hung)
            case Danger(on=on):
                self.say(f"{'no' if on else 'again a'} confirmed renewal: term {self._term}")
                self.work.danger(on)
            case Watch(lease=lease):
                self._watch(lease)
            case End(reason=reason):
                if not self._ended.done():
                    self._ended.set_result(reason)

    @property
    def _term(self) -> int:
        return self.state.term.number if self.state.term else 0

    def _tell(self) -> None:
        s = self.state
        if s.phase is Phase.HOLDING and s.term is not None and s.term.start_at > clock.now():
            self.say(
                f"holding term {s.term.number}; the work starts after the lock-delay of {self.timing.lock_delay:g} s"
            )
        elif s.phase is Phase.STANDBY and s.was_active and not s.stopping:
            self.say(f"passive: {_because(s.reason)}; ready to take back")

    def _standby(self, view: View, lease: Lease) -> None:
        """Said once for each reason not to work, or a bot that stands still looks like one that is well; a first start
        that finds the lease free says nothing."""
        asked = self.state.asking
        if lease.holder not in (None, self.registration.instance_id):
            why = f"{lease.holder} works in term {lease.term}"
        elif view.paused:
            why = "nobody may work: the bot is paused (`botlease resume`), or a fleet's (`botlease status`)"
        elif view.assigned is None and lease.holder is None and (asked is None or asked.verb is Verb.TOUCH):
            why = "nobody has the assignment (deactivated, or its row was deleted): `botlease promote` one, or deploy"
        else:
            return
        if why != self._waits_for:
            self._waits_for = why
            self.say(f"{self.state.label}: {why}")

    # Asking the store ------------------------------------------------------------------------------------------

    async def _ask(self, q: Question) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._ask_and_take_in(q)
        except Exception as e:
            # A bug of ours, or the program's own way of logging. A question whose answer never came would be waited for
            # for ever, and nobody renew, nor listen.
            if not self._ended.done():
                self._ended.set_exception(e)
        finally:
            self._calls.discard(task)

    async def _ask_and_take_in(self, q: Question) -> None:
        nonce = os.urandom(8).hex() if q.verb is Verb.ACQUIRE else ""  # a new one each time: no late one is mistaken
        try:
            event = await self._answer(q, nonce)
        except asyncio.CancelledError:
            if self._ended.done():
                raise
            event = Failed(q.serial, nonce)  # a driver's own: nobody else cancels us
        except Exception as e:  # whatever a driver raises: the outcome is unknown
            self._complain(q, e)
            event = Failed(q.serial, nonce)
        else:
            self._refused.pop(q.verb, None)
            if self.state.failures and not self._refused:
                self.say("the database answers again")
        self._take_in(event)

    def _complain(self, q: Question, e: Exception) -> None:
        why = safe(e) or type(e).__name__
        if isinstance(e, StoreRefused):
            # One thing is refused while the others go well: said once, and not at every try.
            if self._refused.get(q.verb) != why:
                self.say(why)
            self._refused[q.verb] = why
        elif not self.state.failures:
            self.say(f"the database does not answer: {why}")
        log.debug("%s failed: %s", q.verb, why)

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Registered | Seen) and event.view.lease is not None:
            lease = event.view.lease
            other = lease.holder not in (None, self.registration.instance_id)
            if other and (lease.proof, lease.holder) != self._alive and proof.owners(lease.proof):
                self._owner = (lease.proof, lease.holder or "")
                # Before the view itself: a second start must not be refused because of a holder that is dead.
                if proof.gone(lease.proof, self.registration.bot, lease.holder or ""):
                    self.feed(HolderDied(lease.term, lease.nonce))
        self.feed(event)
        if isinstance(event, Registered | Seen) and event.view.lease is not None and self.state.phase is Phase.STANDBY:
            self._standby(event.view, event.view.lease)

    async def _answer(self, q: Question, nonce: str) -> Event:
        store, me, limit = self.store, self.registration, self.timing.attempt
        match q.verb:
            case Verb.REGISTER:
                return Registered(q.serial, await store.register(me, limit))
            case Verb.READ:
                return Seen(q.serial, await store.read(me.bot, me.instance_id, limit))
            case Verb.CLAIM:
                return Claimed(q.serial, await store.claim(me.bot, me.instance_id, q.source, limit))
            case Verb.ACQUIRE:
                assert q.key is not None
                proved = self.work.proof
                if q.how is How.EXPIRED and self._owner is not None:
                    self._ran_out.add(self._owner)
                grant = await store.acquire(
                    me.bot,
                    me.instance_id,
                    q.key,
                    nonce=nonce,
                    floor=q.floor,
                    origin=q.origin,
                    how=q.how,
                    ttl=self.timing.ttl,
                    proof=proved,
                    probation=q.probation,
                    deadline=limit,
                )
                if grant is not None and grant.unknown is not None:  # a file was restored under its work
                    self._ran_out.add(grant.unknown)
                if grant is not None and proved != self.work.proof:
                    return Failed(q.serial, nonce)  # the row names an owner that is gone: it is given back
                self._granted = proved
                return Granted(q.serial, grant.term, nonce, grant.origin) if grant else Denied(q.serial)
            case Verb.RENEW:
                assert q.held is not None
                renewal = await store.renew(me.bot, me.instance_id, q.held, q.beat, limit, q.label)
                if renewal is None:
                    return Denied(q.serial)
                return Renewed(q.serial, renewal.assigned, renewal.vacant, renewal.origin, renewal.paused)
            case Verb.RELEASE:
                assert q.held is not None and q.reason is not None
                released = await store.release(
                    me.bot,
                    me.instance_id,
                    q.held,
                    reason=q.reason,
                    pass_on=q.pass_on,
                    leave=q.leave,
                    deadline=limit,
                )
                return Done(q.serial) if released else Denied(q.serial)
            case Verb.PASS:
                assert q.held is not None
                if not await store.passed(me.bot, me.instance_id, q.held, limit):
                    return Denied(q.serial)
                self.say(f"term {q.held[0]} has passed its probation")
            case Verb.TOUCH:
                await store.touch(me.instance_id, q.label, limit)
            case Verb.LEAVE:
                assert q.reason is not None
                await store.leave(me.bot, me.instance_id, reason=q.reason, pass_on=q.pass_on, deadline=limit)
        return Done(q.serial)

    # Watching a holder of this host die -----------------------------------------------------------------------

    def _watch(self, lease: Lease) -> None:
        self._unwatch()
        if lease.holder == self.registration.instance_id:
            return
        owners = proof.owners(lease.proof)
        for owner in owners:
            try:
                fd = os.pidfd_open(owner.pid)
            except (OSError, AttributeError):
                continue
            self._watched[fd] = (lease, owner)
            self._loop.add_reader(fd, self._died, fd)
        # Looked at after the descriptors were opened: they are of those, and not of others that got their numbers.
        if owners and len(self._watched) == len(owners) and all(proof.alive(owner) for owner in owners):
            self._alive = (lease.proof, lease.holder)

    def _died(self, fd: int) -> None:
        self._alive = None
        self._loop.remove_reader(fd)
        lease, _ = self._watched.pop(fd)
        os.close(fd)
        if not self._watched and proof.gone(lease.proof, self.registration.bot, lease.holder or ""):
            self.feed(HolderDied(lease.term, lease.nonce))

    def _unwatch(self) -> None:
        for fd in self._watched:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._watched.clear()
        self._alive = None


def _because(reason: Reason | None) -> str:
    return (
        {
            Reason.STOPPED: "a stop signal",
            Reason.SUPERSEDED: "another instance has the assignment",
            Reason.DEACTIVATED: "the operator deactivated it",
            Reason.PAUSED: "the operator paused the bot",
            Reason.WORK_ENDED: "the work ended",
            Reason.FAILED: "it did not pass its probation",
            Reason.UNHEALTHY: "it made no progress",
            Reason.SILENT: "no renewal was confirmed in time",
            Reason.LOST: "the database says that the term is over",
            Reason.CHANGED: "another database answered",
            Reason.COPIED: "somebody else writes under its name",
        }.get(reason, str(reason))
        if reason
        else "unknown"
    )
