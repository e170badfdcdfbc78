"""Many bots in one program, over several processes."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any

from botlease import clock, placement
from botlease.evidence import Evidence
from botlease.inside import LeaseLost, Session, Term, stop_signals
from botlease.keeper import log
from botlease.member import Function, Member, batches
from botlease.model import How, Mode, Reason
from botlease.settings import ConfigurationError
from botlease.stores import StoreError
from botlease.text import safe
from botlease.value import replace
from botlease.work import proof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from botlease.stores.postgresfleet import Slot


class Fleet:
    """Runs each bot of a fleet in at most one of its processes.

    .. code-block:: python

        async def run(term: botlease.Term) -> None:
            await my_bot(term.bot, fence=term.number)

        async with botlease.Fleet("hosting", run) as fleet:
            await fleet.add("alice", "bob")     # from any process, once: the list is in the database
            await fleet.run()                   # until a stop signal

    A bot's function is cancelled when the bot moves to another process or the hold of this one ends; it may finish what
    it has in hand, for at most ``stop_grace``. If it raises, it is started again, after 1 s, then 2 s, up to a minute.
    What it starts besides (threads, child processes) must end with it. If it never ends, the kernel ends the process.

    A new deployment takes over process by process. ``botlease status``, ``pause --name BOT``, ``history`` and
    ``verify`` know the bots; ``deactivate`` and ``promote`` are for the members, which are called ``name/1``,
    ``name/2`` and so on. A bot that ``botlease run`` has can be added: its supervisor stops it, and the fleet takes it.

    Args:
        name: the fleet. function: called with the :class:`Term` of each bot that this process is to run.
        Options as those of :class:`botlease.active`; the database must be a PostgreSQL.

    Raises:
        ConfigurationError: settings that cannot work, or no PostgreSQL. StoreError: the database cannot be used.
    """

    def __init__(self, name: str, function: Function | None = None, **options: Any) -> None:
        self._session = Session(name, options)
        self._function = function
        if self._session.settings.database.split("://")[0] not in ("postgres", "postgresql"):
            raise ConfigurationError("a fleet needs PostgreSQL: set BOTLEASE_DATABASE_URL=postgresql://user@host/name")
        from botlease.stores.postgres import PostgresStore
        from botlease.stores.postgresfleet import PostgresFleet

        assert isinstance(self._session.store, PostgresStore)
        self._store = self._session.store
        self._fleet = PostgresFleet(self._store)
        self._open = False
        self._stopping = asyncio.Event()
        self._member: Member | None = None
        self._evidence: dict[int, Evidence] = {}

    @property
    def name(self) -> str:
        return self._session.settings.bot

    @property
    def running(self) -> dict[str, Term]:
        """The bots that run in this process."""
        return {} if self._member is None else {bot: r.term for bot, r in self._member.running.items()}

    async def __aenter__(self) -> Fleet:
        if not self._open:
            await self._store.open(max(5.0, self._deadline))
            self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._open = False
        await self._store.aclose()

    @property
    def _deadline(self) -> float:
        return self._session.settings.timing.attempt

    async def add(self, *bots: str) -> list[str]:
        """Put bots into the fleet. Returns those that were not there. One that is in another fleet is refused."""
        from botlease import settings

        for bot in bots:
            settings.bot_name(bot, {})
        ttl = self._session.settings.timing.ttl
        added: list[str] = []
        for some in batches(sorted(set(bots))):
            added += await self._fleet.add(self.name, some, ttl, self._deadline)
        missing = {*bots} - {row["bot"] for row in await self._fleet.bots(self.name, self._deadline)}
        if missing:
            raise ConfigurationError(f"{', '.join(sorted(missing)[:3])}: in another fleet; remove them there first")
        return added

    async def remove(self, *bots: str) -> list[str]:
        """Take bots out of the fleet: each is stopped, and then free. Returns those that were there."""
        left, gone = {*bots}, set[str]()
        for _ in range(5):  # one that changes hands in this moment is found at the next look
            for some in batches(sorted(left)):
                gone |= {*await self._fleet.remove(self.name, some, self._deadline)}
            left = left - gone & {row["bot"] for row in await self._fleet.bots(self.name, self._deadline)}
            if not left:
                break
        return sorted(gone)

    async def bots(self) -> dict[str, str | None]:
        """All bots of the fleet, and the instance that each has (None: it waits for one)."""
        return {row["bot"]: row["holder"] for row in await self._fleet.bots(self.name, self._deadline)}

    def stop(self) -> None:
        """End :meth:`run`: every bot stops and goes to another member."""
        self._stopping.set()
        if self._member is not None:
            self._member.stop()

    async def run(self) -> None:
        """Be a member, until a stop signal comes or a newer deployment has taken over for good.

        Raises :class:`LeaseLost` if a copy of this process (a machine restored from a snapshot) renews under its name.
        """
        if self._function is None:
            raise TypeError("Fleet.run needs the function that runs a bot: Fleet(name, function)")
        s = self._session.settings
        async with contextlib.AsyncExitStack() as stack:
            if not self._open:
                await stack.enter_async_context(self)
            with stop_signals(self.stop), self._session.announced():
                generation = await self._fleet.enlist(self.name, s.deployment, self._deadline)
                attempt = 0
                while not self._stopping.is_set():
                    number = await self._choose(generation)
                    if self._stopping.is_set():
                        break
                    if number is None:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._stopping.wait(), s.timing.renew_every)
                        continue
                    attempt += 1
                    who = s.instance_id if attempt == 1 else f"{s.instance_id}.{attempt}"
                    self._member = Member(self._session, self._fleet, self._function, number, generation, who)
                    self._member.living = self._without_the_dead
                    try:
                        why = await self._member.run()
                    finally:
                        self._member = None
                    if why is Reason.COPIED:
                        raise LeaseLost(f"a copy of this process holds a slot of {self.name}: start it again")
                    if why is not None:
                        return

    async def _choose(self, generation: int) -> int | None:
        try:
            slots, origin = await self._fleet.look(self.name, self._session.settings.deployment, self._deadline)
        except StoreError as e:
            log.info("the database does not answer: %s", safe(e))
            return None
        who, newer = self._session.settings.instance_id, self._session.mode is Mode.PREEMPT
        return placement.choose(self._without_the_dead(slots, origin), generation, who, newer=newer)

    def _without_the_dead(self, slots: list[Slot], origin: str) -> list[Slot]:
        """What died is free for us: our core proves it, or waits for it, by itself. With all members dead there is
        nobody else to find out."""
        now = clock.now()
        dead = {slot.number for slot in slots if self._is_dead(slot, origin, now)}
        return [replace(s, lease=replace(s.lease, holder=None), ended=True) if s.number in dead else s for s in slots]

    def _is_dead(self, slot: Slot, origin: str, now: float) -> bool:
        e = self._evidence.get(slot.number, Evidence()).saw(slot.lease, origin, now)
        self._evidence[slot.number] = e
        owners = proof.owners(slot.lease.proof) if slot.held else []
        proved = bool(owners) and not any(proof.alive(o) for o in owners)
        return proved or e.vacancy(slot.lease, self._session.settings.timing, now) is How.EXPIRED
