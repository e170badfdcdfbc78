"""Fleets on PostgreSQL: many bots under a few leases, in statements over many rows.

A *slot* of a fleet has an ordinary lease, whose bot is called ``fleet/number``; the member that holds it renews that
one row, whatever runs under it. In the row of a bot of the fleet ``slot`` says who should run it (the assignment), and
``holder``, ``nonce`` and ``proof`` say under which hold of which slot it may still be running (the occupancy):
``proof`` is the slot's name, ``nonce`` that of the hold.

What is safe about it stands in TAKE alone: a bot is taken only under a hold of ours, with a compare-and-set on its
term, and only if it was given back after it had ended or if the hold it ran under is over. A hold is over when the
slot's row shows another one, and that row is only changed with the evidence of R3 (:mod:`botlease.evidence`): by an
acquire, by its holder's release, or by BURY. Nonces are never used twice: what is over stays over.

Rows are found by the bot, and by nothing else: CASE and OFFSET 0 hide the other conditions from the planner, which on a
table without statistics takes them for so selective that it compares everything with everything (measured: 9.5 s for
500 bots, then 0.04 s).

A row that somebody else has in a transaction is left for the next time: whoever looks at one bot in psql, with BEGIN,
and goes to lunch, must not keep those waiting that happen to be in the same statement.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from botlease.model import LEAVING, TERM_GAP, UNPLACED, How, Lease, Reason
from botlease.stores.postgressql import DURABLE
from botlease.value import value

if TYPE_CHECKING:
    import asyncpg

    from botlease.stores.postgres import PostgresStore

ENLIST: Final = f"""
INSERT INTO bot_deployments (bot, deployment, first_seen) VALUES ($1, $2, clock_timestamp())
ON CONFLICT (bot, deployment) DO UPDATE SET first_seen = bot_deployments.first_seen RETURNING generation, {DURABLE}
"""

LOOK: Final = """
SELECT l.bot, l.term, l.beat, l.nonce, l.holder, l.ttl, l.origin, l.proof, l.served, l.slot, {timeline} AS timeline,
  (SELECT d.generation FROM bot_deployments d WHERE d.bot = $1 AND d.deployment = h.deployment) AS generation,
  coalesce((SELECT m.generation > h.generation OR m.first_seen > t.first_seen FROM bot_deployments m
              LEFT JOIN bot_deployments t ON t.bot = m.bot AND t.deployment = h.deployment
            WHERE m.bot = l.bot AND m.deployment = $2), TRUE) AS yields,
  a.instance_id AS assigned,
  a.ended_at IS NOT NULL OR a.last_heartbeat < clock_timestamp() - make_interval(secs => 3 * l.ttl) AS ended,
  EXISTS (SELECT 1 FROM bot_instances o WHERE o.bot = l.bot AND o.ended_at IS NULL
          AND o.instance_id IS DISTINCT FROM l.holder
          AND extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8 < 3 * l.ttl) AS heirs
FROM bot_leases l LEFT JOIN bot_instances h ON h.instance_id = l.holder
  LEFT JOIN bot_instances a ON a.bot = l.bot AND a.is_active
WHERE l.fleet IS NULL AND l.slot IS NOT NULL AND starts_with(l.bot, $1 || '/')
"""

# Open: it takes bots. Closed: it takes none, and its bots are for the others. Who is alone rarely looks, and is told.
MARK: Final = (
    "UPDATE bot_leases SET slot = $4 WHERE bot = $1 AND holder = $2 AND nonce = $3 AND slot IS DISTINCT FROM $4 "
    f"RETURNING {DURABLE}, pg_notify('botlease', bot)"
)

ROWS: Final = """
SELECT bot, term, beat, nonce, holder, ttl, origin, proof, served, coalesce(slot, {unplaced}) AS slot, paused
FROM bot_leases
WHERE fleet = $1 AND (slot = $2 OR slot IS NULL OR slot <> ALL($3::int[]) OR holder = $4 AND nonce = $5)
"""

OVER: Final = """(l.holder IS NULL AND l.proof = '' OR starts_with(l.proof, $1 || '/') AND EXISTS (
      SELECT 1 FROM bot_leases s WHERE s.bot = l.proof
        AND (s.holder IS NULL AND s.proof = '' OR s.nonce <> l.nonce AND s.holder IS DISTINCT FROM 'unknown')))"""
"""The work under the row of a bot has ended: it was given back, or its slot was released or has another hold. A slot
that somebody emptied or deleted by hand says nothing, and a holder that is no member (a supervisor of its own) is not
judged here: those rows are waited out, and buried."""

MAY_TAKE: Final = (
    """CASE WHEN l.term = {seen}.term AND coalesce(l.slot, {{unplaced}}) = {seen}.slot AND l.fleet = $1 AND NOT l.paused
      THEN l.holder = $2 AND l.nonce = $5 OR """
    + OVER
    + " END"
)
# Only what may be taken is locked: its holder must find free what it is just about to give.
TAKE: Final = (
    """
