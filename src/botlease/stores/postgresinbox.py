"""The inbox on PostgreSQL, on a connection of its own: a renewal must not wait behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from botlease.stores.inbox import KEEP_SECONDS, POLL_COLUMNS, Begun, Changes, Holding, Update
from botlease.stores.postgressql import DURABLE

if TYPE_CHECKING:
    import asyncpg

    from botlease.stores.postgres import PostgresStore

# "old" is what was there before, since a statement sees the tables as they were when it began. The row lock that the
# upsert takes is what makes a writer of an earlier term wait, look again, and find itself fenced.
BEGIN: Final = f"""
WITH old AS (
  SELECT next_offset, asked, allowed, polling FROM bot_polls WHERE bot = $1 AND api = $2
), stale AS (
  SELECT count(*) FILTER (WHERE NOT done) AS undone FROM bot_updates
  WHERE bot = $1 AND api = $2 AND received_at < clock_timestamp() - make_interval(secs => $5)
), mine AS (
  INSERT INTO bot_polls (bot, api, term, nonce, polling) VALUES ($1, $2, $3, $4, TRUE)
  ON CONFLICT (bot, api) DO UPDATE SET term = excluded.term, nonce = excluded.nonce, polling = TRUE,
    set_aside = bot_polls.set_aside + (SELECT undone FROM stale)
  WHERE bot_polls.term <= excluded.term
  RETURNING 1
), forgotten AS (
  DELETE FROM bot_updates WHERE bot = $1 AND api = $2
    AND received_at < clock_timestamp() - make_interval(secs => $5) AND EXISTS (SELECT 1 FROM mine)
)
SELECT coalesce(old.next_offset, 0) AS next_offset, coalesce(old.asked, -1) AS asked, old.allowed,
       coalesce(old.polling, FALSE) AS polling,
       {DURABLE}
FROM mine LEFT JOIN old ON TRUE
"""
POLLS: Final = f"""
SELECT {", ".join(POLL_COLUMNS)},
  (SELECT count(*) FROM bot_updates u WHERE u.bot = p.bot AND u.api = p.api AND NOT u.done) AS waiting
FROM bot_polls p ORDER BY bot, api
"""
KEPT: Final = """
SELECT update_id, payload, tries, done FROM bot_updates WHERE bot = $1 AND api = $2
  AND received_at >= clock_timestamp() - make_interval(secs => $3) ORDER BY received_at, update_id
"""
SAVE: Final = f"""
WITH mine AS (
  UPDATE bot_polls SET next_offset = $5, allowed = coalesce($6, allowed), polling = $7, webhook = $8,
    polled_at = CASE WHEN $9 THEN clock_timestamp() ELSE polled_at END,
    conflicts = conflicts + $10, conflict_at = CASE WHEN $10 > 0 THEN clock_timestamp() ELSE conflict_at END,
    repeated = repeated + $11, set_aside = set_aside + $12, asked = $19
  WHERE bot = $1 AND api = $2 AND term = $3 AND nonce = $4
  RETURNING 1
), received AS (
  INSERT INTO bot_updates (bot, api, update_id, received_at, term, tries, payload)
  SELECT $1, $2, u.id, clock_timestamp(), $3, u.tries, u.payload
  FROM mine, unnest($13::bigint[], $14::int[], $15::text[]) u(id, tries, payload)
  ON CONFLICT DO NOTHING
), given AS (
  UPDATE bot_updates SET tries = tries + CASE WHEN update_id = ANY($20::bigint[]) THEN -1 ELSE 1 END
  WHERE bot = $1 AND api = $2 AND update_id = ANY($16::bigint[] || $20) AND EXISTS (SELECT 1 FROM mine)
), done AS (
  UPDATE bot_updates SET done = TRUE, payload = ''
  WHERE bot = $1 AND api = $2 AND update_id = ANY($17::bigint[]) AND update_id >= $18 AND EXISTS (SELECT 1 FROM mine)
), forgotten AS (
  DELETE FROM bot_updates
  WHERE bot = $1 AND api = $2 AND update_id < $18 AND (done OR update_id = ANY($17::bigint[]))
    AND EXISTS (SELECT 1 FROM mine)
)
SELECT EXISTS (SELECT 1 FROM mine), {DURABLE}
"""


class PostgresInbox:
    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        store.listens = False

    async def begin(self, me: Holding, api: str, deadline: float) -> Begun | None:
        async def work(c: asyncpg.Connection) -> Begun | None:
            row = await c.fetchrow(BEGIN, me.bot, api, me.term, me.nonce, float(KEEP_SECONDS))
            if row is None:
                return None
            rows: list[Any] = await c.fetch(KEPT, me.bot, api, float(KEEP_SECONDS))
            return Begun(
                row["next_offset"],
                row["allowed"],
                row["polling"],
                row["asked"],
                [Update(r["update_id"], r["payload"], r["tries"]) for r in rows if not r["done"]],
                [r["update_id"] for r in rows if r["done"]],
            )

        return await self._store.call(deadline, work)

    async def save(self, me: Holding, api: str, changes: Changes, deadline: float) -> bool:
        c, received = changes, changes.received
        values = (
            *(me.bot, api, me.term, me.nonce, c.offset, c.allowed, c.polling, c.webhook, c.polled),
            *(c.conflicts, c.repeated, c.set_aside),
            *([u.update_id for u in received], [u.tries for u in received], [u.payload for u in received]),
            *(c.given, c.done, c.confirmed, c.asked, c.returned),
        )
        return bool(await self._store.call(deadline, lambda db: db.fetchval(SAVE, *values)))

    async def aclose(self) -> None:
        await self._store.aclose()
