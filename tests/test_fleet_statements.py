"""The statements of a fleet under everything that can happen to them: late, lost, repeated, several at once.

Members here are no processes: what each believes to run is written down, and no bot may be believed by two.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest

from botlease.model import LEAVING, Held, How, Probation, Reason
from botlease.stores import Registration, StoreError, postgresfleet
from botlease.stores.postgres import PostgresStore
from botlease.stores.postgresfleet import Hold, PostgresFleet, Row, Slot, slot_name

LIMIT = 20.0
SLOTS = (1, 2, 3)
BOTS = [f"b{n}" for n in range(6)]


class Violation(Exception):
    pass


@dataclass
class Member:
    """What a process knows. ``trusted``: its fence has not fired."""

    name: str
    store: PostgresStore
    hold: Hold | None = None
    beat: int = 0
    trusted: bool = False
    runs: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    late: list[Any] = field(default_factory=list)
    """Statements that are still on their way."""

    @property
    def fleet(self) -> PostgresFleet:
        return PostgresFleet(self.store)


class World:
    def __init__(self, seed: int, members: list[Member], trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.members = members
        self.count = 0
        self.prefix = f"s{seed}-"
        self.name = f"{self.prefix}fleet"
        self.terms: dict[str, int] = {}
        self.steps: list[str] = []
        self.taken = 0
        self.edited: set[str] = set()
        """Slots whose rows somebody has changed by hand."""

    def bot(self, name: str) -> str:
        return self.prefix + name

    # Steps of a member ---------------------------------------------------------------------------------------------

    async def join(self, m: Member) -> None:
        """Acquire the lease of a slot, as the core does: released, or held by one whose trust is over."""
        if m.trusted:
            return
        self.count += 1
        number = self.rng.choice(SLOTS)
        bot, me, nonce = slot_name(self.name, number), f"{self.prefix}i{self.count}", f"n{self.count}"
        view = await m.store.register(Registration(me, bot, "d", "h", 1, "1", 10.0), LIMIT)
        lease = view.lease
        if lease is None:  # somebody has just deleted it
            return
        holder = self.by_nonce(lease.nonce)
        if (lease.holder is not None or lease.proof) and holder is not None and holder.trusted:
            return
        if any(o.trusted and o.hold is not None and o.hold.number == number for o in self.members):
            return  # somebody has deleted the row: it was put back, and is waited out
        await m.store.promote(me, LIMIT)
        how = How.EXPIRED if lease.holder else How.RELEASED
        grant = await m.store.acquire(
            *(bot, me, lease.key),
            nonce=nonce,
            floor=0,
            origin=view.origin,
            how=how,
            ttl=10.0,
            proof="p",
            probation=Probation.NONE,
            deadline=LIMIT,
        )
        if grant is None:
            return
        m.hold, m.beat, m.trusted, m.runs = (
            Hold(self.name, number, me, grant.term, nonce, grant.origin, 10.0),
            0,
            True,
            {},
        )
        await m.fleet.mark(m.hold, LIMIT, is_open=True)

    def by_nonce(self, nonce: str) -> Member | None:
        return next((m for m in self.members if m.hold is not None and m.hold.nonce == nonce), None)

    async def renew(self, m: Member) -> None:
        if m.hold is None or not m.trusted:
            return
        beat, m.beat = m.beat, m.beat + 1
        held = Held(m.hold.term, m.hold.nonce, (beat,))
        if await m.store.renew(m.hold.name, m.hold.instance_id, held, m.beat, LIMIT) is None:
            if m.hold.name not in self.edited:
                raise Violation(f"{m.name} lost its slot while it trusted it")
            await self.fence(m)

    async def fence(self, m: Member) -> None:
        """The kernel ends it, with all that it runs. What it has sent may still arrive."""
        m.trusted, m.runs = False, {}

    async def read(self, m: Member) -> None:
        if m.hold is not None:
            m.rows = await m.fleet.rows(m.hold, self.rng.sample(SLOTS, self.rng.randrange(4)), LIMIT)

    async def take(self, m: Member) -> None:
        if self.rng.random() < 0.6:
            await self.read(m)
        hold = m.hold
        if hold is None or not m.rows:
            return
        some = [row for row in m.rows if self.rng.random() < 0.7 and row.bot not in m.runs]

        async def ask(answered: bool = True) -> None:
            granted = await m.fleet.take(hold, [(r.bot, r.term, r.slot) for r in some], LIMIT)
            for bot, term in granted:
                if term <= self.terms.get(bot, 0):
                    raise Violation(f"term {term} of {bot} after {self.terms[bot]}")
                self.terms[bot] = term
                self.taken += 1
                if answered and m.hold is hold and m.trusted:
                    m.runs[bot] = term

        if some and self.rng.random() < 0.2:
            m.late.append(lambda: ask(answered=False))
        elif some:
            await ask(answered=self.rng.random() < 0.9)

    async def give(self, m: Member) -> None:
        hold = m.hold
        if hold is None or not m.runs or not m.trusted:
            return
        some = [bot for bot in m.runs if self.rng.random() < 0.5]
        ended = [(bot, m.runs.pop(bot), self.rng.choice(SLOTS)) for bot in some]

        async def ask() -> None:
            await m.fleet.give(hold, ended, Reason.SUPERSEDED, LIMIT)

        if some and self.rng.random() < 0.2:
            m.late.append(ask)
        elif some:
            await ask()

    async def move(self, m: Member) -> None:
        some = [(self.bot(b), self.rng.choice((0, *SLOTS)), self.rng.choice(SLOTS)) for b in BOTS]
        await m.fleet.move(self.name, some, LIMIT)

    async def arrive(self, m: Member) -> None:
        if m.late:
            await m.late.pop(self.rng.randrange(len(m.late)))()

    async def bury(self, m: Member) -> None:
        """Some slot: the evidence is old, or the holder is trusted no more."""
        slots, origin = await m.fleet.look(self.name, "d", LIMIT)
        if slots and (slot := self.rng.choice(slots)).held:
            await self._bury(m, slot, origin)

    async def _bury(self, m: Member, slot: Slot, origin: str) -> None:
        holder = self.by_nonce(slot.lease.nonce)
        if holder is not None and holder.trusted and holder.hold is not None:
            # It renews before the burial arrives: trust never outlasts a row that is seen unchanged for so long.
            await self.renew(holder)
        await m.fleet.bury(self.name, slot_name(self.name, slot.number), slot.lease, origin, How.EXPIRED, LIMIT)

    async def leave(self, m: Member) -> None:
        if m.hold is None or not m.trusted or m.runs:
            return
        hold, m.hold, m.trusted = m.hold, None, False
        held = Held(hold.term, hold.nonce, (m.beat,))
        await m.store.release(
            *(hold.name, hold.instance_id, held), reason=Reason.STOPPED, pass_on=False, leave=True, deadline=LIMIT
        )

    async def edit(self, m: Member) -> None:
        """Whoever looks after the list, and the operator."""
        bot = self.bot(self.rng.choice(BOTS))
        slot = slot_name(self.name, self.rng.choice(SLOTS))
        match self.rng.randrange(12):
            case 8:
                await self.by_hand(m, "UPDATE bot_leases SET holder = NULL WHERE bot = $1", slot)
            case 9:
                await self.by_hand(m, "DELETE FROM bot_leases WHERE bot = $1", slot)
            case 10:
                await self.by_hand(m, "UPDATE bot_leases SET holder = NULL WHERE bot = $1 AND fleet IS NOT NULL", bot)
            case 11:
                await self.by_hand(m, "UPDATE bot_leases SET slot = NULL WHERE bot = $1 AND fleet IS NOT NULL", bot)
            case 0:
                await m.fleet.remove(self.name, [bot], LIMIT)
            case 1:
                await m.store.pause(bot, True, LIMIT)
            case 2 | 3 | 4:
                await m.store.pause(None, False, LIMIT)
            case _:
                await m.fleet.add(self.name, [self.bot(b) for b in BOTS], 10.0, LIMIT)

    async def by_hand(self, m: Member, sql: str, bot: str) -> None:
        self.edited.add(bot)
        await m.store.call(LIMIT, lambda c: c.execute(sql, bot))

    async def step(self) -> None:
        often = [self.join, self.join, self.take, self.take, self.take, self.give, self.give, self.move, self.arrive]
        seldom = [self.renew, self.read, self.bury, self.leave, self.edit, self.fence]
        actions = often * 2 + seldom
        chosen = self.rng.sample(self.members, self.rng.choice((1, 1, 2, 3)))
        what = [(self.rng.choice(actions), m) for m in chosen]
        self.steps.append(", ".join(f"{a.__name__} {m.name}" for a, m in what))
        await asyncio.gather(*(a(m) for a, m in what))
        for bot in BOTS:
            who = [m.name for m in self.members if m.trusted and self.bot(bot) in m.runs]
            if len(who) > 1:
                raise Violation(f"{bot} runs in {who}")


@pytest.fixture
async def members(postgres_url: str) -> Any:
    stores = [PostgresStore(postgres_url) for _ in range(4)]
    for store in stores:
        store.listens = False
        await store.open(LIMIT)
    yield [Member(f"m{n}", store) for n, store in enumerate(stores)]
    for store in stores:
        await store.aclose()


async def live(seed: int, members: list[Member], steps: int) -> World:
    world = World(seed, [replace(m, hold=None, trusted=False, runs={}, rows=[], late=[]) for m in members])
    await world.members[0].fleet.add(world.name, [world.bot(b) for b in BOTS], 10.0, LIMIT)
    for _ in range(steps):
        try:
            await world.step()
        except StoreError as e:
            if "deadlock" not in str(e):  # two that wait for each other: one is told so, and nothing of it was done
                raise
        except Violation as e:
            raise Violation(f"seed {seed}: {e}\n" + "\n".join(world.steps)) from None
    return world


@pytest.mark.timeout(200)
async def test_whatever_is_late_lost_or_at_once_no_bot_is_believed_by_two(members: list[Member]) -> None:
    taken = 0
    for seed in range(25):
        taken += (await live(seed, members, 120)).taken
    assert taken > 300


@contextmanager
def planted(statement: str, old: str, new: str) -> Iterator[None]:
    text = getattr(postgresfleet, statement)
    assert text.count(old) in (1, 2), (statement, old)  # when a row is locked, and when it is written
    with patch.object(postgresfleet, statement, text.replace(old, new)):
        yield


BUGS = {
    "a hold that is not over counts as over": (
        "TAKE",
        "AND EXISTS (\n      SELECT 1 FROM bot_leases s",
        "AND TRUE OR EXISTS (\n      SELECT 1 FROM bot_leases s",
    ),
    "a burial of a row that has changed": (
        "BURY",
        "AND term = $2 AND beat = $3 AND nonce = $4",
        "AND $2::bigint + $3::bigint >= 0 AND $4::text <> ''",
    ),
    "a give that is not scoped to its term": (
        "GIVE",
        "CASE WHEN l.term = w.term AND l.nonce = $3 AND l.proof = $1 || '/' || $4::int",
        "CASE WHEN w.term > 0 AND $3::text <> $1 || '/' || $4::int",
    ),
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("bug", BUGS)
async def test_without_one_of_the_guards_it_is_found(members: list[Member], bug: str) -> None:
    with planted(*BUGS[bug]), pytest.raises(Violation) as found:
        for seed in range(100):
            await live(seed, members, 120)
    print(found.value)


async def test_another_fleet_does_not_get_what_is_still_to_be_stopped(members: list[Member]) -> None:
    world = World(1, members)
    a, *_ = members
    bot = world.bot("b0")
    await a.fleet.add(world.name, [bot], 10.0, LIMIT)
    while not a.trusted:
        await world.join(a)
    while bot not in a.runs:
        await world.take(a)
    assert await a.fleet.remove(world.name, [bot], LIMIT) == [bot]
    assert await a.fleet.add("other", [bot], 10.0, LIMIT) == []  # it runs
    await world.read(a)
    (row,) = a.rows
    assert row.ours and row.slot == LEAVING and a.hold is not None
    await a.fleet.give(a.hold, [(bot, a.runs[bot], 1)], Reason.SUPERSEDED, LIMIT)
    assert await a.fleet.add("other", [bot], 10.0, LIMIT) == [bot]


async def test_whoever_is_no_member_does_not_become_the_holder_of_a_bot_in_a_fleet(members: list[Member]) -> None:
    """A supervisor of a version that knows no fleets, or somebody with psql."""
    store = members[0].store
    await PostgresFleet(store).add("guarded", ["guarded-x"], 10.0, LIMIT)
    take = "UPDATE bot_leases SET holder = 'stranger', proof = 'p', term = term + 1 WHERE bot = 'guarded-x'"
    with pytest.raises(StoreError, match="which alone may run it"):
        await store.call(LIMIT, lambda c: c.execute(take))
    view = await store.read("guarded-x", "nobody", LIMIT)
    assert view.lease is not None and (view.lease.holder, view.lease.term) == (None, 0)


@pytest.mark.parametrize("asked", ["take", "clear"])
async def test_who_asks_for_what_still_runs_elsewhere_keeps_nobody_from_giving_it(
    members: list[Member], asked: str
) -> None:
    world = World(3, members)
    a, b, *_ = members
    bot = world.bot("b0")
    await a.fleet.add(world.name, [bot], 10.0, LIMIT)
    for m in (a, b):
        while not m.trusted:
            await world.join(m)
    while bot not in a.runs:
        await world.take(a)
    assert a.hold is not None and b.hold is not None
    if asked == "clear":
        await a.fleet.remove(world.name, [bot], LIMIT)
    await b.store.call(LIMIT, lambda c: c.execute("BEGIN"))
    if asked == "take":
        (row,) = await b.fleet.rows(b.hold, [b.hold.number], LIMIT)
        assert await b.fleet.take(b.hold, [(bot, row.term, row.slot)], LIMIT) == []
    else:
        assert await b.fleet.clear(world.name, [bot], LIMIT) == 0
    assert await a.fleet.give(a.hold, [(bot, a.runs[bot], b.hold.number)], Reason.SUPERSEDED, LIMIT) == set()
    await b.store.call(LIMIT, lambda c: c.execute("ROLLBACK"))


async def test_what_somebody_has_in_a_transaction_is_said_to_be_held_on(members: list[Member]) -> None:
    world = World(4, members)
    a, b, *_ = members
    bots = [world.bot("b0"), world.bot("b1")]
    await a.fleet.add(world.name, bots, 10.0, LIMIT)
    while not a.trusted:
        await world.join(a)
    while len(a.runs) < 2:
        await world.take(a)
    assert a.hold is not None
    lock = "BEGIN; SELECT 1 FROM bot_leases WHERE bot = '{}' FOR UPDATE"
    await b.store.call(LIMIT, lambda c: c.execute(lock.format(bots[0])))
    ended = [(bot, a.runs[bot], a.hold.number) for bot in bots]
    assert await a.fleet.give(a.hold, ended, Reason.SUPERSEDED, LIMIT) == {bots[0]}
    await b.store.call(LIMIT, lambda c: c.execute("ROLLBACK"))
    assert await a.fleet.give(a.hold, ended, Reason.SUPERSEDED, LIMIT) == set()
    await world.read(a)
    assert not any(row.ours for row in a.rows)


async def test_a_clear_does_not_take_out_what_was_added_again(members: list[Member]) -> None:
    world = World(2, members)
    a, *_ = members
    bot = world.bot("b0")
    await a.fleet.add(world.name, [bot], 10.0, LIMIT)
    await a.fleet.clear(world.name, [bot], LIMIT)
    assert [row["bot"] for row in await a.fleet.bots(world.name, LIMIT)] == [bot]


async def test_a_take_of_rows_as_they_were_seen_before_somebody_else_had_them_is_refused(members: list[Member]) -> None:
    """Two that saw the same row, in every order."""
    world = World(0, members)
    a, b, *_ = members
    await a.fleet.add(world.name, [world.bot("b0")], 10.0, LIMIT)
    for m in (a, b):
        while not m.trusted:
            await world.join(m)
    assert a.hold is not None and b.hold is not None
    seen = {m.name: await m.fleet.rows(m.hold, SLOTS, LIMIT) for m in (a, b) if m.hold}
    one, two = ([(r.bot, r.term, r.slot) for r in seen[m.name]] for m in (a, b))
    assert len(await a.fleet.take(a.hold, one, LIMIT)) == 1
    assert await b.fleet.take(b.hold, two, LIMIT) == []
    ((bot, term, _),) = one
    await a.fleet.give(a.hold, [(bot, term + 1, b.hold.number)], Reason.SUPERSEDED, LIMIT)
    assert await a.fleet.take(a.hold, one, LIMIT) == []  # late: its term has risen
    await world.read(b)
    (row,) = b.rows
    assert row.slot == b.hold.number != LEAVING
    assert await b.fleet.take(b.hold, [(bot, row.term, row.slot)], LIMIT) == [(bot, term + 2)]


@pytest.mark.parametrize("left", ["nothing", "a deployment", "a term"])
async def test_a_bot_that_is_added_without_its_lease_is_free_only_if_nobody_knew_it(
    members: list[Member], left: str
) -> None:
    """An operator deletes a lease, and a journal too: who was at work by it works on until it looks."""
    a, *_ = members
    bot = f"added-knowing-{left.split()[-1]}"
    rows = {
        "nothing": [],
        "a deployment": [
            "INSERT INTO bot_deployments (bot, deployment, first_seen) VALUES ($1, 'd', clock_timestamp())",
            "INSERT INTO bot_deployments (bot, deployment, first_seen) VALUES ($1, 'e', clock_timestamp())",
        ],
        "a term": [
            "INSERT INTO bot_terms (bot, term, instance_id, ttl, acquired_at, how)"
            " VALUES ($1, 7, 'i', 10, clock_timestamp(), 'released')"
        ],
    }[left]
    for sql in rows:
        await a.store.call(LIMIT, lambda c, sql=sql: c.execute(sql, bot))
    assert await a.fleet.add(bot, [bot], 10.0, LIMIT) == [bot]
    lease = "SELECT term, holder, proof FROM bot_leases WHERE bot = $1"
    (row,) = await a.store.call(LIMIT, lambda c: c.fetch(lease, bot))
    free = left == "nothing"
    assert tuple(row) == (7 if left == "a term" else 0, None if free else "unknown", "" if free else "-")