WITH hold AS MATERIALIZED (
  SELECT 1 FROM bot_leases WHERE bot = $3 AND term = $4 AND nonce = $5 AND holder = $2 AND $6 || {timeline} = $7
), old AS MATERIALIZED (
  SELECT l.bot, l.term, w.slot, l.renewed_at, l.ttl, s.reason, s.last_beat
  FROM unnest($9::text[], $10::bigint[], $11::int[]) w(bot, term, slot)
    CROSS JOIN LATERAL (
      SELECT * FROM bot_leases l WHERE l.bot = w.bot AND """
    + MAY_TAKE.format(seen="w")
    + """ OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED) l
    LEFT JOIN LATERAL (SELECT t.reason, t.last_beat FROM bot_terms t
                       WHERE t.bot = l.proof AND t.instance_id = l.holder ORDER BY t.term DESC LIMIT 1) s ON TRUE
  WHERE w.slot <> {leaving}
), got AS (
  UPDATE bot_leases l SET
    term = 1 + greatest(l.term, (SELECT coalesce(max(t.term), 0) FROM bot_terms t WHERE t.bot = l.bot),
                        CASE WHEN l.origin <> $7 THEN greatest(l.term + {gap}, {era}) ELSE 0 END),
    beat = 0, nonce = $5, holder = $2, ttl = $8, origin = $7, proof = $3, slot = $12, renewed_at = clock_timestamp()
  FROM old
  WHERE l.bot = old.bot AND EXISTS (SELECT 1 FROM hold) AND """
    + MAY_TAKE.format(seen="old")
    + """
  RETURNING l.bot, l.term, l.renewed_at AS at, old.renewed_at AS last_beat, old.ttl, old.reason,
    old.last_beat AS silent,
    CASE WHEN old.reason IN ('expired', 'died') THEN old.reason ELSE 'released' END AS how
), closed AS (
  UPDATE bot_terms t SET released_at = got.at, reason = coalesce(got.reason, 'lease_lost'),
    last_beat = coalesce(got.silent, got.last_beat), ttl = coalesce(t.ttl, got.ttl)
  FROM got WHERE t.bot = got.bot AND t.released_at IS NULL
), opened AS (
  INSERT INTO bot_terms (bot, term, instance_id, deployment, host, how, acquired_at, probation, ttl)
  SELECT got.bot, got.term, $2, i.deployment, i.host, got.how, got.at, '', $8
  FROM got, bot_instances i WHERE i.instance_id = $2
) SELECT bot, term, """
    + DURABLE
    + " FROM got"
)

# Of the wanted rows those that nobody has in a transaction.
FREE: Final = """free AS MATERIALIZED (
  SELECT w.* FROM {wanted}
    CROSS JOIN LATERAL (SELECT 1 FROM bot_leases x WHERE x.bot = w.bot OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED) l
)"""

# Only what was not taken since. An assignment that somebody has changed meanwhile stays as he wants it.
GIVE: Final = f"""
WITH {FREE.format(wanted="unnest($5::text[], $6::bigint[], $7::int[]) w(bot, term, target)")}, gone AS (
  UPDATE bot_leases l SET holder = NULL, proof = '', beat = beat + 1, renewed_at = clock_timestamp(),
    fleet = CASE WHEN l.slot = {{leaving}} THEN NULL ELSE l.fleet END,
    slot = CASE WHEN l.slot = {{leaving}} THEN NULL WHEN l.slot = $4 THEN w.target ELSE l.slot END
  FROM free w
  WHERE l.bot = w.bot AND CASE WHEN l.term = w.term AND l.nonce = $3 AND l.proof = $1 || '/' || $4::int
                               THEN coalesce(l.holder, $2) = $2 END
  RETURNING l.bot, l.term
), closed AS (
  UPDATE bot_terms t SET released_at = clock_timestamp(), reason = $8 FROM gone
  WHERE t.bot = gone.bot AND t.term = gone.term
) SELECT bot, (SELECT pg_notify('botlease', $1) FROM (SELECT count(*) FROM gone HAVING count(*) > 0) x) FROM free
"""

# To whom a bot should go that does not run here: no more than an assignment, so it needs no evidence.
MOVE: Final = f"""
WITH {FREE.format(wanted="unnest($2::text[], $3::int[], $4::int[]) w(bot, source, target)")}, moved AS (
  UPDATE bot_leases l SET slot = w.target FROM free w
  WHERE l.bot = w.bot AND CASE WHEN coalesce(l.slot, {{unplaced}}) = w.source THEN l.fleet = $1 END RETURNING 1
) SELECT count(*), pg_notify('botlease', $1) FROM moved HAVING count(*) > 0
"""

# The row was seen unchanged for as long as any trust in it can last, and a lock-delay longer; or its owner is dead.
# From now on it reads as released. The instance is marked only where the kernel proved it dead: a frozen one lives on.
BURY: Final = f"""
WITH old AS (
  SELECT renewed_at, ttl FROM bot_leases WHERE bot = $1 FOR NO KEY UPDATE SKIP LOCKED
), gone AS (
  UPDATE bot_leases SET holder = NULL, proof = '', nonce = $7, beat = beat + 1, renewed_at = clock_timestamp(),
    slot = CASE WHEN fleet IS NULL THEN -abs(slot) ELSE slot END
  WHERE bot = $1 AND term = $2 AND beat = $3 AND nonce = $4 AND holder IS NOT DISTINCT FROM $5
    AND $8 || {{timeline}} = $9 AND EXISTS (SELECT 1 FROM old)
    -- the row of a bot is silent while its slot is renewed
    AND NOT EXISTS (SELECT 1 FROM bot_leases s WHERE s.bot = bot_leases.proof AND s.nonce = bot_leases.nonce)
  RETURNING renewed_at
), closed AS (
  UPDATE bot_terms t SET released_at = gone.renewed_at, reason = $6, last_beat = old.renewed_at,
    ttl = coalesce(t.ttl, old.ttl)
  FROM old, gone WHERE t.bot = $1 AND t.released_at IS NULL
), buried AS (
  UPDATE bot_instances SET state = 'stopped', stop_reason = $6, ended_at = clock_timestamp()
  WHERE $6 = 'died' AND instance_id = $5 AND ended_at IS NULL AND EXISTS (SELECT 1 FROM gone)
) SELECT 1, pg_notify('botlease', $10), {DURABLE} FROM gone
"""

# As REGISTER (postgressql.py) puts a lease in place: one whose bot is known here was lost, and is waited out. (The bots
# of a fleet have no deployments of their own: they are known by their terms.)
ADD: Final = f"""
INSERT INTO bot_leases AS l (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at, fleet, slot)
SELECT w.bot, greatest(coalesce(max(t.term), 0), CASE WHEN own.here = own.first THEN 0 ELSE {{era}} END), 0, $3,
  CASE WHEN max(t.term) IS NULL AND NOT w.known AND own.here = own.first THEN NULL ELSE 'unknown' END,
  greatest($4, max(t.ttl) FILTER (WHERE t.released_at IS NULL)), own.here,
  CASE WHEN max(t.term) IS NULL AND NOT w.known AND own.here = own.first THEN '' ELSE '-' END, 0,
  clock_timestamp(), $1, {{unplaced}}
