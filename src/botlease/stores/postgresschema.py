"""The tables on PostgreSQL: made, upgraded, or taken over from an earlier system. Read only when there is need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import asyncpg

from botlease.stores import SCHEMA_VERSION, SEED_COLUMNS, StoreError, StoreRefused

OWN_SCHEMA: Final = (
    "use a schema of your own: CREATE SCHEMA botlease; and add ?options=-csearch_path%3Dbotlease to the database URL"
)
MIGRATION_LOCK: Final = 0x626F746C  # "botl": only so that two first starts do not create the tables at once

INSTANCE_COLUMNS: Final = {
    "bot": "text",
    "deployment": "text",
    "generation": "bigint",
    "host": "text",
    "pid": "integer",
    "state": "text",
    "term": "bigint",
    "version": "text",
    "stop_reason": "text",
    "beat": "bigint NOT NULL DEFAULT 0",
    "ended_at": "timestamptz",
}

CREATE_INSTANCES: Final = """
CREATE TABLE bot_instances (
  instance_id text PRIMARY KEY, started_at timestamptz NOT NULL, last_heartbeat timestamptz NOT NULL,
  is_active boolean NOT NULL DEFAULT FALSE
) WITH (fillfactor = 50)"""

# Heartbeat columns are in no index, so that renewals and touches are HOT updates (measured: no bloat).
CREATE_REST: Final = """
CREATE UNIQUE INDEX bot_instances_one_active ON bot_instances (bot) WHERE is_active;
CREATE INDEX bot_instances_live ON bot_instances (bot) WHERE ended_at IS NULL;
-- What a renewal changes stands together: of a row the log gets what lies between the first and the last change.
CREATE TABLE bot_leases (
  bot text PRIMARY KEY, term bigint NOT NULL, nonce text NOT NULL, holder text, ttl double precision NOT NULL,
  origin text NOT NULL, proof text NOT NULL, served bigint NOT NULL, beat bigint NOT NULL,
  renewed_at timestamptz NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE bot_deployments (
  generation bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, bot text NOT NULL, deployment text NOT NULL,
  first_seen timestamptz NOT NULL, UNIQUE (bot, deployment)
);
CREATE TABLE bot_terms (
  bot text NOT NULL, term bigint NOT NULL, instance_id text NOT NULL, deployment text, how text NOT NULL,
  acquired_at timestamptz NOT NULL, released_at timestamptz, reason text, PRIMARY KEY (bot, term)
);
CREATE TABLE botlease_schema (version integer NOT NULL, origin text NOT NULL);
CREATE OR REPLACE FUNCTION botlease_one_active() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE format('UPDATE %I.%I SET is_active = FALSE WHERE bot = $1 AND instance_id <> $2 AND is_active',
                 TG_TABLE_SCHEMA, TG_TABLE_NAME) USING NEW.bot, NEW.instance_id;
  RETURN NEW;
END $$;
-- A plain UPDATE would judge by the snapshot from before it waited: of two claims at once both would win, and an
-- operator's edit of that moment would be overridden. Here each step looks anew, under the lock of the step before.
-- Everybody locks in the same order (lease, the one who gets the assignment, the one who has it), or they deadlock.
CREATE OR REPLACE FUNCTION botlease_claim(the_bot text, me text, source text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE current_one text;
BEGIN
  PERFORM 1 FROM bot_leases WHERE bot = the_bot FOR UPDATE;
  PERFORM 1 FROM bot_instances WHERE instance_id = me AND ended_at IS NULL FOR UPDATE;
  IF NOT FOUND THEN RETURN FALSE; END IF;
  SELECT instance_id INTO current_one FROM bot_instances WHERE bot = the_bot AND is_active FOR UPDATE;
  IF current_one IS DISTINCT FROM source THEN RETURN FALSE; END IF;
  UPDATE bot_instances SET is_active = TRUE WHERE instance_id = me;
  RETURN TRUE;
END $$;
CREATE OR REPLACE FUNCTION botlease_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('botlease', coalesce(CASE WHEN TG_OP = 'DELETE' THEN OLD.bot ELSE NEW.bot END, ''));
  RETURN NULL;
END $$;
CREATE TRIGGER botlease_one_active BEFORE UPDATE OF is_active ON bot_instances FOR EACH ROW
  WHEN (NEW.is_active AND NOT OLD.is_active AND NEW.bot IS NOT NULL) EXECUTE FUNCTION botlease_one_active();
CREATE TRIGGER botlease_assignment AFTER UPDATE ON bot_instances FOR EACH ROW
  WHEN (OLD.is_active IS DISTINCT FROM NEW.is_active) EXECUTE FUNCTION botlease_notify();
CREATE TRIGGER botlease_removal AFTER DELETE ON bot_instances FOR EACH ROW EXECUTE FUNCTION botlease_notify();
CREATE TRIGGER botlease_occupancy AFTER UPDATE ON bot_leases FOR EACH ROW
  WHEN (OLD.holder IS DISTINCT FROM NEW.holder) EXECUTE FUNCTION botlease_notify();
"""

# From version 1 to 2: probation, pause, evidence in the journal, and an operator's choice that lasts.
# An edit by hand is told from a claim or a handing-on by the beat, which those raise: who gives the assignment to an
# older deployment by hand wants it to stay there, whatever restarts meanwhile. So that deployment becomes the newest.
UPGRADE_2: Final = """
ALTER TABLE bot_leases ADD COLUMN paused boolean NOT NULL DEFAULT FALSE;
ALTER TABLE bot_terms ADD COLUMN probation text NOT NULL DEFAULT '', ADD COLUMN host text,
  ADD COLUMN last_beat timestamptz, ADD COLUMN ttl double precision;
CREATE INDEX bot_terms_probations ON bot_terms (bot, deployment) WHERE probation <> '';
CREATE VIEW bot_failures AS
  SELECT bot, deployment, count(*) AS failures FROM bot_terms t
  WHERE probation = 'on' AND reason IN ('failed', 'died', 'expired')
    AND NOT EXISTS (SELECT 1 FROM bot_terms p WHERE p.bot = t.bot AND p.deployment = t.deployment
                    AND p.probation = 'passed' AND p.term > t.term)
  GROUP BY bot, deployment;
-- SECURITY DEFINER: an operator's role may edit bot_instances and nothing else.
CREATE OR REPLACE FUNCTION botlease_one_active() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE fresh bigint;
BEGIN
  EXECUTE format('UPDATE %I.%I SET is_active = FALSE WHERE bot = $1 AND instance_id <> $2 AND is_active',
                 TG_TABLE_SCHEMA, TG_TABLE_NAME) USING NEW.bot, NEW.instance_id;
  IF NEW.beat = OLD.beat AND NEW.version IS DISTINCT FROM '0.1.0' THEN  -- which raised no beat
    EXECUTE format('UPDATE %I.bot_deployments m SET generation = DEFAULT WHERE bot = $1 AND deployment = $2
                    AND EXISTS (SELECT 1 FROM %I.bot_deployments d WHERE d.bot = $1 AND d.generation > m.generation)',
                   TG_TABLE_SCHEMA, TG_TABLE_SCHEMA) USING NEW.bot, NEW.deployment;
    EXECUTE format('SELECT generation FROM %I.bot_deployments WHERE bot = $1 AND deployment = $2', TG_TABLE_SCHEMA)
      INTO fresh USING NEW.bot, NEW.deployment;
    NEW.generation := coalesce(fresh, NEW.generation);
  END IF;
  RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION botlease_claim(the_bot text, me text, source text, its_generation bigint, its_beat bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE current_one record;
BEGIN
  PERFORM 1 FROM bot_leases WHERE bot = the_bot FOR UPDATE;
  PERFORM 1 FROM bot_instances WHERE instance_id = me AND ended_at IS NULL FOR UPDATE;
  IF NOT FOUND THEN RETURN FALSE; END IF;
  SELECT instance_id, generation, beat INTO current_one FROM bot_instances WHERE bot = the_bot AND is_active FOR UPDATE;
  IF current_one.instance_id IS DISTINCT FROM source OR coalesce(current_one.generation, 0) <> its_generation
     OR coalesce(current_one.beat, 0) <> its_beat THEN
    RETURN FALSE;
  END IF;
  UPDATE bot_instances SET is_active = TRUE, beat = beat + 1 WHERE instance_id = me;
  RETURN TRUE;
END $$;
DROP FUNCTION botlease_claim(text, text, text);
CREATE FUNCTION botlease_claim(the_bot text, me text, source text) RETURNS boolean LANGUAGE sql AS $$
  -- asked by supervisors of version 1, which did not name generation and beat
  SELECT botlease_claim($1, $2, $3, coalesce(max(generation), 0), coalesce(max(beat), 0))
  FROM bot_instances WHERE bot = $1 AND is_active
$$;
CREATE TRIGGER botlease_pause AFTER UPDATE ON bot_leases FOR EACH ROW
  WHEN (OLD.paused IS DISTINCT FROM NEW.paused) EXECUTE FUNCTION botlease_notify();
CREATE TRIGGER botlease_probation AFTER UPDATE ON bot_terms FOR EACH ROW
  WHEN (OLD.probation IS DISTINCT FROM NEW.probation) EXECUTE FUNCTION botlease_notify();
"""
# From version 2 to 3: the inbox of the Bot API gateway (stores/postgresinbox.py).
UPGRADE_3: Final = """
CREATE TABLE bot_polls (
  bot text NOT NULL, api text NOT NULL, term bigint NOT NULL, nonce text NOT NULL,
  next_offset bigint NOT NULL DEFAULT 0, asked bigint NOT NULL DEFAULT -1, allowed text,
  polling boolean NOT NULL DEFAULT FALSE, polled_at timestamptz,
  conflicts bigint NOT NULL DEFAULT 0, conflict_at timestamptz, webhook text NOT NULL DEFAULT '',
  repeated bigint NOT NULL DEFAULT 0, set_aside bigint NOT NULL DEFAULT 0, PRIMARY KEY (bot, api)
) WITH (fillfactor = 50);
CREATE TABLE bot_updates (
  bot text NOT NULL, api text NOT NULL, update_id bigint NOT NULL, received_at timestamptz NOT NULL,
  term bigint NOT NULL, tries integer NOT NULL DEFAULT 0, done boolean NOT NULL DEFAULT FALSE, payload text NOT NULL,
  PRIMARY KEY (bot, api, update_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
"""
# From version 3 to 4. The function runs with the rights of the tables' owner, on whatever table it is the trigger of,
# and everybody may put a function of PUBLIC on a table of his own. EXECUTE is asked for when a trigger is made, and not
# when it fires.
UPGRADE_4: Final = "REVOKE ALL ON FUNCTION botlease_one_active() FROM PUBLIC"
# From version 4 to 5: fleets (stores/postgresfleet.py). A bot of a fleet is held through the lease of a slot of it, so
# its own row is silent, and a supervisor that did not know better would wait it out. Those of this version read it as
# paused; whoever else would become its holder gets an error. Many rows of a fleet change at once: it tells by itself.
UPGRADE_5: Final = """
ALTER TABLE bot_leases ADD COLUMN fleet text, ADD COLUMN slot integer;
CREATE INDEX bot_leases_fleet ON bot_leases (fleet, slot) WHERE fleet IS NOT NULL;
CREATE INDEX bot_leases_slots ON bot_leases (slot) WHERE fleet IS NULL AND slot IS NOT NULL;
DROP TRIGGER botlease_occupancy ON bot_leases;
CREATE OR REPLACE FUNCTION botlease_lease() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('botlease', coalesce(NEW.fleet, NEW.bot));
  RETURN NULL;
END $$;
-- of a bot in a fleet: that its supervisor of before has let it go, and nothing of what members do
CREATE TRIGGER botlease_occupancy AFTER UPDATE ON bot_leases FOR EACH ROW
  WHEN ((OLD.holder IS DISTINCT FROM NEW.holder
         AND (NEW.fleet IS NULL OR NEW.holder IS NULL AND NOT starts_with(OLD.proof, NEW.fleet || '/')))
        OR OLD.fleet IS DISTINCT FROM NEW.fleet)
  EXECUTE FUNCTION botlease_lease();
DROP TRIGGER botlease_pause ON bot_leases;
CREATE TRIGGER botlease_pause AFTER UPDATE ON bot_leases FOR EACH ROW
  WHEN (OLD.paused IS DISTINCT FROM NEW.paused) EXECUTE FUNCTION botlease_lease();
CREATE OR REPLACE FUNCTION botlease_in_fleet() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'the bot % is in the fleet %, which alone may run it', NEW.bot, NEW.fleet;
END $$;
-- AFTER, though it refuses: for a trigger before it the row is locked first, which goes to the log with each renewal.
CREATE TRIGGER botlease_in_fleet AFTER UPDATE ON bot_leases FOR EACH ROW
  WHEN (NEW.fleet IS NOT NULL AND NEW.holder IS NOT NULL AND OLD.holder IS DISTINCT FROM NEW.holder
        AND NOT starts_with(NEW.proof, NEW.fleet || '/'))
  EXECUTE FUNCTION botlease_in_fleet();
"""
UPGRADES: Final = {2: UPGRADE_2, 3: UPGRADE_3, 4: UPGRADE_4, 5: UPGRADE_5}
DOES_NOT_FIT: Final = (
    asyncpg.SyntaxOrAccessError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.PLPGSQLError,
    asyncpg.TriggeredActionError,
)
"""What the server says when tables, triggers or rules that are there already do not go with ours."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the tables are to be, as the store knows it."""

    url: str  # for people: no password in it
    system: str
    timeline: str  # an SQL expression
    explain: Callable[[Exception], str]
    rehearse: Callable[[asyncpg.Connection], Awaitable[None]]
    """Lives a whole life on an adopted table, and takes it back. Raises one of DOES_NOT_FIT."""


async def migrate(connection: asyncpg.Connection, target: Target) -> None:
    """Wait for locks only in short pieces: whoever waits for a table keeps everybody behind him waiting, and a
    renewal must not wait for long."""
    for last in (False,) * 7 + (True,):
        try:
            async with connection.transaction():
                await connection.execute("SET LOCAL lock_timeout = '200ms'")
                await _upgrade(connection, target)
            break
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if last:
                raise StoreError(f"the tables at {target.url} are in use by a long transaction") from None
            await asyncio.sleep(0.3)


async def _upgrade(connection: asyncpg.Connection, target: Target) -> None:
    await connection.execute(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
    adopted = False
    try:
        if not await connection.fetchval("SELECT to_regclass('botlease_schema') IS NOT NULL"):
            adopted = await _create(connection, target)  # else another first start was quicker
        version = await connection.fetchval("SELECT version FROM botlease_schema")
        for each in range(version + 1, SCHEMA_VERSION + 1):
            await connection.execute(UPGRADES[each])
            await connection.execute("UPDATE botlease_schema SET version = $1", each)
        if adopted:
            await target.rehearse(connection)
    except asyncpg.InsufficientPrivilegeError:
        raise
    except DOES_NOT_FIT as e:
        what = "bot_instances in" if adopted else "the tables cannot be made in"
        why = f"what is there does not go with ours ({target.explain(e)})"
        raise StoreRefused(f"{what} {target.url}: {why}; nothing was changed: {OWN_SCHEMA}") from None


async def _create(connection: asyncpg.Connection, target: Target) -> bool:
    """True if there was a table to adopt."""
    taken = await connection.fetchval(
        "SELECT string_agg(t, ', ') FROM "
        "unnest(ARRAY['bot_leases', 'bot_deployments', 'bot_terms', 'bot_polls', 'bot_updates']) t "
        "WHERE to_regclass(t) IS NOT NULL"
    )
    if taken:
        raise StoreRefused(f"{taken} in {target.url} belongs to something else; nothing was changed: {OWN_SCHEMA}")
    kind = await connection.fetchval("SELECT relkind::text FROM pg_class WHERE oid = to_regclass('bot_instances')")
    if kind is None:
        await connection.execute(CREATE_INSTANCES)
    await _adopt(connection, target.url, kind or "r")
    await connection.execute(CREATE_REST)
    await connection.execute(f"INSERT INTO botlease_schema VALUES (1, $1 || {target.timeline})", target.system)
    return kind is not None


async def _adopt(connection: asyncpg.Connection, url: str, kind: str) -> None:
    """Take over a table of an earlier system by adding columns; refuse one that is something else."""
    rows = await connection.fetch(
        "SELECT attname, format_type(atttypid, NULL) AS type, attnotnull AND NOT atthasdef AS needed "
        "FROM pg_attribute WHERE attrelid = to_regclass('bot_instances') AND attnum > 0 AND NOT attisdropped"
    )
    columns = {r["attname"]: r["type"] for r in rows}
    missing = [c for c in SEED_COLUMNS if c not in columns]
    foreign = [r["attname"] for r in rows if r["needed"] and r["attname"] not in (*SEED_COLUMNS, *INSTANCE_COLUMNS)]
    wrong = ""
    if kind != "r":
        wrong = "is not a plain table"
    elif missing:
        wrong = f"has no column {', '.join(missing)}"
    elif foreign:
        wrong = f"demands a value for {', '.join(foreign)}"
    elif columns["is_active"] != "boolean":
        wrong = f"has is_active as {columns['is_active']}, not boolean"
    elif columns["instance_id"] not in ("text", "character varying"):
        wrong = f"has instance_id as {columns['instance_id']}, not text"
    if wrong:
        raise StoreRefused(
            f"bot_instances in {url} belongs to something else (it {wrong}); nothing was changed: {OWN_SCHEMA}"
        )
    double = await connection.fetchval(
        "SELECT count(*) - count(DISTINCT instance_id) FROM bot_instances HAVING count(*) > 0"
    )
    if double:
        raise StoreRefused(
            f"bot_instances in {url} has {double} rows with the same instance_id, or none; "
            "nothing was changed: delete those rows and start again"
        )
    for name, kind in INSTANCE_COLUMNS.items():
        if name not in columns:
            await connection.execute(f"ALTER TABLE bot_instances ADD COLUMN {name} {kind}")
    # Rows of the earlier system stay as history. Their instances are told to stop, as the seed does.
    await connection.execute("UPDATE bot_instances SET is_active = FALSE WHERE bot IS NULL AND is_active")
    await connection.execute("CREATE UNIQUE INDEX IF NOT EXISTS bot_instances_id ON bot_instances (instance_id)")
