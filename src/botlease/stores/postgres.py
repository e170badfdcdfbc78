"""PostgreSQL 13 or newer, directly or behind PgBouncer in transaction mode.

One connection, no pool, no session state that safety depends on: every verb is one autocommitted
statement. Behind a transaction pooler there is no LISTEN, so waking is by polling; whether there is a
pooler is found out by itself: it answers with a process id that is not the server's own.

No call outlasts its deadline: asyncpg is awaited by :func:`botlease.stores.within` and the connection is
``terminate()``d, since a driver's own cancellation can wait for a dead peer (asyncpg issue 1326).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, Final, TypeVar

import asyncpg

from botlease import clock
from botlease.model import TRIES, Held, How, Probation, Reason, View
from botlease.stores import (
    KEEP_ENDED_DAYS,
    SCHEMA_VERSION,
    Grant,
    Late,
    Registration,
    Renewal,
    StoreEmpty,
    StoreError,
    StoreRefused,
    make_view,
    older,
    within,
)
from botlease.stores.postgressql import (
    ACQUIRE,
    CLAIM,
    DEACTIVATE,
    FAILURES,
    INSTANCES,
    LEASES,
    LEAVE,
    NO_TIMELINE,
    PASSED,
    PAUSE,
    PROMOTE,
    PRUNE,
    READ,
    REGISTER,
    RELEASE,
    RENEW,
    RENEW_AND_TOUCH,
    TERMS,
    TIMELINE,
    TOUCH,
    WARM,
)
from botlease.text import passwords, safe, shown

T = TypeVar("T")
Key = tuple[int, int, str, str | None]
CHANNEL: Final = "botlease"
PRIVILEGES: Final = {
    "bot_instances": "SELECT INSERT UPDATE DELETE",
    "bot_terms": "SELECT INSERT UPDATE DELETE",
    "bot_leases": "SELECT INSERT UPDATE",
    "bot_polls": "SELECT INSERT UPDATE",
    "bot_updates": "SELECT INSERT UPDATE DELETE",
    "bot_deployments": "SELECT INSERT UPDATE",
    "bot_failures": "SELECT",
    "botlease_schema": "SELECT",
}
"""What a role needs that only runs bots, where another one has made the tables."""

CONNECT_LIMIT: Final = 10.0
HOST_LIMIT: Final = 3.0
"""Seconds for one of several hosts: three of them fit into the limit for all."""
PLAN_AHEAD: Final = 0.2
"""Seconds after a registration or a read: whoever starts has something better to do than to plan."""


class PostgresStore:
    """The store protocol on one PostgreSQL connection."""

    def __init__(self, url: str) -> None:
        self._dsn = url
        self._hosts = one_by_one(url)
        self.url = shown(url)
        self.on_change: Callable[[], None] | None = None
        self.heard: Callable[[str], None] | None = None
        """Called with what a notification names: a bot or a fleet."""
        self.listens = True
        """Whether to be told of changes; to be set before the first call."""
        self.pooled = False
        self._bot = ""  # that was registered
        self._connection: asyncpg.Connection | None = None
        self._connecting: asyncio.Task[asyncpg.Connection] | None = None
        self._closed = False
        self._server_pid = 0
        self._limited = 0
        self._prepares = self._plans = True
        self._prepared: dict[str, Any] = {}
        self._planning: asyncio.TimerHandle | None = None
        self._held = False  # somebody had the lease, when we looked last
        self._later: asyncio.Future[None] | None = None
        self._lock = asyncio.Lock()
        self._asking = 0  # calls that have it or wait for it
        self.system = ""
        self._timeline = TIMELINE
        self._filled: dict[str, str] = {}  # statements, with this timeline in them

    # Connection --------------------------------------------------------------------------------------------------

    async def call(
        self, deadline: float, call: Callable[[asyncpg.Connection], Awaitable[T]], connecting: float = 0.25
    ) -> T:
        """``connecting``: the part of the deadline after which a connection that was just made is left for the next
        attempt, as a statement begun so late would be cut off, and the new connection with it."""

        async def work() -> T:
            connection = self._connection
            if self._closed:  # while this call waited for the one before it
                raise StoreError("the store is closed")
            if connection is None or connection.is_closed():
                connection = await self._connected()
                if clock.now() - began > deadline * connecting:
                    raise StoreError("connected; too late to ask within this attempt")
            await self._limit(connection, deadline)
            return await call(connection)

        began = clock.now()
        self._asking += 1
        try:
            if self._asking == 1:
                await self._lock.acquire()  # nobody has it, nobody waits for it: no time-out is needed
            else:
                async with asyncio.timeout(deadline):
                    await self._lock.acquire()
        except BaseException as e:
            self._asking -= 1
            if isinstance(e, TimeoutError):
                raise Late(deadline) from None
            raise
        try:
            return await within(deadline - (clock.now() - began), work(), self._drop)
        except StoreError:
            raise
        except Exception as e:
            # asyncpg has errors of its own outside PostgresError when a connection dies under a query; and a server
            # that turned read-only or into a standby must be looked up anew.
            moved = isinstance(
                e,
                asyncpg.ReadOnlySQLTransactionError
                | asyncpg.ObjectNotInPrerequisiteStateError
                | asyncpg.InvalidCachedStatementError,  # somebody has altered the tables
            )
            if isinstance(e, asyncpg.InvalidSQLStatementNameError | asyncpg.DuplicatePreparedStatementError):
                moved, self._prepares = True, False  # a pooler that passes for a server
            c = self._connection
            if isinstance(e, asyncpg.ReadOnlySQLTransactionError | asyncpg.ObjectNotInPrerequisiteStateError):
                self._next_host()
            if moved or not isinstance(e, asyncpg.PostgresError) or (c and (c.is_closed() or c.is_in_transaction())):
                self._drop()
            raise _explain(e, self._dsn) from None
        finally:
            self._asking -= 1
            self._lock.release()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()

    async def _connected(self) -> asyncpg.Connection:
        """Connecting takes several round trips and may take longer than one attempt: it goes on across attempts, or a
        slow link would never be connected again (measured: never at 150 ms a round trip)."""
        if self._connecting is None or self._connecting.done():
            over = asyncio.Event()
            self._connecting = asyncio.ensure_future(within(CONNECT_LIMIT, self._connect(over), over.set))
            self._connecting.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        return await asyncio.shield(self._connecting)

    async def _connect(self, over: asyncio.Event) -> asyncpg.Connection:
        """Host by host, where the URL names several, and the one that answered last first. The driver has one limit for
        all of them (asyncpg issue 1155): where the first one takes packets and says nothing, as a machine does that
        has lost its power, it would never come to the second. ``over``: nobody waits for it any more; the driver may
        finish all the same."""
        if len(self._hosts) == 1:
            return await self._connect_to(self._hosts[0], CONNECT_LIMIT, over.is_set)
        refusal: StoreRefused | None = None
        for left in range(len(self._hosts) - 1, -1, -1):
            late = asyncio.Event()

            def useless(late: asyncio.Event = late) -> bool:
                return late.is_set() or over.is_set()

            try:
                return await within(HOST_LIMIT, self._connect_to(self._hosts[0], HOST_LIMIT, useless), late.set)
            except Exception as e:
                self._next_host()
                if refusal is None and isinstance(e, StoreRefused):  # of a primary, perhaps: then it is worth more
                    refusal = e
                if not left or over.is_set():
                    raise refusal or e from None
            except BaseException:  # the limit for all of them is over, and this one took it
                self._next_host()
                raise
        raise AssertionError("a URL names a host")

    def _next_host(self) -> None:
        self._hosts.append(self._hosts.pop(0))

    async def _connect_to(self, url: str, limit: float, over: Callable[[], bool]) -> asyncpg.Connection:
        connection = await asyncpg.connect(
            url,
            timeout=limit,
            statement_cache_size=0,  # prepared statements break behind a transaction pooler (measured)
            server_settings={"application_name": "botlease", "timezone": "UTC"},
        )
        try:
            pid = await self._identify(connection)
            self._server_pid = connection.get_server_pid()
            self.pooled = pid != self._server_pid
            if self.listens and not self.pooled:
                await connection.add_listener(CHANNEL, self._notified)
            if not self.pooled:
                with contextlib.suppress(asyncpg.PostgresError):  # not everything that speaks the protocol has it
                    await connection.execute("SET plan_cache_mode = 'force_generic_plan'")
            if over():
                raise StoreError("connected, and closed meanwhile")
        except BaseException:
            connection.terminate()
            raise
        self._connection, self._limited, self._prepared = connection, 0, {}
        return connection

    async def _row(self, connection: asyncpg.Connection, sql: str, *args: Any) -> Any:
        """The first row of a statement that is asked often, or whose answer somebody waits for. It is planned once for
        each connection (planning takes two thirds of the time of an acquire: measured), but not behind a pooler, where
        the next one may go to another server process."""
        if not self._prepares or self.pooled:
            return await connection.fetchrow(sql, *args)
        if sql not in self._prepared:
            # Named after its text: should the next transaction be another server's, no name means something else there.
            name = f"botlease_{blake2b(sql.encode(), digest_size=8).hexdigest()}"
            self._prepared[sql] = await connection.prepare(sql, name=name)
        return await self._prepared[sql].fetchrow(*args)

    async def _plan_ahead(self) -> None:
        """At a handover there is no time to plan its statements, nor to load what their triggers need: the first ones
        of a connection take 4 to 8 ms each, the next ones 1 to 2 (measured). So they are asked once, about a bot that
        cannot be, and the triggers fire once."""
        nothing = ("", "")

        async def work(c: asyncpg.Connection) -> None:
            none = (0, 0, "", None, 0, "", 1.0, "", "", "", "", "")
            await self._row(c, self.filled(ACQUIRE), *nothing, *none)
            await self._row(c, RELEASE, *nothing, 0, "", "", False, False, ())
            await c.execute(WARM)

        try:
            # as the last call: another limit would have to be set, and set back by a handover
            await self.call((self._limited or 800) / 800, work)
        except StoreError:
            self._plans = False  # it costs a connection where the line is slow: once, and never again

    async def _limit(self, connection: asyncpg.Connection, deadline: float) -> None:
        """A lock wait must end before we give up, so that a late statement cannot succeed behind our back. Behind a
        pooler a setting would stay with somebody else's connection."""
        ms = int(deadline * 800)
        if not self.pooled and ms != self._limited:
            await connection.execute(f"SET lock_timeout = {ms}; SET statement_timeout = {ms}")
            self._limited = ms

    async def _identify(self, connection: asyncpg.Connection) -> int:
        """Which database this is, and the process id of the server."""
        about = "pg_backend_pid() AS pid, current_setting('server_version_num')::int AS version"
        for system, timeline in (
            ("(SELECT system_identifier::text FROM pg_control_system())", TIMELINE),
            ("current_database()::text", TIMELINE),
            ("current_database()::text", NO_TIMELINE),
        ):
            try:
                row = await connection.fetchrow(f"SELECT {about}, {system} AS system, {timeline} AS timeline")
            except asyncpg.ObjectNotInPrerequisiteStateError:
                raise StoreError(f"{self.url} is a standby server: connect to the primary") from None
            except (
                asyncpg.InsufficientPrivilegeError,
                asyncpg.UndefinedFunctionError,
                asyncpg.FeatureNotSupportedError,
            ):
                continue  # some hosted PostgreSQL do not have these functions
            assert row is not None
            if row["version"] < 130_000:
                raise StoreRefused(f"PostgreSQL {row['version'] // 10_000} is too old: 13 or newer is needed")
            self.system, self._timeline, self._filled = f"{row['system']}/", timeline, {}
            return int(row["pid"])
        raise StoreError(f"{self.url} does not say which database it is")

    def _notified(self, _: object, pid: int, channel: str, about: object) -> None:
        name = str(about)
        # One channel for all bots: whoever has registered one does not look up from its work for another's, or each of
        # ten thousand would read at every change of any. No name: an edit of a row that has none.
        ours = pid == self._server_pid  # of which the answer says more
        if self.on_change is not None and not ours and (not self._bot or name in (self._bot, "")):
            self.on_change()
        if self.heard is not None:
            self.heard(name)

    def filled(self, text: str) -> str:
        known = self._filled.get(text)
        if known is None:
            era = f"('x' || {self._timeline})::bit(32)::bigint * 1000000"
            known = text.replace("{timeline}", self._timeline).replace("{era}", era).replace("{tries}", str(TRIES))
            self._filled[text] = known
        return known

    async def open(self, deadline: float, *, upgrade: bool = True) -> None:
        async def work(connection: asyncpg.Connection) -> None:
            try:
                version = await connection.fetchval("SELECT version FROM botlease_schema")
            except asyncpg.UndefinedTableError:
                version = 0  # none yet
            except asyncpg.UndefinedColumnError:
                version = None
            if not isinstance(version, int):
                from botlease.stores.postgresschema import OWN_SCHEMA

                raise StoreRefused(f"botlease_schema in {self.url} is not ours: {OWN_SCHEMA}")
            if not upgrade and version == 0:
                raise StoreEmpty(f"there are no tables of botlease at {self.url}: nothing has run there yet")
            if not upgrade and version < SCHEMA_VERSION:
                raise StoreRefused(f"{self.url}: {older(version)}")
            if version < SCHEMA_VERSION:
                await self._migrate(connection)
            elif version > SCHEMA_VERSION:
                raise StoreRefused(
                    f"{self.url} was set up by a newer botlease (schema {version}, this one knows {SCHEMA_VERSION}): "
                    "upgrade this one"
                )

            await connection.execute("SELECT 1 FROM bot_failures LIMIT 0")  # a role without it could not read a lease

        self._closed = False
        # Nothing was asked yet, and the deadline is long: a server against which a hundred start is slow to connect.
        await self.call(deadline, work, connecting=0.8)

    async def aclose(self) -> None:
        self.on_change, self._closed = None, True
        if self._planning is not None:
            self._planning.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})  # it ends at once; until then a connection may still be made
        if self._later is not None and not self._later.done():
            self._later.cancel()
            await asyncio.wait({self._later}, timeout=0.1)
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            with contextlib.suppress(Exception):
                # close() alone can wait for ever on a dead peer
                await within(0.5, connection.close(timeout=0.4), connection.terminate)
            if not connection.is_closed():
                connection.terminate()  # a call was in hand, and it would not be closed

    async def _migrate(self, connection: asyncpg.Connection) -> None:
        from botlease.stores import postgresschema

        await postgresschema.migrate(
            connection,
            postgresschema.Target(
                self.url, self.system, self._timeline, lambda e: _first(e, self._dsn), self._rehearse
            ),
        )

    async def _rehearse(self, connection: asyncpg.Connection) -> None:
        """A table that we adopted can have rules, checks, triggers and types that nobody thought of. So a whole life is
        lived on it, and taken back: better refused now than at the first handover."""
        bot, me, nonce = "rehearsal", f"rehearsal-{os.urandom(4).hex()}", os.urandom(8).hex()
        undo = connection.transaction()
        await undo.start()
        await connection.execute(
            self.filled(REGISTER), *(bot, me, me, "", 0, "", self.system, nonce, 1.0, KEEP_ENDED_DAYS)
        )
        view = await self._view(connection, bot, me)
        went = view.lease is not None and await connection.fetchval(CLAIM, bot, me, None, 0, 0)
        if view.lease is not None and went:
            grant = (0, nonce, 1.0, self.system, "", str(How.RELEASED), str(Probation.ON), view.origin)
            row = await connection.fetchrow(self.filled(ACQUIRE), bot, me, *view.lease.key, *grant)
            term = row["term"] if row else 0
            went = await connection.fetchrow(self.filled(RENEW), bot, me, term, nonce, (0,), 1)
            went = went and await connection.fetchval(PASSED, bot, me, term, nonce)
            await connection.execute(TOUCH, me, "standby")
            end = (str(Reason.STOPPED), True, True, (1,))
            went = went and await connection.fetchval(RELEASE, bot, me, term, nonce, *end)
        from botlease.stores.postgresinbox import POLLS  # a supervisor needs no inbox: 3 ms of a start

        for statement in (LEASES, INSTANCES, FAILURES, POLLS):
            await connection.fetch(statement)
        await undo.rollback()
        if not went:
            raise asyncpg.DataError("its rules or triggers change what is written")

    # Verbs -------------------------------------------------------------------------------------------------------

    async def _view(self, connection: asyncpg.Connection, bot: str, instance_id: str) -> View:
        row = await self._row(connection, self.filled(READ), bot, instance_id)
        assert row is not None
        return make_view(row, self.system + row["timeline"], int(row["timeline"], 16) * 1_000_000)

    async def register(self, me: Registration, deadline: float) -> View:
        async def work(c: asyncpg.Connection) -> View:
            await c.execute(
                self.filled(REGISTER),
                *(me.bot, me.instance_id, me.deployment, me.host, me.pid, me.version, self.system),
                *(os.urandom(8).hex(), me.ttl, KEEP_ENDED_DAYS),
            )
            return await self._view(c, me.bot, me.instance_id)

        self._bot = me.bot
        view = await self.call(deadline, work)
        self._plan_soon(view)
        return view

    async def read(self, bot: str, instance_id: str, deadline: float) -> View:
        view = await self.call(deadline, lambda c: self._view(c, bot, instance_id))
        self._plan_soon(view)
        return view

    def _plan_soon(self, view: View) -> None:
        self._held = view.lease is not None and view.lease.holder is not None
        if not self._planned() and self._planning is None:
            self._planning = asyncio.get_running_loop().call_later(PLAN_AHEAD, self._plan)

    def _planned(self) -> bool:
        done = self.filled(ACQUIRE) in self._prepared and RELEASE in self._prepared
        return done or self.pooled or not self._prepares or not self._plans

    def _plan(self) -> None:
        self._planning = None
        if not self._planned():
            self._later = asyncio.ensure_future(self._plan_ahead())

    async def claim(self, bot: str, instance_id: str, source: tuple[str, int, int] | None, deadline: float) -> bool:
        async def work(c: asyncpg.Connection) -> bool:
            try:
                return bool((await self._row(c, CLAIM, bot, instance_id, *(source or (None, 0, 0))))[0])
            except (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError):
                return False  # rolled back: an operator's edit of this very moment was quicker

        if self._held and not self._planned():
            # Somebody works, and goes on working while we plan; as soon as we have asked for the handover nobody may. A
            # newcomer's first acquire took 8 ms of 20 in which nobody worked (measured).
            await self._plan_ahead()
        return await self.call(deadline, work)

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
        row = await self.call(
            deadline,
            lambda c: self._row(
                c,
                self.filled(ACQUIRE),
                *(bot, instance_id, *key, floor, nonce, ttl, self.system, proof, str(how)),
                str(probation),
                origin,
            ),
        )
        return Grant(row["term"], row["origin"]) if row else None

    async def renew(
        self, bot: str, instance_id: str, held: Held, beat: int, deadline: float, label: str = ""
    ) -> Renewal | None:
        sql, last = (self.filled(RENEW_AND_TOUCH), (beat, label)) if label else (self.filled(RENEW), (beat,))
        row = await self.call(deadline, lambda c: self._row(c, sql, bot, instance_id, *held, *last))
        if row is None:
            return None
        return Renewal(row["assigned"], row["vacant"], self.system + row["timeline"], row["paused"])

    async def passed(self, bot: str, instance_id: str, held: Held, deadline: float) -> bool:
        return bool(await self.call(deadline, lambda c: c.fetchval(PASSED, bot, instance_id, held.term, held.nonce)))

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
        end = (*held[:2], str(reason), pass_on, leave, held.beats)
        row = await self.call(deadline, lambda c: self._row(c, RELEASE, bot, instance_id, *end))
        return bool(row["released"])

    async def touch(self, instance_id: str, state: str, deadline: float) -> None:
        await self.call(deadline, lambda c: self._row(c, TOUCH, instance_id, state))

    async def leave(self, bot: str, instance_id: str, *, reason: Reason, pass_on: bool, deadline: float) -> None:
        await self.call(deadline, lambda c: c.execute(LEAVE, bot, instance_id, str(reason), pass_on))

    async def overview(self, deadline: float) -> dict[str, Any]:
        from botlease.stores.postgresinbox import POLLS

        async def work(c: asyncpg.Connection) -> dict[str, Any]:
            return {
                "leases": [dict(r) for r in await c.fetch(LEASES)],
                "instances": [dict(r) for r in await c.fetch(INSTANCES)],
                "failures": [dict(r) for r in await c.fetch(FAILURES)],
                "polls": [dict(r) for r in await c.fetch(POLLS)],
            }

        return await self.call(deadline, work)

    async def promote(self, instance_id: str, deadline: float) -> None:
        async def work(c: asyncpg.Connection) -> None:
            row = await c.fetchrow("SELECT ended_at FROM bot_instances WHERE instance_id = $1", instance_id)
            if row is None:
                raise StoreRefused(f"no instance {instance_id!r}: see `botlease status`")
            if row["ended_at"] is not None:
                raise StoreRefused(f"instance {instance_id!r} has stopped: see `botlease status` for those that live")
            for last in (False, False, False, True):
                try:
                    async with c.transaction():
                        for statement in PROMOTE:
                            await c.execute(statement, *([instance_id] if "$1" in statement else []))
                    return
                except (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError):
                    if last:  # a claim of this very moment was quicker, four times
                        raise StoreError("others are changing the assignment just now: try again") from None

        await self.call(deadline, work)

    async def terms(self, bot: str | None, limit: int, deadline: float) -> list[dict[str, Any]]:
        return [dict(r) for r in await self.call(deadline, lambda c: c.fetch(TERMS, bot, limit))]

    async def deactivate(self, bot: str | None, instance_id: str | None, deadline: float) -> int:
        return _count(await self.call(deadline, lambda c: c.execute(DEACTIVATE, bot, instance_id)))

    async def pause(self, bot: str | None, on: bool, deadline: float) -> int:
        return _count(await self.call(deadline, lambda c: c.execute(PAUSE, bot, on)))

    async def prune(self, bot: str | None, days: float, deadline: float) -> tuple[int, int]:
        async def work(c: asyncpg.Connection) -> tuple[int, int]:
            instances, terms = [_count(await c.execute(statement, bot, days * 86_400)) for statement in PRUNE]
            while more := _count(await c.execute(PRUNE[1], bot, days * 86_400)) if terms else 0:
                terms += more
            return instances, terms

        return await self.call(deadline, work)

    async def diagnose(self, deadline: float) -> dict[str, Any]:
        async def work(c: asyncpg.Connection) -> dict[str, Any]:
            await c.fetchval("SELECT 1")
            began, wall = clock.now(), clock.wall()
            database = await c.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            took = clock.now() - began
            known = await c.fetchval("SELECT to_regclass('botlease_schema') IS NOT NULL")
            if known:
                needed = await c.fetch(
                    "SELECT p.kind || ' ON ' || t.name AS what FROM jsonb_each_text($1::jsonb) t(name, kinds), "
                    "unnest(string_to_array(t.kinds, ' ')) p(kind) "
                    # of an older version some are not there yet
                    "WHERE NOT has_table_privilege(to_regclass(t.name), p.kind)",
                    json.dumps(PRIVILEGES),
                )
                missing = [r["what"] for r in needed]
                # PUBLIC's by default; some revoke that
                claim = "botlease_claim(text, text, text, bigint, bigint)"
                may = "coalesce(has_function_privilege(to_regprocedure($1), 'EXECUTE'), TRUE)"
                if not await c.fetchval(f"SELECT {may}", claim):
                    missing.append(f"EXECUTE ON FUNCTION {claim}")
            else:
                may = "has_schema_privilege(current_schema(), 'CREATE')"
                missing = [] if await c.fetchval(f"SELECT coalesce({may}, FALSE)") else ["CREATE ON the schema"]
            readable = known and not any("botlease_schema" in m for m in missing)
            schema = await c.fetchval("SELECT version FROM botlease_schema") if readable else None
            owner = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('bot_leases')"
            if schema is not None and schema < SCHEMA_VERSION and not await c.fetchval(owner):
                missing.append("ownership of the tables, which an upgrade of them needs")
            return {
                "server": f"PostgreSQL {await c.fetchval('SHOW server_version')}",
                "seconds": took,
                "schema": schema,
                "pooled": self.pooled,
                "clock": database - (wall + took / 2),
                "missing": missing,
            }

        return await self.call(deadline, work)

    def guard_fd(self, bot: str) -> int | None:
        return None


