"""The tables in an SQLite file: made, upgraded, or taken over from an earlier system. Read only when there is need."""

from __future__ import annotations

import os
import sqlite3
from typing import Final

from botlease.stores import SCHEMA_VERSION, SEED_COLUMNS, StoreRefused

INSTANCE_COLUMNS: Final = {
    "bot": "TEXT",
    "deployment": "TEXT",
    "generation": "INTEGER",
    "host": "TEXT",
    "pid": "INTEGER",
    "state": "TEXT",
    "term": "INTEGER",
    "version": "TEXT",
    "stop_reason": "TEXT",
    "beat": "INTEGER NOT NULL DEFAULT 0",
    "ended_at": "TIMESTAMP",
}

CREATE_INSTANCES: Final = """
CREATE TABLE bot_instances (
  instance_id TEXT PRIMARY KEY NOT NULL, started_at TIMESTAMP NOT NULL, last_heartbeat TIMESTAMP NOT NULL,
  is_active BOOLEAN NOT NULL DEFAULT FALSE
)"""

CREATE_REST: Final = """
CREATE TABLE botlease_schema (version INTEGER NOT NULL, store_id TEXT NOT NULL, origin TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS bot_instances_one_active ON bot_instances (bot) WHERE is_active AND bot IS NOT NULL;
CREATE INDEX IF NOT EXISTS bot_instances_live ON bot_instances (bot) WHERE ended_at IS NULL;
CREATE TABLE IF NOT EXISTS bot_leases (
  bot TEXT PRIMARY KEY NOT NULL, term INTEGER NOT NULL, beat INTEGER NOT NULL, nonce TEXT NOT NULL, holder TEXT,
  ttl REAL NOT NULL, origin TEXT NOT NULL, proof TEXT NOT NULL, served INTEGER NOT NULL, renewed_at TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS bot_deployments (
  generation INTEGER PRIMARY KEY AUTOINCREMENT, bot TEXT NOT NULL, deployment TEXT NOT NULL,
  first_seen TIMESTAMP NOT NULL, UNIQUE (bot, deployment)
);
CREATE TABLE IF NOT EXISTS bot_terms (
  bot TEXT NOT NULL, term INTEGER NOT NULL, instance_id TEXT NOT NULL, deployment TEXT, how TEXT NOT NULL,
  acquired_at TIMESTAMP NOT NULL, released_at TIMESTAMP, reason TEXT, PRIMARY KEY (bot, term)
);
CREATE TRIGGER IF NOT EXISTS bot_instances_one_active BEFORE UPDATE OF is_active ON bot_instances
WHEN NEW.is_active AND NOT OLD.is_active AND NEW.bot IS NOT NULL BEGIN
  UPDATE bot_instances SET is_active = FALSE WHERE bot = NEW.bot AND instance_id <> NEW.instance_id AND is_active;
END;
"""

# From version 1 to 2: probation, pause, evidence in the journal, and an operator's choice that lasts.
# An edit by hand is told from a claim or a handing-on by the beat, which those raise: who gives the assignment to an
# older deployment by hand wants it to stay there, whatever restarts meanwhile. So that deployment becomes the newest.
UPGRADE_2: Final = """
ALTER TABLE bot_leases ADD COLUMN paused BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE bot_terms ADD COLUMN probation TEXT NOT NULL DEFAULT '';
ALTER TABLE bot_terms ADD COLUMN host TEXT;
ALTER TABLE bot_terms ADD COLUMN last_beat TIMESTAMP;
ALTER TABLE bot_terms ADD COLUMN ttl REAL;
CREATE INDEX bot_terms_probations ON bot_terms (bot, deployment) WHERE probation <> '';
CREATE VIEW bot_failures AS
  SELECT bot, deployment, count(*) AS failures FROM bot_terms t
  -- "probation <> ''" says nothing more, but lets the index be used
  WHERE probation <> '' AND probation = 'on' AND reason IN ('failed', 'died', 'expired')
    AND NOT EXISTS (SELECT 1 FROM bot_terms p WHERE p.bot = t.bot AND p.deployment = t.deployment
                    AND p.probation <> '' AND p.probation = 'passed' AND p.term > t.term)
  GROUP BY bot, deployment;
CREATE TRIGGER bot_instances_by_hand AFTER UPDATE OF is_active ON bot_instances
WHEN NEW.is_active AND NOT OLD.is_active AND NEW.bot IS NOT NULL AND NEW.beat = OLD.beat AND NEW.version <> '0.1.0'
  AND EXISTS (SELECT 1 FROM bot_deployments d WHERE d.bot = NEW.bot AND d.generation > NEW.generation) BEGIN
  INSERT OR REPLACE INTO bot_deployments (bot, deployment, first_seen)
    SELECT bot, deployment, first_seen FROM bot_deployments WHERE bot = NEW.bot AND deployment = NEW.deployment;
  UPDATE bot_instances SET generation = coalesce((
    SELECT d.generation FROM bot_deployments d WHERE d.bot = NEW.bot AND d.deployment = NEW.deployment), generation)
  WHERE instance_id = NEW.instance_id;
END;
"""
# Versions 3 to 5 are PostgreSQL's: here the inbox of the Bot API gateway has a file of its own
# (stores/sqliteinbox.py), nobody has rights that another one lacks, and there are no fleets.
UPGRADES: Final = {2: UPGRADE_2, 3: "", 4: "", 5: ""}


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """From ``version``. In the caller's transaction, as all of this."""
    for each in range(version + 1, SCHEMA_VERSION + 1):
        for statement in _statements(UPGRADES[each]):
            db.execute(statement)
        db.execute("UPDATE botlease_schema SET version = ?", (each,))


