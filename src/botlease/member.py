"""One process in one slot of a fleet. Here is only the loop: look at the slots, bury the dead, take bots and give them.

Each *member* holds one *slot*, whose lease is an ordinary one, kept by the ordinary :class:`botlease.keeper.Keeper`:
newest deployment, probation, operator's edits, fence and all. The bots of the slot run under that one hold, as
coroutines, each in a term of its own; see :mod:`botlease.stores.postgresfleet` for why that is safe, and
:mod:`botlease.placement` for who runs what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from botlease import clock, placement
from botlease.core import Phase
from botlease.evidence import Evidence
from botlease.inside import Session, Term, outlast
from botlease.keeper import Keeper, log
from botlease.model import How, Lease, Mode, Reason
from botlease.stores import StoreError
from botlease.text import redact, safe
from botlease.value import replace
from botlease.work import proof
from botlease.work.body import LAST_WORDS, BodyWork, Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from botlease.stores.postgresfleet import Hold, PostgresFleet, Row, Slot

BATCH: Final = 500
"""Bots in one statement: some 30 ms of the server, so that the renewal behind it does not wait long."""
ROOM: Final = 64
"""Bots on the move from one member at once: each is down for some milliseconds, and all of them at once would make
every user of the fleet wait for the slowest."""
CALM: Final = 1.0
"""Seconds without a new slot before bots are moved to those that came: processes of one roll-out come one by one."""
UNKNOWN: Final = frozenset({Reason.SILENT, Reason.LOST, Reason.CHANGED, Reason.COPIED})
"""After these nothing can be given back: the database does not answer, or says that it is not ours any more."""

SLOT: Final = re.compile(r"[^ /]+/[0-9]+")
"""What stands for a proof in a row that a member holds: the name of a slot, of whichever fleet."""

Function = Callable[[Term], Awaitable[object]]


def _traceback() -> str:
    """Of what is being handled. A library may quote in it the address that it asked, and the bot's token in that."""
    return redact(traceback.format_exc().rstrip())


def batches(bots: list[Any]) -> Iterable[list[Any]]:
    return (bots[n : n + BATCH] for n in range(0, len(bots), BATCH))


@dataclass
class _Running:
    term: Term
    share: Share
    task: asyncio.Task[None]
    to: int | None = None
    """The slot that it goes to when it has stopped; None: it is not stopping."""
    reason: Reason = Reason.SUPERSEDED
    settling: asyncio.Future[None] | None = None


