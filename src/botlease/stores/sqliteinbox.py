"""The inbox on SQLite: ``<file>-updates``, beside the lease's file.

With a write-ahead log: one flush for each commit, and whoever looks (``status``) does not make a writer wait. It would
go on happily on a file that was deleted: that is what the inode is compared for.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from botlease import clock
from botlease.stores import StoreError, StoreRefused
from botlease.stores.inbox import KEEP_SECONDS, POLL_COLUMNS, Begun, Changes, Holding, Update
from botlease.stores.sqlite import Worker
from botlease.stores.sqlitefile import explain, prepare

T = TypeVar("T")
VERSION: Final = 1

CREATE: Final = """
CREATE TABLE IF NOT EXISTS bot_polls (
  bot TEXT NOT NULL, api TEXT NOT NULL, term INTEGER NOT NULL, nonce TEXT NOT NULL, lease TEXT NOT NULL,
  next_offset INTEGER NOT NULL DEFAULT 0, asked INTEGER NOT NULL DEFAULT -1, allowed TEXT,
  polling BOOLEAN NOT NULL DEFAULT FALSE, polled_at TIMESTAMP,
  conflicts INTEGER NOT NULL DEFAULT 0, conflict_at TIMESTAMP, webhook TEXT NOT NULL DEFAULT '',
  repeated INTEGER NOT NULL DEFAULT 0, set_aside INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (bot, api)
);
CREATE TABLE IF NOT EXISTS bot_updates (
  bot TEXT NOT NULL, api TEXT NOT NULL, update_id INTEGER NOT NULL, received_at TIMESTAMP NOT NULL,
  term INTEGER NOT NULL, tries INTEGER NOT NULL DEFAULT 0, done BOOLEAN NOT NULL DEFAULT FALSE, payload TEXT NOT NULL,
  PRIMARY KEY (bot, api, update_id)
);
"""
OLD: Final = "SELECT term, lease, next_offset, asked, allowed, polling FROM bot_polls WHERE bot = :bot AND api = :api"
MINE: Final = """
INSERT INTO bot_polls (bot, api, term, nonce, lease, polling) VALUES (:bot, :api, :term, :nonce, :lease, TRUE)
ON CONFLICT (bot, api) DO UPDATE SET
  term = excluded.term, nonce = excluded.nonce, lease = excluded.lease, polling = TRUE,
  set_aside = set_aside + (SELECT count(*) FROM bot_updates
                           WHERE bot = :bot AND api = :api AND NOT done AND received_at < :old)
"""
FORGET_OLD: Final = "DELETE FROM bot_updates WHERE bot = :bot AND api = :api AND received_at < :old"
KEPT: Final = """
SELECT update_id, payload, tries, done FROM bot_updates WHERE bot = :bot AND api = :api
ORDER BY received_at, update_id
"""
POLL: Final = """
UPDATE bot_polls SET next_offset = :offset, asked = :asked, allowed = coalesce(:allowed, allowed), polling = :polling,
  webhook = :webhook,
  polled_at = CASE WHEN :polled THEN :now ELSE polled_at END,
  conflicts = conflicts + :conflicts, conflict_at = CASE WHEN :conflicts > 0 THEN :now ELSE conflict_at END,
  repeated = repeated + :repeated, set_aside = set_aside + :set_aside
WHERE bot = :bot AND api = :api AND term = :term AND nonce = :nonce
"""
RECEIVE: Final = """
INSERT INTO bot_updates (bot, api, update_id, received_at, term, tries, payload) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING
"""
GIVE: Final = "UPDATE bot_updates SET tries = tries + 1 WHERE bot = ? AND api = ? AND update_id = ?"
RETURN: Final = "UPDATE bot_updates SET tries = tries - 1 WHERE bot = ? AND api = ? AND update_id = ?"
FINISH: Final = "UPDATE bot_updates SET done = TRUE, payload = '' WHERE bot = ? AND api = ? AND update_id = ?"
FORGET: Final = "DELETE FROM bot_updates WHERE bot = :bot AND api = :api AND done AND update_id < :confirmed"
POLLS: Final = f"""
SELECT {", ".join(POLL_COLUMNS)},
  (SELECT count(*) FROM bot_updates u WHERE u.bot = p.bot AND u.api = p.api AND NOT u.done) AS waiting
