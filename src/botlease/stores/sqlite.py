"""SQLite: one host, no server, the standard library's driver.

The verbs are :class:`.sqlitefile.SqliteFile`'s; here they run in a thread of their own, with deadlines, beside the
side-car lock and the watch on the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import stat
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from botlease import clock
from botlease.model import Held, How, Probation, Reason, View
from botlease.stores import Grant, Registration, Renewal, StoreError, StoreRefused, too_late, within
from botlease.stores.inotify import JournalWatch
from botlease.stores.sqlitefile import NOT_OURS, Key, SqliteFile, check_place, explain
from botlease.value import replace

T = TypeVar("T")


class Worker(threading.Thread):
    """Runs one call after another; SQLite blocks, sometimes for seconds, and must never block the loop."""

    def __init__(self) -> None:
        super().__init__(name="botlease-sqlite", daemon=True)
        self.jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            call, future = job
            try:
                result, error = call(), None
            except BaseException as e:
                result, error = None, e
            with contextlib.suppress(RuntimeError):  # the loop was closed while SQLite was busy
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)

    async def call(self, deadline: float, job: Callable[[float], T]) -> T:
        """Run ``job`` here; it is told how many seconds are left. Given up before it began, it never begins."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        give_up = clock.now() + deadline

        def guarded() -> T:
            if future.done():
                raise StoreError("given up before it began")
            return job(max(0.0, give_up - clock.now()))

        self.jobs.put((guarded, future))
        timer = loop.call_later(max(deadline, 0.001), too_late, future, deadline)
        try:
            return await future
        finally:
            timer.cancel()


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class SqliteStore:
    """The store protocol on an SQLite file."""

    def __init__(self, path: str) -> None:
        self.path = str(Path(path).absolute())
        self.url = f"sqlite:///{self.path}"
        self.on_change: Callable[[], None] | None = None
        self._file: SqliteFile | None = None
        self._worker: Worker | None = None
        self._watch: JournalWatch | None = None
        self._own = 0
        self._upgrade = True
        self._guards: dict[str, int] = {}
        self._note = ""  # of the last grant

    async def _call(self, deadline: float, call: Callable[[SqliteFile], T]) -> T:
        if self._worker is None:
            self._worker = Worker()

        def job(left: float) -> T:
            file = self._file
            if file is None:
                began = clock.now()
                file = self._file = SqliteFile(self.path, busy=left * 0.8, upgrade=self._upgrade)
                left = max(0.0, left - (clock.now() - began))
            file.wait_for_locks(left * 0.8)  # a part of the deadline, so that a late write is refused, not late
            try:
                return call(file)
            except sqlite3.Error as e:
                self._reopen()
                raise explain(e, self.path) from None
            except StoreRefused:
                raise
            except StoreError:
                self._reopen()
                raise

        return await self._worker.call(deadline, job)

    def _reopen(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    async def open(self, deadline: float, *, upgrade: bool = True) -> None:
        self._upgrade = upgrade
        await self._call(deadline, lambda f: None)
        if self._watch is None:
            self._watch = JournalWatch.start(self.path, self._changed)

    def _changed(self, commits: int) -> None:
        """``commits`` were seen on the file; our own are not news."""
        own = self._file.commits if self._file is not None else 0
        foreign = commits > own - self._own
        self._own = own
        if foreign and self.on_change is not None:
            self.on_change()

    async def aclose(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._worker is not None:
            with contextlib.suppress(StoreError):
                await self._call(1.0, lambda f: self._reopen())
            self._worker.jobs.put(None)
            self._worker = None
        for fd in self._guards.values():
            os.close(fd)
        self._guards.clear()

    async def register(self, me: Registration, deadline: float) -> View:
        return await self._call(deadline, lambda f: self._saw(me.bot, me.instance_id, f.register(me)))

    async def read(self, bot: str, instance_id: str, deadline: float) -> View:
        return await self._call(deadline, lambda f: self._saw(bot, instance_id, f.read(bot, instance_id)))

    async def claim(self, bot: str, instance_id: str, source: tuple[str, int, int] | None, deadline: float) -> bool:
        return await self._call(deadline, lambda f: f.claim(bot, instance_id, source))

    async def acquire(
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
        probation: Probation,
        deadline: float,
    ) -> Grant | None:
        def call(f: SqliteFile) -> Grant | None:
            # Whoever asks unread for a release has word of some commit, which mostly was a renewal: the side-car lock
            # is still held then, which is found at once and without the one lock of the file.
            unread = how is How.RELEASED and key[3] is not None
            try:
                if not self._take_guard(bot, patience=0 if unread else 20):
                    return None
            except StoreRefused:
                if unread:  # "delete it" is no advice while somebody works: who reads that it is free will say it
                    return None
                raise
            grant = None
            try:
                grant = f.acquire(
                    *(bot, instance_id, key),
                    nonce=nonce,
                    floor=max(floor, self._highest(bot)),
                    origin=origin,
                    how=how,
                    ttl=ttl,
                    proof=proof,
                    probation=probation,
                )
            finally:
                if grant is None:  # denied, or failed: a lock we kept would shut everybody else out
                    self._drop_guard(bot)
            if grant is not None:
                term, *begun = self._begun(bot)
                if begun and int(term) != key[0]:  # of the last work that began the row does not know
                    grant = replace(grant, unknown=(begun[0], begun[1]))
                self._remember(bot, grant.term)
                self._note = f"{grant.term}\n{proof}\n{instance_id}\n"
            return grant

        return await self._call(deadline, call)

    async def renew(
        self, bot: str, instance_id: str, held: Held, beat: int, deadline: float, label: str = ""
    ) -> Renewal | None:
        return await self._call(deadline, lambda f: f.renew(bot, instance_id, held, beat, label))

    async def release(
        self,
        bot: str,
        instance_id: str,
        held: Held,
        *,
        reason: Reason,
        pass_on: bool,
        leave: bool,
        deadline: float,
    ) -> bool:
        def call(f: SqliteFile) -> bool:
            # The work is gone; the successor that our commit wakes must find the side-car lock free.
            self._drop_guard(bot)
            return f.release(bot, instance_id, held, reason=reason, pass_on=pass_on, leave=leave)

        return await self._call(deadline, call)

    async def passed(self, bot: str, instance_id: str, held: Held, deadline: float) -> bool:
        return await self._call(deadline, lambda f: f.passed(bot, instance_id, held))

    async def touch(self, instance_id: str, state: str, deadline: float) -> None:
        await self._call(deadline, lambda f: f.touch(instance_id, state))

    async def leave(self, bot: str, instance_id: str, *, reason: Reason, pass_on: bool, deadline: float) -> None:
        await self._call(deadline, lambda f: f.leave(bot, instance_id, reason=reason, pass_on=pass_on))

    async def overview(self, deadline: float) -> dict[str, Any]:
        from botlease.stores.sqliteinbox import polls

        def call(f: SqliteFile) -> dict[str, Any]:
            found = f.overview() | {"polls": []}
            try:
                return found | {"polls": polls(self.path)}
            except StoreError as e:  # a file of its own: what is wrong with it must not keep an operator from a pause
                return found | {"trouble": str(e)}

        return await self._call(deadline, call)

    async def promote(self, instance_id: str, deadline: float) -> None:
        await self._call(deadline, lambda f: f.promote(instance_id))

    async def terms(self, bot: str | None, limit: int, deadline: float) -> list[dict[str, Any]]:
        return await self._call(deadline, lambda f: f.terms(bot, limit))

    async def deactivate(self, bot: str | None, instance_id: str | None, deadline: float) -> int:
        return await self._call(deadline, lambda f: f.deactivate(bot, instance_id))

    async def pause(self, bot: str | None, on: bool, deadline: float) -> int:
        return await self._call(deadline, lambda f: f.pause(bot, on))

    async def prune(self, bot: str | None, days: float, deadline: float) -> tuple[int, int]:
        return await self._call(deadline, lambda f: f.prune(bot, days))

    async def diagnose(self, deadline: float) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            version = None
            check_place(self.path)
            if Path(self.path).exists():
                began = clock.now()
                with contextlib.closing(sqlite3.connect(f"file:{quote(self.path)}?mode=ro", uri=True)) as db:
                    try:
                        row = db.execute("SELECT version FROM botlease_schema").fetchone()
                        if row is None or not isinstance(row[0], int):
                            raise StoreRefused(NOT_OURS.format(path=self.path))
                        version = row[0]
                    except sqlite3.OperationalError as e:
                        if "no such table" not in str(e):
                            raise explain(e, self.path) from None
                    except sqlite3.Error as e:
                        raise explain(e, self.path) from None
                took = clock.now() - began
            else:
                took = 0.0
            # the folder as well: the rollback journal is made in it
            folder = next(p for p in Path(self.path).parents if p.exists())
            targets = [self.path] * Path(self.path).exists() + [str(folder)]
            missing = [f"write permission for {t}" for t in targets if not os.access(t, os.R_OK | os.W_OK)]
            if str(folder).startswith("/proc"):
                missing.append(f"a disk at {folder}")
            return {
                "server": f"SQLite {sqlite3.sqlite_version}",
                "seconds": took,
                "schema": version,
                "pooled": False,
                "clock": 0.0,
                "missing": missing,
            }

        return await within(deadline, asyncio.to_thread(look), lambda: None)

    # The side-car lock --------------------------------------------------------------------------------------------

    def guard_fd(self, bot: str) -> int | None:
        """Hands the lock over: a supervisor that is stopped must not keep it when its work is long dead."""
        fd = self._guards.pop(bot, None)
        if fd is not None:  # now, and not at the grant: its answer may be lost, and the work of the one before be left
            with contextlib.suppress(OSError):
                note = self._note.encode()
                os.pwrite(fd, note, 20)
                os.ftruncate(fd, 20 + len(note))
        return fd

    def _take_guard(self, bot: str, patience: int = 20) -> bool:
        """Lock ``<file>-<bot>.lock`` for the term, and pass it to the owner of the work. ``patience`` is how often it
        is tried again, each 5 ms.

        It is the second proof beside the row, for what SQLite cannot see: a database file that was deleted
        and created anew while the work of the old one still runs.
        """
        if bot in self._guards:
            return True
        name = f"{quote(bot, safe='')[:100]}-{zlib.crc32(bot.encode()):08x}"
        lock = f"{self.path}-{name}.lock"
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise StoreRefused(f"cannot open the lock {lock}: {e.strerror or e}: delete it") from None
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.geteuid()):
            os.close(fd)
            raise StoreRefused(f"the lock {lock} is no file of ours: delete it")
        for left in range(patience, -1, -1):  # the former owner lets go within milliseconds of its release
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if left:
                    time.sleep(0.005)
            except OSError as e:
                os.close(fd)
                raise StoreError(f"cannot take the lock {lock}: {e.strerror or e}") from None
            else:
                self._guards[bot] = fd
                return True
        os.close(fd)
        return False

    def _saw(self, bot: str, instance_id: str, view: View) -> View:
        """A term whose work has not begun and whose row is gone (the file was replaced) never begins: a lock kept for
        it would shut everybody else out for as long as we live."""
        if bot in self._guards and (view.lease is None or view.lease.holder != instance_id):
            self._drop_guard(bot)
        return view

    def _highest(self, bot: str) -> int:
        """The highest term that was ever granted here. A file that was deleted, or restored from a backup, would hand
        out terms a second time, and whoever fences by them would take the newer one for the older."""
        noted = os.pread(self._guards[bot], 20, 0).strip()
        return int(noted) if noted.isdigit() and len(noted) < 19 else 0

    def _begun(self, bot: str) -> list[str]:
        """Term, proof and instance of the last work that began under this lock. An earlier version did not write it."""
        said = os.pread(self._guards[bot], 4096, 20).decode(errors="replace").splitlines()
        return said if len(said) == 3 and said[0].isdigit() else [""]

    def _remember(self, bot: str, term: int) -> None:
        with contextlib.suppress(OSError):  # a full disk; the term itself is in the database
            os.pwrite(self._guards[bot], b"%-19d\n" % term, 0)

    def _drop_guard(self, bot: str) -> None:
        fd = self._guards.pop(bot, None)
        if fd is not None:
            os.close(fd)