class Member:
    """One process in one slot, from its registration to its end."""

    def __init__(
        self, session: Session, fleet: PostgresFleet, function: Function, number: int, generation: int, who: str
    ) -> None:
        from botlease.stores.postgres import PostgresStore
        from botlease.stores.postgresfleet import slot_name

        self.fleet, self.function, self.number, self.generation, self.who = fleet, function, number, generation, who
        self.settings = session.settings
        self.newer = session.mode is Mode.PREEMPT
        self.timing = session.settings.timing
        self.name = session.settings.bot
        self.work = BodyWork(self._begin, self._cancel, session.warn)
        self.work.on_arm = self._armed
        self.keeper: Keeper = session.keeper(self.work, slot_name(self.name, number), who)
        assert isinstance(session.store, PostgresStore)
        self.store = session.store
        self.living: Callable[[list[Slot], str], list[Slot]] = lambda slots, origin: slots
        """The slots as a process sees them that chooses one: those of the dead are free."""
        self.running: dict[str, _Running] = {}
        self.hold: Hold | None = None
        self.leaving: Reason | None = None
        self._begun: int | None = None
        self._to_give: list[tuple[str, int]] = []  # held and not running: came too late, or was locked by somebody
        self._elsewhere = False  # this slot is another's: choose a new one
        self._wake = asyncio.Event()
        self._dirty = True
        self._rows_at = 0.0
        self._calm_at = 0.0
        self._slots: frozenset[int] = frozenset()
        self._seen: set[str] = set()  # the names of all slots, whoever has them
        self._soon = False  # look again at once
        self._alone = False  # no other slot is held, open, or to be buried
        self._marked = False
        self._evidence: dict[str, Evidence] = {}
        self._silent = False
        # often enough that a death elsewhere is seen soon, and the phase of a beat hardly counts
        self._poll = min(0.25, self.timing.renew_every / 4)

    # From outside ------------------------------------------------------------------------------------------------

    async def run(self) -> Reason | None:
        """Why it ended; None: this slot was another's, and a new one must be chosen."""
        self.store.heard = self._heard
        keeping = asyncio.ensure_future(self.keeper.run())
        keeping.add_done_callback(lambda _: self._wake.set())
        try:
            while not keeping.done():
                await self._turn_or_say()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._pause())
                self._wake.clear()
            why = keeping.result()
            return None if self._elsewhere and why is Reason.STOPPED else why
        finally:
            # A bug of ours, or we were cancelled: nothing may go on, and the lease is given back. The stop comes first:
            # with it the fence ends the process for a bot that does not end.
            self.keeper.stop()
            try:
                if self._begun is not None:
                    await self._leave()
            finally:
                await self._end_all()
                self.work.ended()
                await outlast(keeping)
                self.store.heard = None
                self.work.close()

    def stop(self) -> None:
        self.keeper.stop()

    def _pause(self) -> float:
        soon, self._soon = self._soon, False
        if soon:
            return 0.01
        if self.hold is None:
            return self.timing.renew_every
        if not self._alone or self._to_give or self.store.pooled:
            return self._poll
        # Nobody is there whose death could be seen, and of who comes a notification tells: with one look for each
        # renewal and not eight a member with one bot takes a quarter of the processor time (3.7 s an hour, it was 15).
        return max(self._poll, min(self.timing.renew_every, self._rows_at - clock.now()))

    def _heard(self, about: str) -> None:
        if about == self.name or about.startswith(f"{self.name}/"):
            self._dirty = True
            self._wake.set()

    def _begin(self, term: int) -> None:
        self._begun, self.leaving, self._marked = term, None, False
        self._wake.set()

    def _cancel(self, reason: Reason) -> None:
        """The hold ends. What runs is told at once: the loop may be waiting for the database."""
        if self.leaving is None:
            self.leaving = reason
        for r in self.running.values():
            self._stop(r, self.number, reason)
        self._wake.set()

    def _armed(self, until: float) -> None:
        for r in self.running.values():
            if r.share.on_arm is not None:
                r.share.on_arm(until)

    # The loop ------------------------------------------------------------------------------------------------------

    async def _turn_or_say(self) -> None:
        try:
            await self._turn()
        except StoreError as e:
            if not self._silent:
                log.info("the database does not answer: %s", safe(e))
            self._silent = self._dirty = True
        else:
            self._silent = False

    async def _turn(self) -> None:
        if self.leaving is not None and self._begun is not None:
            await self._leave()
            return
        slots, origin = await self.fleet.look(self.name, self.settings.deployment, self.timing.attempt)
        now = clock.now()
        if self._begun is not None and self.hold is None:
            self.hold = self._held()
        if self.hold is None:
            self._elsewhere = self._elsewhere or self._should_choose(self.living(slots, origin))
            if self._elsewhere:
                self.keeper.stop()
            return
        others = [slot for slot in slots if slot.number != self.number]
        self._seen = {f"{self.name}/{slot.number}" for slot in slots}
        for slot in others:
            await self._judge(slot.lease, f"{self.name}/{slot.number}", origin, now)
        is_open = frozenset(slot.number for slot in slots if self._takes_bots(slot, now))
        self._alone = is_open <= {self.number} and not any(s.lease.holder or s.lease.proof for s in others)
        if self.number not in is_open:
            await self.fleet.mark(self.hold, self.timing.attempt, is_open=True)
            self._soon, self._marked = not self._marked, True  # once: somebody may have deleted the row
            return
        if is_open != self._slots:
            if is_open - self._slots:
                self._calm_at = now + CALM
            self._slots, self._dirty = is_open, True
        if self._dirty or self._to_give or now >= self._rows_at or self._ended():
            await self._rows(origin)

    def _takes_bots(self, slot: Slot, now: float) -> bool:
        """Open; and while it changes hands its bots are nobody else's, unless nobody comes."""
        e = self._evidence.get(f"{self.name}/{slot.number}")
        vacant = not slot.held and slot.number != self.number
        return slot.is_open and not (vacant and e is not None and now >= e.since + self.timing.patience(slot.lease.ttl))

    def _held(self) -> Hold | None:
        from botlease.stores.postgresfleet import Hold

        t = self.keeper.state.term
        if t is None or t.number != self._begun or self.keeper.state.phase is not Phase.WORKING:
            return None
        return Hold(self.name, self.number, self.who, t.number, t.nonce, t.origin, self.timing.ttl)

    def _should_choose(self, slots: list[Slot]) -> bool:
        """Another one of our deployment was quicker in this slot; or it was deactivated, and the fleet is on again."""
        state = self.keeper.state
        if state.phase is not Phase.STANDBY or state.was_active or state.stopping:
            return False
        mine = next((s for s in slots if s.number == self.number), None)
        others = [s for s in slots if s.number != self.number]
        taken = (
            mine is not None and mine.held and not (self.newer and mine.generation < self.generation and mine.yields)
        )
        off = mine is not None and mine.assigned is None and any(s.assigned is not None and not s.ended for s in others)
        if not taken and not off:
            return False
        return placement.choose(others, self.generation, self.who, newer=self.newer) is not None

    async def _judge(self, lease: Lease, bot: str, origin: str, now: float) -> None:
        """Watch a hold that is not ours; bury it when the evidence is there and what it had in flight has landed."""
        e = self._evidence.get(bot, Evidence()).saw(lease, origin, now)
        known = e.proved == (lease.term, lease.nonce)
        if lease.holder and not known and proof.owners(lease.proof) and proof.gone(lease.proof, bot, lease.holder):
            e = replace(e, proved=(lease.term, lease.nonce))
        self._evidence[bot] = e
        if lease.holder is None and not lease.proof:
            return
        how = e.vacancy(lease, self.timing, now)
        if how is How.EXPIRED:
            over = now >= e.since + self.timing.patience(lease.ttl) + self.timing.lock_delay
        else:
            over = how is How.DIED and not e.unsettled(how, How.EXPIRED, self.timing, now)
        if over and how is not None and await self.fleet.bury(self.name, bot, lease, origin, how, self.timing.attempt):
            log.info("%s: term %d of %s is over: %s", bot, lease.term, safe(lease.holder), how)
            self._dirty = True
            self._wake.set()

    async def _rows(self, origin: str) -> None:
        hold, limit = self.hold, self.timing.attempt
        assert hold is not None
        # What no notification tells: a row that was deleted or taken out by hand, before anybody could wait it out.
        again = self.timing.renew_every if self.store.pooled else self.timing.ttl / 3
        self._dirty, self._rows_at = False, clock.now() + again
        await self._give_ended(hold)
        rows = await self.fleet.rows(hold, sorted(self._slots), limit)
        now = clock.now()
        for row in rows:
            if self._is_judged(row):
                await self._judge(row.lease, row.bot, origin, now)
            else:  # should it be, later, it is waited out from then on: what it says by itself means nothing now
                self._evidence.pop(row.bot, None)
        stopping = sum(r.to is not None for r in self.running.values())
        settled = [row for row in rows if row.bot in self.running or self._is_settled(row, now)]
        if len(settled) < len(rows):
            self._again_soon()
        p = placement.plan(
            self.number,
            sorted(self._slots),
            settled,
            {bot: r.term.number for bot, r in self.running.items()},
            room=ROOM - stopping,
            calm=now >= self._calm_at,
        )
        if now < self._calm_at:
            self._rows_at = min(self._rows_at, self._calm_at)
        for bot in p.lost:
            self._stop(self.running[bot], self.number, Reason.LOST)
        for bot, to in p.stop.items():
            self._stop(self.running[bot], to, Reason.SUPERSEDED)
        for moved in batches(p.move):
            if await self.fleet.move(self.name, moved, limit) < len(moved):
                self._again_soon()
        for given in batches(p.give):
            await self._give(hold, given, Reason.GIVEN_BACK)
        if p.clear and await self.fleet.clear(self.name, p.clear, limit) < len(p.clear):
            self._again_soon()
        for some in batches(p.take):
            if self.leaving is not None:
                break
            granted = await self.fleet.take(hold, some, limit)
            self._start_all(hold, granted)
            if len(granted) < len(some):
                self._again_soon()

    def _again_soon(self) -> None:
        """Not all rows were to be had: somebody is changing them. No notification says when he is through."""
        self._rows_at = min(self._rows_at, clock.now() + self.timing.renew_every / 4)

    def _is_judged(self, row: Row) -> bool:
        """Whether its own row tells if it may be running: a supervisor of its own has it, or the row of its slot was
        deleted. What a slot holds is silent, of whichever fleet it is."""
        if row.ours or self._slot_of(row) in self._seen:
            return False
        return bool(self._slot_of(row)) or not SLOT.fullmatch(row.lease.proof)

    def _slot_of(self, row: Row) -> str:
        return row.lease.proof if row.lease.proof.startswith(f"{self.name}/") else ""

    def _is_settled(self, row: Row, now: float) -> bool:
        """It may be taken, if the store agrees. Where the hold that it ran under has been followed by another one, not
        before what was in flight has landed."""
        slot = self._slot_of(row)
        if not slot:
            return not row.lease.proof
        e = self._evidence.get(slot)
        return row.ours or e is None or now >= e.term_since + self.timing.lock_delay * (1 + self.timing.rho)

    def _start_all(self, hold: Hold, granted: list[tuple[str, int]]) -> None:
        # An answer that comes after the end of trust counts for nothing (R1), nor one after the hold.
        good = self.leaving is None and self.hold is hold and clock.now() < self.work.until
        for bot, number in granted:
            if not good or bot in self.running:
                self._to_give.append((bot, number))
                continue
            share = Share(self.work)
            term = Term(number, bot, self.who, share, self.settings.database)
            self.running[bot] = _Running(term, share, asyncio.create_task(self._run(term), name=bot))
            self.running[bot].task.add_done_callback(lambda _: self._wake.set())

    async def _run(self, term: Term) -> None:
        pause = 1.0
        while True:
            began = clock.now()
            try:
                await self.function(term)
                return
            except KeyboardInterrupt:
                raise
            except BaseException as e:  # also SystemExit: it would end this process for one bot, and then the next one
                # A cancellation that is not ours (of something that it waited for) is a failure like every other.
                ours = asyncio.current_task().cancelling()  # type: ignore[union-attr]
                if isinstance(e, asyncio.CancelledError) and ours:
                    raise
                r = self.running.get(term.bot)
                if ours or r is None or r.to is not None:  # it failed while it was stopped: it is not wanted any more
                    log.error("%s: term %d: failed while stopping\n%s", term.bot, term.number, _traceback())
                    return
                pause = 1.0 if clock.now() - began > 60 else pause
                what = "failed; started again in"
                log.error("%s: term %d: %s %g s\n%s", term.bot, term.number, what, pause, _traceback())
            await asyncio.sleep(pause)
            pause = min(60.0, pause * 2)

    # Stopping --------------------------------------------------------------------------------------------------------

    def _stop(self, r: _Running, to: int, reason: Reason) -> None:
        if reason is Reason.LOST and r.reason is not Reason.LOST:
            r.reason, r.term._over = reason, True  # somebody else may have it
            asyncio.get_running_loop().call_later(LAST_WORDS, self._still_there, r)
        if r.to is not None:
            if reason in UNKNOWN and r.settling is not None and not r.settling.done():
                r.settling.cancel()  # no time to settle any more; it cancels the bot when it is done
            return
        r.to, r.reason = to, reason
        if r.share.settle is None or reason in UNKNOWN or r.task.done():
            self._cancel_one(r)
        else:
            until = min(self.work.until, clock.now() + self.timing.stop_grace)
            r.settling = asyncio.ensure_future(r.share.settle(until))
            r.settling.add_done_callback(lambda done: self._settled(r, done))

    def _still_there(self, r: _Running) -> None:
        """Another one may run it, and here it does not end: only the kernel can end it, and the process with it."""
        if not r.task.done() and self.leaving not in UNKNOWN:  # the fence of a lost hold is not moved any more
            log.error("%s: term %d is lost and it does not end: ending this process", r.term.bot, r.term.number)
            # Not by the fence, which the next renewal of the others would move.
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # as PID 1, which cannot kill itself

    def _settled(self, r: _Running, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and done.exception() is not None:
            log.error("%s: could not be settled: %s", r.term.bot, safe(done.exception()))
        self._cancel_one(r)

    def _cancel_one(self, r: _Running) -> None:
        if r.task.done():
            self._wake.set()
        else:
            r.task.cancel()

    def _ended(self) -> list[str]:
        return [bot for bot, r in self.running.items() if r.to is not None and r.task.done()]

    async def _give_ended(self, hold: Hold) -> None:
        """What has stopped is given on, in as few statements as can be."""
        by_reason: dict[Reason, list[tuple[str, int, int]]] = defaultdict(list)
        for bot in self._ended():
            r = self.running.pop(bot)
            r.term._over = True
            if r.reason is not Reason.LOST:
                by_reason[r.reason].append((bot, r.term.number, r.to or self.number))
        by_reason[Reason.GIVEN_BACK] += [(bot, term, self.number) for bot, term in self._to_give]
        self._to_give.clear()
        for reason, bots in by_reason.items():
            for some in batches(bots):
                await self._give(hold, some, reason)

    async def _give(self, hold: Hold, bots: list[tuple[str, int, int]], reason: Reason) -> None:
        locked = await self.fleet.give(hold, bots, reason, self.timing.attempt)
        self._to_give += [(bot, term) for bot, term, _ in bots if bot in locked]

    async def _leave(self) -> None:
        """The hold ends: stop everything, hand the bots on, and say that the work has ended."""
        hold, reason = self.hold, self.leaving or Reason.STOPPED
        others: list[int] = []
        known = hold is not None and reason not in UNKNOWN
        try:
            if hold is not None and known:
                slots, _ = await self.fleet.look(self.name, self.settings.deployment, self.timing.attempt)
                if not any(s.heirs for s in slots if s.number == self.number):
                    now = clock.now()
                    others = sorted(s.number for s in slots if s.number != self.number and self._takes_bots(s, now))
                    await self.fleet.mark(hold, self.timing.attempt, is_open=False)
        except StoreError:
            known = False
        for bot, r in self.running.items():
            self._stop(r, self.number, reason)
            if others:
                r.to = placement.place(bot, others)
        look_at = clock.now() + self.timing.ttl / 3
        while self.running:
            tasks = {r.task for r in self.running.values() if not r.task.done()}
            if tasks:
                await asyncio.wait(tasks, timeout=0.05)
            if hold is not None and known and clock.now() >= look_at:
                look_at = clock.now() + self.timing.ttl / 3
                await self._stop_the_lost(hold)
            # The kernel's fence leaves no time for a statement just before the end of trust.
            if hold is not None and known and clock.now() < self.work.until - 2 * self.timing.attempt:
                try:
                    await self._give_ended(hold)
                except StoreError:
                    known = False
            else:
                for bot in self._ended():
                    self.running.pop(bot).term._over = True
        if hold is not None and known and self._to_give:
            with contextlib.suppress(StoreError):
                await self._give_ended(hold)  # once more what was locked; the rest goes with the hold
        self.hold, self._begun, self._to_give, self._slots = None, None, [], frozenset()
        self._evidence.clear()
        self.work.ended()

    async def _stop_the_lost(self, hold: Hold) -> None:
        """The slot is renewed until its last bot has ended. Whoever deletes the row of a bot, and adds it again, must
        not have it waited out elsewhere while it runs here."""
        with contextlib.suppress(StoreError):
            for row in await self.fleet.rows(hold, sorted(self._slots), self.timing.attempt):
                r = self.running.get(row.bot)
                if r is not None and (not row.ours or row.term != r.term.number):
                    self._stop(r, self.number, Reason.LOST)

    async def _end_all(self) -> None:
        for r in self.running.values():
            r.task.cancel()
        await outlast(*(r.task for r in self.running.values()))
        for r in self.running.values():
            r.term._over = True
        self.running.clear()
