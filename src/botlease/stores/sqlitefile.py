"""One open file of SQLite, synchronous.

:mod:`.sqlite` runs this in a thread of its own, with deadlines; the simulation of the tests drives exactly this code.

Why rollback journal and not WAL: with WAL a holder goes on renewing happily on a file that was
deleted and created anew by somebody else; with the rollback journal SQLite refuses
(``SQLITE_READONLY_DBMOVED``), and the inode is compared before each call as well.

The journal is kept and its header overwritten (``PERSIST``), which SQLite waits for. To delete it, as is the default,
takes a third more processor time, and nobody waits for the folder: after a power failure the journal can be there
again, and with it what was there before the last commit.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from botlease import clock, procfs
from botlease.model import Held, How, Probation, Reason, View
from botlease.presence import private_folder
from botlease.stores import (
    KEEP_ENDED_DAYS,
    SCHEMA_VERSION,
    Grant,
    Registration,
    Renewal,
    StoreEmpty,
    StoreError,
    StoreRefused,
    make_view,
    older,
)
from botlease.stores.sqlitesql import (
    ACQUIRE,
    ADD_DEPLOYMENT,
    ADD_INSTANCE,
    ADD_LEASE,
    BURY,
    CLAIM,
    CLOSE_OLD_TERM,
    CLOSE_TERM,
    DEACTIVATE,
    END,
    FAILURES,
    HAND_ON,
    INSTANCES,
    LAST_BEAT,
    LEASES,
    OPEN_TERM,
    PASSED,
    PAUSE,
    PRUNE,
    READ,
    RELEASE,
    RENEW,
    SHOW_STANDBY,
    SHOW_TERM,
    TERMS,
    TOUCH,
)
from botlease.text import clean

Key = tuple[int, int, str, str | None]

# f_type of statfs(2) for file systems whose locks or writes other hosts do not see in time.
NETWORK_FILE_SYSTEMS: Final = {
    0x6969: "NFS",
    0xFF534D42: "SMB/CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x01021997: "9p",
    0x65735546: "FUSE",
    0x5346414F: "AFS",
    0x00C36400: "Ceph",
    0x47504653: "GPFS",
    0x0BD00BD0: "Lustre",
}


CHECKED_PAGES: Final = 2000
"""8 MB: 24 ms to read through (measured); a new lease's file has 15 pages (1 ms)."""
NOT_OURS: Final = "botlease_schema in {path} is not ours: use another file"
DAMAGED: Final = (
    "is damaged, as SQLite files are that were renamed or copied over while in use: stop every instance, then restore "
    "it from a backup, or delete it together with its -journal"
)


def _plain(held: Held) -> dict[str, Any]:
    return {"term": held.term, "nonce": held.nonce, "beats": f",{','.join(map(str, held.beats))},"}