FROM bot_polls p ORDER BY bot, api
"""  # noqa: S608 - constants


def beside(path: str) -> str:
    """The inbox's file for a lease's file."""
    return f"{path}-updates"


def polls(path: str) -> list[dict[str, Any]]:
    """For ``status``: the rows of ``bot_polls``, each with how many updates wait. Changes nothing."""
    file = beside(path)
    if not Path(file).exists():
        return []
    with contextlib.closing(sqlite3.connect(file, timeout=1.0)) as db:
        db.row_factory = sqlite3.Row
        try:
            return [dict(r) for r in db.execute(POLLS)]
        except sqlite3.Error as e:
            raise explain(e, file) from None


class SqliteInbox:
    def __init__(self, path: str, wall: Callable[[], float] = clock.wall) -> None:
        self._beside = str(Path(path).absolute())
        self.path = beside(self._beside)
        self.wall = wall
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._lease = ""  # the file that our terms are numbered in
        self._worker: Worker | None = None

    async def _call(self, deadline: float, call: Callable[[sqlite3.Connection], T]) -> T:
        if self._worker is None:
            self._worker = Worker()

        def job(left: float) -> T:
            db = self._opened()
            db.execute(f"PRAGMA busy_timeout = {int(left * 800)}")
            try:
                db.execute("BEGIN IMMEDIATE")
                result = call(db)
                db.execute("COMMIT")
                return result
            except BaseException as e:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                self._shut()
                raise (explain(e, self.path) if isinstance(e, sqlite3.Error) else e) from None

        return await self._worker.call(deadline, job)

    def _opened(self) -> sqlite3.Connection:
        if self._db is not None:
            with contextlib.suppress(OSError):
                if Path(self.path).stat().st_ino == self._inode:
                    return self._db
            self._shut()
            raise StoreError(f"the file {self.path} was replaced or deleted")
        prepare(self.path)
        try:
            db = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise StoreRefused(f"{self.path} was written by a newer botlease: upgrade this one")
            if version < VERSION:
                for statement in CREATE.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as e:
            raise explain(e, self.path) from None
        self._db, self._inode = db, Path(self.path).stat().st_ino
        return db

    def _present_lease(self) -> str:
        """Which lease file is there now. A copy that was put back is another one."""
        try:
            inode = Path(self._beside).stat().st_ino
        except FileNotFoundError:
            return "none"
        url = f"file:{quote(self._beside)}?mode=ro"
        with contextlib.closing(sqlite3.connect(url, uri=True, timeout=1.0)) as lease:
            store_id = lease.execute("SELECT store_id FROM botlease_schema").fetchone()[0]
        return f"{store_id}/{inode}"

    def _shut(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    async def begin(self, me: Holding, api: str, deadline: float) -> Begun | None:
        def call(db: sqlite3.Connection) -> Begun | None:
            values = {"bot": me.bot, "api": api, "term": me.term, "nonce": me.nonce}
            values["old"] = clock.iso(self.wall() - KEEP_SECONDS)
            old = db.execute(OLD, values).fetchone()
            values["lease"] = self._lease = self._lease or self._present_lease()
            if self._lease != self._present_lease():
                return None  # the file that our terms are numbered in is no more
            # Terms of another lease file (which was lost, and made anew) say nothing about ours.
            if old is not None and old["term"] > me.term and old["lease"] == self._lease:
                return None
            db.execute(MINE, values)
            db.execute(FORGET_OLD, values)
            rows = db.execute(KEPT, values).fetchall()
            updates = [Update(r["update_id"], r["payload"], r["tries"]) for r in rows if not r["done"]]
            done = [r["update_id"] for r in rows if r["done"]]
            if old is None:
                return Begun(0, None, False, -1, updates, done)
            return Begun(old["next_offset"], old["allowed"], bool(old["polling"]), old["asked"], updates, done)

        return await self._call(deadline, call)

    async def save(self, me: Holding, api: str, changes: Changes, deadline: float) -> bool:
        def call(db: sqlite3.Connection) -> bool:
            c, now = changes, clock.iso(self.wall())
            values = {
                "bot": me.bot,
                "api": api,
                "term": me.term,
                "nonce": me.nonce,
                "now": now,
                "offset": c.offset,
                "asked": c.asked,
            }
            values |= {"allowed": c.allowed, "polling": c.polling, "webhook": c.webhook, "polled": c.polled}
            values |= {"conflicts": c.conflicts, "repeated": c.repeated, "set_aside": c.set_aside}
            if not db.execute(POLL, values).rowcount:
                return False
            db.executemany(RECEIVE, [(me.bot, api, u.update_id, now, me.term, u.tries, u.payload) for u in c.received])
            db.executemany(GIVE, [(me.bot, api, i) for i in c.given])
            db.executemany(RETURN, [(me.bot, api, i) for i in c.returned])
            db.executemany(FINISH, [(me.bot, api, i) for i in c.done])
            db.execute(FORGET, {"bot": me.bot, "api": api, "confirmed": c.confirmed})
            return True

        return await self._call(deadline, call)

    async def aclose(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(StoreError):
                await worker.call(1.0, lambda left: self._shut())
            worker.jobs.put(None)