FROM (SELECT bot, EXISTS (SELECT FROM bot_deployments d WHERE d.bot = b.bot) AS known FROM unnest($2::text[]) b(bot)) w
  CROSS JOIN (SELECT $5 || {{timeline}} AS here, origin AS first FROM botlease_schema) own
  LEFT JOIN bot_terms t ON t.bot = w.bot
GROUP BY w.bot, w.known, own.here, own.first
ON CONFLICT (bot) DO UPDATE SET fleet = $1, slot = {{unplaced}}
  WHERE l.fleet IS NULL OR l.fleet = $1 AND l.slot = {{leaving}}
RETURNING bot, {DURABLE}
"""
REMOVE: Final = (
    """
WITH gone AS (
  UPDATE bot_leases l SET
    fleet = CASE WHEN over THEN NULL ELSE l.fleet END, slot = CASE WHEN over THEN NULL ELSE {leaving} END,
    holder = CASE WHEN over THEN NULL ELSE l.holder END, proof = CASE WHEN over THEN '' ELSE l.proof END
  FROM (SELECT l.bot, l.term, """
    + OVER
    + """ AS over FROM bot_leases l WHERE l.fleet = $1 AND l.bot = ANY($2::text[])) o
  WHERE l.bot = o.bot AND CASE WHEN l.term = o.term THEN l.fleet = $1 END RETURNING l.bot, o.over
), closed AS (
  UPDATE bot_terms t SET released_at = clock_timestamp(), reason = 'lease_lost'
  FROM gone WHERE t.bot = gone.bot AND gone.over AND t.released_at IS NULL
) SELECT bot, """
    + DURABLE
    + " FROM gone"
)
# A member's part of it: those of which nothing runs any more. Whoever has been added again meanwhile stays.
CLEAR: Final = (
    """