def create(db: sqlite3.Connection, path: str, inode: int) -> str:
    """Version 1. Returns the id of the store."""
    names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    taken = [n for n in ("bot_leases", "bot_deployments", "bot_terms") if n in names]
    if taken:
        raise StoreRefused(
            f"{', '.join(taken)} in {path} belongs to something else; nothing was changed: "
            "use another file, e.g. BOTLEASE_DATABASE_URL=sqlite:///botlease.db"
        )
    rows = db.execute("PRAGMA table_info(bot_instances)").fetchall()
    if not rows:
        db.execute(CREATE_INSTANCES)
        rows = db.execute("PRAGMA table_info(bot_instances)").fetchall()
    needed = [c["name"] for c in rows if c["notnull"] and c["dflt_value"] is None]
    _adopt(db, path, [c["name"] for c in rows], needed)
    for statement in _statements(CREATE_REST):
        db.execute(statement)
    store_id = os.urandom(8).hex()
    db.execute("INSERT INTO botlease_schema VALUES (?, ?, ?)", (1, store_id, f"{store_id}/{inode}"))
    return store_id


def _adopt(db: sqlite3.Connection, path: str, columns: list[str], needed: list[str]) -> None:
    """Take over a table of an earlier system by adding columns; refuse one that is something else."""
    missing = [c for c in SEED_COLUMNS if c not in columns]
    kind = db.execute("SELECT type FROM sqlite_master WHERE name = 'bot_instances'").fetchone()["type"]
    foreign = [c for c in needed if c not in SEED_COLUMNS and c not in INSTANCE_COLUMNS]
    if missing or foreign or kind != "table":
        what = f"has no column {', '.join(missing)}" if missing else f"is a {kind}"
        if foreign:
            what = f"demands a value for {', '.join(foreign)}"
        raise StoreRefused(
            f"bot_instances in {path} belongs to something else (it {what}); nothing was changed: "
            "use another file, e.g. BOTLEASE_DATABASE_URL=sqlite:///botlease.db"
        )
    old = db.execute(
        "SELECT count(*), count(DISTINCT instance_id), sum(instance_id IS NULL) FROM bot_instances"
    ).fetchone()
    if old[0] and (old[0] != old[1] or old[2]):
        raise StoreRefused(
            f"bot_instances in {path} has rows with the same instance_id, or none; nothing was changed: "
            "delete those rows and start again"
        )
    for name, kind in INSTANCE_COLUMNS.items():
        if name not in columns:
            db.execute(f"ALTER TABLE bot_instances ADD COLUMN {name} {kind}")
    # Rows of the earlier system stay as history. Their instances are told to stop, as the seed does.
    db.execute("UPDATE bot_instances SET is_active = FALSE WHERE bot IS NULL AND is_active")
    db.execute("CREATE UNIQUE INDEX IF NOT EXISTS bot_instances_id ON bot_instances (instance_id)")


def _statements(script: str) -> list[str]:
    """Split a script, keeping triggers whole (``executescript`` would commit our transaction)."""
    out, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            out.append(part)
            part = ""
    return out