class SqliteFile:
    """The verbs on one open file, synchronous. ``wall`` is injected so that tests can step it."""

    def __init__(
        self, path: str, wall: Callable[[], float] = clock.wall, busy: float = 1.0, upgrade: bool = True
    ) -> None:
        self.path = path
        self.wall = wall
        self.origin = ""
        self.inode = 0
        self.commits = 0
        self._patience = -1  # ms
        # A copy of the file put in its place has no number of its own; the seconds of the clock rise well enough.
        self.era: Callable[[], int] = lambda: int(wall())
        if path != ":memory:":
            prepare(path)
        try:
            self.db = sqlite3.connect(path, timeout=busy, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as e:
            raise StoreRefused(f"cannot open {path}: {e}") from None
        self.db.row_factory = sqlite3.Row
        try:
            self.db.execute("PRAGMA synchronous = FULL")
            self._keep_the_journal()
            self._check()
            self._migrate(upgrade)
        except sqlite3.Error as e:
            self.db.close()
            raise explain(e, path) from None
        except BaseException:
            self.db.close()
            raise

    def _keep_the_journal(self) -> None:
        """Raises sqlite3.Error. Where the bot, whose file this is as well, has set WAL, nobody can set another mode
        while it is open, and nobody need: the holder's file is compared before each of its calls."""
        try:
            self.db.execute("PRAGMA journal_mode = PERSIST")
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            if self.db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                raise

    def close(self) -> None:
        self.db.close()

    def wait_for_locks(self, seconds: float) -> None:
        """How long the calls that follow may wait for another process to let the file go."""
        ms = int(seconds * 1000)
        ms -= ms % 50 if ms > 50 else 0  # nearly the same each time: to say it costs as much as a small question
        if ms != self._patience:
            self.db.execute(f"PRAGMA busy_timeout = {ms}")
            self._patience = ms

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction that takes the write lock at once: a deferred one can fail half way with BUSY."""
        self._same_file()
        if self.db.in_transaction:  # the rehearsal is part of the making of the tables
            yield self.db
            return
        self.db.execute("BEGIN IMMEDIATE")
        before = self.db.total_changes
        try:
            yield self.db
            self.commits += self.db.total_changes > before  # a guard that did not match writes nothing, and no journal
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise

    def _same_file(self) -> None:
        if not self.inode:
            return
        try:
            here = os.stat(self.path).st_ino  # noqa: PTH116 - before each call: a Path is five times as slow
        except OSError:
            raise StoreError(f"the database file {self.path} is gone") from None
        if here != self.inode:
            raise StoreError(f"the database file {self.path} was replaced by another one")

    def _check(self) -> None:
        """A file that is renamed or copied over one in use gets the journal of the other one rolled into it (SQLite,
        "How to corrupt": seen in the nemesis, each row twice). No lease can be read from that."""
        (pages,) = self.db.execute("PRAGMA page_count").fetchone()
        if pages <= CHECKED_PAGES:
            (found,) = self.db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise StoreRefused(f"{self.path} {DAMAGED}")

    # Schema ----------------------------------------------------------------------------------------------------

    def _migrate(self, upgrade: bool) -> None:
        inode = Path(self.path).stat().st_ino if self.path != ":memory:" else 0
        store_id = self._known()
        if not upgrade and store_id is None:
            raise StoreEmpty(f"there are no tables of botlease in {self.path}: nothing has run there yet")
        if not upgrade and self._version() < SCHEMA_VERSION:
            raise StoreRefused(f"{self.path}: {older(self._version())}")
        if store_id is None or self._version() < SCHEMA_VERSION:
            with self._write():
                from botlease.stores import sqliteschema

                # Under the write lock: of two first starts at once the second finds it done.
                store_id = self._known()
                adopts = self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'bot_instances'").fetchone()
                rehearse = store_id is None and adopts
                store_id = store_id or sqliteschema.create(self.db, self.path, inode)
                sqliteschema.upgrade(self.db, self._version())
                if rehearse:
                    self.origin = f"{store_id}/{inode}"
                    self._rehearse()
        self.inode = inode
        self.origin = f"{store_id}/{inode}"

    def _known(self) -> str | None:
        """The id of a schema that is there already; refuses one from the future."""
        if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'botlease_schema'").fetchone():
            return None
        try:
            row = self.db.execute("SELECT version, store_id, origin FROM botlease_schema").fetchone()
        except sqlite3.OperationalError as e:
            if "no such column" not in str(e):
                raise
            row = None
        if row is None or not isinstance(row["version"], int):
            raise StoreRefused(NOT_OURS.format(path=self.path))
        if row["version"] > SCHEMA_VERSION:
            raise StoreRefused(
                f"{self.path} was written by a newer botlease (schema {row['version']}, this one knows "
                f"{SCHEMA_VERSION}): upgrade this one"
            )
        return str(row["store_id"])

    def _rehearse(self) -> None:
        """A table that we adopted can have checks, triggers and types that nobody thought of. So a whole life is lived
        on it, and taken back: better refused now than at the first handover."""
        bot, me, nonce = "rehearsal", f"rehearsal-{os.urandom(4).hex()}", os.urandom(8).hex()
        self.db.execute("SAVEPOINT rehearsal")
        try:
            view = self.register(Registration(me, bot, me, "", 0, "", 1.0))
            went = view.lease is not None and self.claim(bot, me, None)
            if view.lease is not None and went:
                begin: dict[str, Any] = {"nonce": nonce, "floor": 0, "origin": view.origin, "how": How.RELEASED}
                grant = self.acquire(bot, me, view.lease.key, ttl=1.0, proof="", probation=Probation.ON, **begin)
                held = Held(grant.term if grant else 0, nonce)
                went = grant is not None and self.renew(bot, me, held, 1) is not None and self.passed(bot, me, held)
                end: dict[str, Any] = {"reason": Reason.STOPPED, "pass_on": True, "leave": True}
                went = went and self.release(bot, me, held._replace(beats=(1,)), **end)
            self.overview()
            why = "" if went else "its triggers change what is written"
        except (sqlite3.Error, TypeError, ValueError) as e:
            if "locked" in str(e) or "busy" in str(e):
                raise
            why = str(e)
        self.db.execute("ROLLBACK TO rehearsal")
        if why:
            raise StoreRefused(
                f"bot_instances in {self.path} does not go with ours ({clean(why)}); nothing was changed: "
                "use another file, e.g. BOTLEASE_DATABASE_URL=sqlite:///botlease.db"
            )

    def _version(self) -> int:
        return int(self.db.execute("SELECT version FROM botlease_schema").fetchone()["version"])

    # Verbs -----------------------------------------------------------------------------------------------------

    def register(self, me: Registration) -> View:
        now = self.wall()
        values = {
            "me": me.instance_id,
            "bot": me.bot,
            "deployment": me.deployment,
            "host": me.host,
            "pid": me.pid,
            "version": me.version,
            "ttl": me.ttl,
            "nonce": os.urandom(8).hex(),
            "origin": self.origin,
            "era": self.era(),
            "now": clock.iso(now),
        }
        with self._write() as db:
            for statement in (ADD_LEASE, ADD_DEPLOYMENT, ADD_INSTANCE):  # the first one asks what was there before
                db.execute(statement, values)
            for statement in PRUNE:
                kept = clock.iso(now - KEEP_ENDED_DAYS * 86_400)
                db.execute(statement, {"bot": None, "old": kept, "kept": kept, "alive": kept})
            return self._view(me.bot, me.instance_id)

    def read(self, bot: str, instance_id: str) -> View:
        self._same_file()
        return self._view(bot, instance_id)

    def _view(self, bot: str, instance_id: str) -> View:
        row = self.db.execute(READ, {"bot": bot, "me": instance_id, "now": clock.iso(self.wall())}).fetchone()
        if row["term"] is not None:
            self._numbers(row, "term", "beat", "ttl", "served")
        return make_view(row, self.origin, self.era())

    def _numbers(self, row: sqlite3.Row, *columns: str) -> sqlite3.Row:
        """SQLite keeps what it is given, whatever the column's type says: an operator's word where we compute."""
        for name in columns:
            if not isinstance(row[name], int | float):
                said = clean(repr(row[name]))
                raise StoreRefused(f"{self.path}: {name} is {said}, where a number must be: correct it")
        return row

    def claim(self, bot: str, instance_id: str, source: tuple[str, int, int] | None) -> bool:
        with self._write() as db:
            who, generation, beat = source or (None, 0, 0)
            values = {"bot": bot, "me": instance_id, "source": who, "generation": generation, "beat": beat}
            return db.execute(CLAIM, values).rowcount == 1

    def acquire(
        self,
        bot: str,
        instance_id: str,
        key: Key,
        *,
        nonce: str,
        floor: int,
        origin: str,
        how: How,
        ttl: float,
        proof: str,
        probation: Probation = Probation.NONE,
    ) -> Grant | None:
        values = {
            "bot": bot,
            "me": instance_id,
            "term": key[0],
            "beat": key[1],
            "nonce": key[2],
            "holder": key[3],
            "new": nonce,
            "floor": floor,
            "seen": origin,
            "how": str(how),
            "ttl": ttl,
            "proof": proof,
            "probation": str(probation),
            "origin": self.origin,
        }
        with self._write() as db:
            values["now"] = clock.iso(self.wall())  # after the lock was had: what is released here was released before
            old = db.execute(LAST_BEAT, values).fetchone()
            rows = db.execute(ACQUIRE, values).fetchall()
            if not rows:
                return None
            values |= {"term": rows[0]["term"], "last_beat": old["renewed_at"], "old_ttl": old["ttl"]}
            for statement in (CLOSE_OLD_TERM, OPEN_TERM, SHOW_TERM):
                db.execute(statement, values)
            if how is How.DIED:
                db.execute(BURY, values)
            return Grant(rows[0]["term"], self.origin)

    def renew(self, bot: str, instance_id: str, held: Held, beat: int, label: str = "") -> Renewal | None:
        values = {"bot": bot, "me": instance_id, "beat": beat, "now": clock.iso(self.wall()), **_plain(held)}
        with self._write() as db:
            rows = db.execute(RENEW, values).fetchall()
            if not rows:
                return None
            if label:
                db.execute(TOUCH, values | {"state": label})
            row = rows[0]
            return Renewal(bool(row["assigned"]), bool(row["vacant"]), self.origin, bool(row["paused"]))

    def passed(self, bot: str, instance_id: str, held: Held) -> bool:
        with self._write() as db:
            values = {"bot": bot, "me": instance_id, "term": held.term, "nonce": held.nonce}
            return db.execute(PASSED, values).rowcount == 1

    def release(self, bot: str, instance_id: str, held: Held, *, reason: Reason, pass_on: bool, leave: bool) -> bool:
        values = {"bot": bot, "me": instance_id, "reason": str(reason), **_plain(held)}
        with self._write() as db:
            values["now"] = clock.iso(self.wall())
            released = db.execute(RELEASE, values).rowcount == 1
            if released:
                db.execute(CLOSE_TERM, values)
            db.execute(END if leave else SHOW_STANDBY, values)
            if pass_on:
                db.execute(HAND_ON, values)
            return released

    def touch(self, instance_id: str, state: str) -> None:
        with self._write() as db:
            db.execute(TOUCH, {"me": instance_id, "state": state, "now": clock.iso(self.wall())})

    def leave(self, bot: str, instance_id: str, *, reason: Reason, pass_on: bool) -> None:
        values = {"bot": bot, "me": instance_id, "reason": str(reason), "now": clock.iso(self.wall())}
        with self._write() as db:
            db.execute(END, values)
            if pass_on:
                db.execute(HAND_ON, values)

    def overview(self) -> dict[str, Any]:
        self._same_file()
        now = {"now": clock.iso(self.wall())}
        leases = [dict(self._numbers(r, "term", "beat", "ttl")) for r in self.db.execute(LEASES, now)]
        instances = [dict(r) for r in self.db.execute(INSTANCES, now)]
        for row in instances:
            row["is_active"] = bool(row["is_active"])
        for row in leases:
            row["paused"] = bool(row["paused"])
        failures = [dict(r) for r in self.db.execute(FAILURES)]
        return {"leases": leases, "instances": instances, "failures": failures}

    def terms(self, bot: str | None, limit: int) -> list[dict[str, Any]]:
        self._same_file()
        return [dict(self._numbers(r, "term")) for r in self.db.execute(TERMS, {"bot": bot, "limit": limit})]

    def deactivate(self, bot: str | None, instance_id: str | None) -> int:
        with self._write() as db:
            return db.execute(DEACTIVATE, {"bot": bot, "me": instance_id}).rowcount

    def pause(self, bot: str | None, on: bool) -> int:
        with self._write() as db:
            return db.execute(PAUSE, {"bot": bot, "on": on}).rowcount

    def prune(self, bot: str | None, days: float) -> tuple[int, int]:
        with self._write() as db:
            (ttl,) = db.execute("SELECT coalesce(max(ttl), 60) FROM bot_leases").fetchone()
            values = {
                "bot": bot,
                "old": clock.iso(self.wall() - days * 86_400),
                "kept": clock.iso(self.wall() - KEEP_ENDED_DAYS * 86_400),
                "alive": clock.iso(self.wall() - 3 * ttl),  # a standby gives a sign of life once in its ttl only
            }
            instances, terms = (db.execute(statement, values).rowcount for statement in PRUNE)
            return instances, terms

    def promote(self, instance_id: str) -> None:
        with self._write() as db:
            row = db.execute("SELECT ended_at FROM bot_instances WHERE instance_id = ?", (instance_id,)).fetchone()
            if row is None:
                raise StoreRefused(f"no instance {instance_id!r}: see `botlease status`")
            if row["ended_at"] is not None:
                raise StoreRefused(f"instance {instance_id!r} has stopped: see `botlease status` for those that live")
            # Anew, should it have the assignment already, as after a fail-over: else it would be no choice by hand.
            for active in (False, True):
                db.execute("UPDATE bot_instances SET is_active = ? WHERE instance_id = ?", (active, instance_id))


def prepare(path: str) -> None:
    """Make folder and file, and refuse what must not hold a lease."""
    check_place(path, make=True)


def check_place(path: str, *, make: bool = False) -> None:
    """Refuse what must not hold a lease: links, foreign owners, network file systems. ``make`` what is not there."""
    file = Path(path)
    try:
        magic = _file_system(str(next(p for p in file.absolute().parents if p.exists())))
        if magic in NETWORK_FILE_SYSTEMS:
            raise StoreRefused(
                f"{path} is on a network file system ({NETWORK_FILE_SYSTEMS[magic]}), where locks cannot be trusted: "
                "use a local disk, or PostgreSQL for several hosts"
            )
        if make:
            private_folder(file.parent)
        if not os.path.lexists(path):
            if not make:
                return
            with contextlib.suppress(FileExistsError):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                os.fchmod(fd, 0o600)  # a umask of 0777 would leave a file that nobody can open
                os.close(fd)
        # An existing file is never opened here: closing it would drop every POSIX lock that this process holds on it,
        # those of SQLite in the middle of another transaction included.
        found = file.lstat()
        mode = found.st_mode
        if stat.S_ISLNK(mode):
            raise StoreRefused(f"{path} is a symbolic link: name the file itself, or two paths could mean one database")
        if not stat.S_ISREG(mode):
            raise StoreRefused(f"{path} is not a regular file: name a file for the database")
        if found.st_nlink > 1:
            raise StoreRefused(
                f"{path} has a second name (a hard link), which has locks of its own: delete one of them"
            )
        if procfs.is_mounted(file.resolve()):
            raise StoreRefused(
                f"{path} is mounted by itself, so that its journal and its locks lie elsewhere for others: "
                "mount the folder that it is in"
            )
        if found.st_uid not in (0, os.geteuid()):
            raise StoreRefused(f"{path} belongs to another user: run as the same one, or name a file of your own")
        if not os.access(path, os.R_OK | os.W_OK):
            raise StoreRefused(f"cannot write the database file {path}: check its permissions")
    except OSError as e:
        raise StoreRefused(f"cannot write the database file {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise StoreRefused(f"{path!a} cannot be the name of a database file: {e}") from None


def _file_system(path: str) -> int:
    """``f_type`` of statfs(2), which Python does not offer. 0 where it cannot be asked."""
    import ctypes

    try:
        buffer = ctypes.create_string_buffer(256)
        if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer) != 0:
            return 0
    except (AttributeError, OSError):
        return 0
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF if os.uname().sysname == "Linux" else 0


def explain(e: sqlite3.Error, path: str) -> StoreError:
    text = str(e)
    if "readonly" in text or "read-only" in text:
        return StoreRefused(f"the database {path} is read-only: check the permissions of the file and its folder")
    if "malformed" in text:
        return StoreRefused(f"{path} {DAMAGED}")
    if "not a database" in text:
        return StoreRefused(f"{path} is not an SQLite database: name another file")
    return StoreError(f"{path}: {text}")