def _count(tag: str) -> int:
    """How many rows, from the server's "UPDATE 3"."""
    return int(tag.split()[-1])


def one_by_one(url: str) -> list[str]:
    """A URL for each of the hosts that this one names. (Where one of them, or their ports, stand in the environment, it
    is the driver's to put them together.)"""
    scheme, _, rest = url.partition("://")
    end = min(rest.find(c) % (len(rest) + 1) for c in "/?#")  # -1: none, and so the end
    who, at, hosts = rest[:end].rpartition("@")
    if not all(hosts.split(",")) or "," in os.environ.get("PGPORT", ""):
        return [url]
    return [f"{scheme}://{who}{at}{host}{rest[end:]}" for host in hosts.split(",")]


NO_URL: Final = (
    "the database URL is not valid: it should read postgresql://user@host:5432/name, and in the password @ : / ? # and "
    "blanks are written as %40 %3A %2F %3F %23 %20"
)


def _explain(e: Exception, url: str) -> StoreError:
    where = shown(url).partition("://")[2].rpartition("@")[2].partition("?")[0]
    if not where or where == "***":  # an odd name, which may be a piece of a password
        where = "the address in the database URL"
        rest = url.partition("://")[2]
        if isinstance(e, OSError) and "@" in rest and "@" not in re.split("[/?#]", rest, maxsplit=1)[0]:
            return StoreRefused(NO_URL)  # it is one: what stands before the @ was a password with one of these in it
    said = _first(e, url)
    match e:
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            return StoreRefused(f"PostgreSQL at {where} refused the login: check user and password in the database URL")
        case asyncpg.InvalidCatalogNameError():
            return StoreRefused(f"PostgreSQL at {where} has no such database: create it, or correct the database URL")
        case asyncpg.InsufficientPrivilegeError():
            return StoreRefused(f'PostgreSQL at {where}: {said}: grant it, see docs/design.md, "Privileges"')
        case asyncpg.UndefinedObjectError() | asyncpg.CantChangeRuntimeParamError():
            return StoreRefused(f"PostgreSQL at {where}: {said}: correct the parameters of the database URL")
        case asyncpg.ReadOnlySQLTransactionError():
            return StoreError(f"PostgreSQL at {where} is read-only: connect to the primary")
        case OSError():
            return StoreError(f"cannot reach PostgreSQL at {where}: {said}")
        case ValueError():
            return StoreRefused(NO_URL)  # its text would quote a piece of the URL, which may be the password
    return StoreError(f"PostgreSQL at {where}: {said}")


def _first(e: Exception, url: str) -> str:
    text = str(e)
    for secret in passwords(url):  # a pooler may quote what it was sent
        text = text.replace(secret, "***")
    return safe(re.sub(r"\s+", " ", text)).strip().split(" HINT")[0] or type(e).__name__