WITH over AS MATERIALIZED (
  SELECT l.bot, l.term FROM bot_leases l WHERE l.fleet = $1 AND l.bot = ANY($2::text[]) AND l.slot = {leaving} AND """
    + OVER
    + """ FOR NO KEY UPDATE OF l SKIP LOCKED
), gone AS (
  UPDATE bot_leases l SET fleet = NULL, slot = NULL, holder = NULL, proof = '' FROM over o
  WHERE l.bot = o.bot AND CASE WHEN l.term = o.term THEN l.fleet = $1 AND l.slot = {leaving} END RETURNING l.bot
), closed AS (
  UPDATE bot_terms t SET released_at = clock_timestamp(), reason = 'lease_lost'
  FROM gone WHERE t.bot = gone.bot AND t.released_at IS NULL
) SELECT bot, """
    + DURABLE
    + " FROM gone"
)
NOTIFY: Final = "SELECT pg_notify('botlease', $1)"
NOTIFY_HOLDERS: Final = "SELECT pg_notify('botlease', bot) FROM bot_leases WHERE bot = ANY($1) AND holder IS NOT NULL"
BOTS: Final = """
SELECT bot, term, slot, paused, holder FROM bot_leases WHERE fleet = $1 ORDER BY bot
"""


@value
class Slot:
    number: int
    is_open: bool
    lease: Lease
    generation: int
    """Of its holder's deployment in this fleet; 0: there is no holder."""
    yields: bool
    """In the slot itself our deployment is newer than its holder's, or will be, or came after it: then it is to stand
    by there. (Also one in quarantine, and where an operator has made an older one the newest: neither is to open a
    slot of its own instead. But not where an older one came first after us: there we would wait for ever.)"""
    assigned: str | None
    ended: bool
    """The instance that should hold it is no more."""
    heirs: bool
    """Somebody else stands by for this very slot."""

    @property
    def held(self) -> bool:
        return self.lease.holder is not None


@value
class Row:
    """A bot of the fleet."""

    bot: str
    slot: int
    paused: bool
    lease: Lease
    ours: bool
    """Held under our own hold."""

    @property
    def term(self) -> int:
        return self.lease.term


@value
class Hold:
    """One term of one slot's lease."""

    fleet: str
    number: int
    instance_id: str
    term: int
    nonce: str
    origin: str
    ttl: float

    @property
    def name(self) -> str:
        return slot_name(self.fleet, self.number)


def slot_name(fleet: str, number: int) -> str:
    """No bot of its own can be called so: names have no slash."""
    return f"{fleet}/{number}"


class PostgresFleet:
    """Over the connection of the store, beside the renewals: writes come in batches, which are the caller's affair."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    def _sql(self, text: str) -> str:
        for name, number in (("leaving", LEAVING), ("unplaced", UNPLACED), ("gap", TERM_GAP)):
            text = text.replace("{" + name + "}", str(number))
        return self._store.filled(text)

    async def _fetch(self, deadline: float, sql: str, *args: Any) -> list[Any]:
        async def work(c: asyncpg.Connection) -> list[Any]:
            system = self._store.system  # known once connected
            return list(await c.fetch(self._sql(sql), *(system if a is SYSTEM else a for a in args)))

        return await self._store.call(deadline, work)

    async def enlist(self, fleet: str, deployment: str, deadline: float) -> int:
        """The generation of our deployment in this fleet."""
        (row,) = await self._fetch(deadline, ENLIST, fleet, deployment)
        return int(row["generation"])

    async def look(self, fleet: str, deployment: str, deadline: float) -> tuple[list[Slot], str]:
        """The slots, as one of this deployment sees them, and which database has answered ("" if there are none)."""
        rows = await self._fetch(deadline, LOOK, fleet, deployment)
        origin = self._store.system + rows[0]["timeline"] if rows else ""
        return [
            Slot(
                abs(r["slot"]),
                r["slot"] > 0,
                _lease(r),
                r["generation"] or 0 if r["holder"] else 0,
                r["yields"],
                r["assigned"],
                bool(r["ended"]),
                r["heirs"],
            )
            for r in rows
        ], origin

    async def mark(self, hold: Hold, deadline: float, *, is_open: bool) -> None:
        number = hold.number if is_open else -hold.number
        await self._fetch(deadline, MARK, hold.name, hold.instance_id, hold.nonce, number)

    async def rows(self, hold: Hold, open_slots: Sequence[int], deadline: float) -> list[Row]:
        """The bots of our slot, and those of no open one."""
        held = (hold.instance_id, hold.nonce)
        found = await self._fetch(deadline, ROWS, hold.fleet, hold.number, list(open_slots), *held)
        return [Row(r["bot"], r["slot"], r["paused"], _lease(r), (r["holder"], r["nonce"]) == held) for r in found]

    async def take(self, hold: Hold, bots: Iterable[tuple[str, int, int]], deadline: float) -> list[tuple[str, int]]:
        """Begin a term of each of these (bot, its term and slot as they were seen) under our hold. Returns those that
        were granted."""
        names, terms, slots = _columns(bots)
        found = await self._fetch(
            deadline,
            TAKE,
            *(hold.fleet, hold.instance_id, hold.name, hold.term, hold.nonce, SYSTEM, hold.origin, hold.ttl),
            *(names, terms, slots, hold.number),
        )
        return [(r["bot"], r["term"]) for r in found]

    async def give(self, hold: Hold, bots: Iterable[tuple[str, int, int]], reason: Reason, deadline: float) -> set[str]:
        """End these terms (bot, term, the slot to go to): nothing of them may run any more. Returns the bots whose rows
        somebody else has locked: they go on being held."""
        names, terms, targets = _columns(bots)
        found = await self._fetch(
            deadline,
            GIVE,
            *(hold.fleet, hold.instance_id, hold.nonce, hold.number, names, terms, targets, str(reason)),
        )
        return {*names} - {r["bot"] for r in found}

    async def move(self, fleet: str, bots: Iterable[tuple[str, int, int]], deadline: float) -> int:
        """Assign bots (bot, from which slot, to which one). Returns how many were."""
        found = await self._fetch(deadline, MOVE, fleet, *_columns(bots))
        return int(found[0]["count"]) if found else 0

    async def bury(self, fleet: str, bot: str, lease: Lease, origin: str, how: How, deadline: float) -> bool:
        """End the term of a slot, or of a bot, on the evidence of :class:`botlease.evidence.Evidence`."""
        fresh = os.urandom(8).hex()
        found = await self._fetch(deadline, BURY, bot, *lease.key, str(how), fresh, SYSTEM, origin, fleet)
        return bool(found)

    async def add(self, fleet: str, bots: Iterable[str], ttl: float, deadline: float) -> list[str]:
        """Returns the ones that are now in the fleet and were not. One of another fleet stays there."""
        fresh = os.urandom(8).hex()
        found = await self._fetch(deadline, ADD, fleet, sorted(set(bots)), fresh, ttl, SYSTEM)
        await self._fetch(deadline, NOTIFY, fleet)
        added = sorted(r["bot"] for r in found)
        # A supervisor of such a bot hears its bot's name alone.
        await self._fetch(deadline, NOTIFY_HOLDERS, added)
        return added

    async def remove(self, fleet: str, bots: Iterable[str], deadline: float) -> list[str]:
        """Returns the ones that were in the fleet. What runs is stopped first."""
        found = await self._fetch(deadline, REMOVE, fleet, sorted(set(bots)))
        await self._fetch(deadline, NOTIFY, fleet)
        return [r["bot"] for r in found]

    async def clear(self, fleet: str, bots: Iterable[str], deadline: float) -> int:
        """Let go of bots that are to leave and that nobody runs any more. Returns how many those were."""
        found = await self._fetch(deadline, CLEAR, fleet, sorted(set(bots)))
        if found:  # all members hear it: said for nothing it would have them all try again at once, for ever
            await self._fetch(deadline, NOTIFY, fleet)
        return len(found)

    async def bots(self, fleet: str, deadline: float) -> list[dict[str, Any]]:
        return [dict(r) for r in await self._fetch(deadline, BOTS, fleet)]


SYSTEM: Final = object()
"""Stands for the store's system id in arguments, which is known when it is connected."""


def _lease(r: Any) -> Lease:
    return Lease(r["term"], r["beat"], r["nonce"], r["holder"], float(r["ttl"]), r["origin"], r["proof"], r["served"])


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(c) for c in zip(*rows, strict=True)] or [[], [], []]
