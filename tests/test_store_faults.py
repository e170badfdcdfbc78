"""What a call to a store has done, and how long it takes, when the network, the server or the disk fails in the middle
of it: at every message of PostgreSQL's protocol, and at every write of SQLite's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import BOTLEASE, World, clean_env, until
from proxy import ASKS, Link, Proxy
from servers import PgBouncer, has_pgbouncer
from test_stores import run_sql

from botlease.model import Held, How, Lease, Probation, Reason
from botlease.stores import Store, StoreError, StoreRefused, open_store
from botlease.stores.postgres import PostgresStore
from botlease.testing import DEADLINE, lease_of, registration

SHORT = 0.4
"""Seconds: the deadline of a call that will not be answered."""
LONGEST = 200
"""More messages than any call has, connecting included."""

# PostgreSQL: every message ----------------------------------------------------------------------------------------


@dataclass
class Case:
    """One bot, prepared so that a verb has something to do."""

    direct: Store
    bot: str
    held: Held = field(default_factory=lambda: Held(0, ""))
    lease: Lease | None = None
    origin: str = ""
    state: str = ""

    async def prepare(self, verb: str) -> Case:
        if verb == "register":
            return self
        view = await self.direct.register(registration("a" + self.bot, bot=self.bot), DEADLINE)
        self.lease, self.origin = lease_of(view), view.origin
        if verb == "claim":
            return self
        assert await self.direct.claim(self.bot, "a" + self.bot, None, DEADLINE)
        if verb in ("acquire", "leave", "touch", "deactivate"):
            return self
        grant = await self.acquire(self.direct, DEADLINE)
        assert grant is not None
        self.held = Held(grant.term, "n")
        if verb == "promote":
            await self.direct.register(registration("b" + self.bot, "d2", self.bot), DEADLINE)
        if verb == "acquire unread":
            self.lease = (await self.direct.read(self.bot, "a" + self.bot, DEADLINE)).lease
            gone: Any = {"reason": Reason.SUPERSEDED, "pass_on": False, "leave": False, "deadline": DEADLINE}
            assert await self.direct.release(self.bot, "a" + self.bot, self.held, **gone)
        return self

    async def acquire(self, store: Store, deadline: float, nonce: str = "n") -> Any:
        assert self.lease is not None
        return await store.acquire(
            *(self.bot, "a" + self.bot, self.lease.key),
            nonce=nonce,
            floor=0,
            origin=self.origin,
            how=How.RELEASED,
            ttl=10.0,
            proof="p",
            probation=Probation.ON,
            deadline=deadline,
        )

    async def call(self, verb: str, store: Store, deadline: float) -> object:
        me = "a" + self.bot
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "register": lambda: store.register(registration(me, bot=self.bot), deadline),
            "claim": lambda: store.claim(self.bot, me, None, deadline),
            "acquire": lambda: self.acquire(store, deadline),
            "acquire unread": lambda: self.acquire(store, deadline, "m"),
            "renew and touch": lambda: store.renew(self.bot, me, self.held, 77, deadline, label="active"),
            "touch": lambda: store.touch(me, "warming", deadline),
            "promote": lambda: store.promote("b" + self.bot, deadline),
            "deactivate": lambda: store.deactivate(self.bot, None, deadline),
            "pause": lambda: store.pause(self.bot, True, deadline),
            "renew": lambda: store.renew(self.bot, me, self.held, 77, deadline),
            "passed": lambda: store.passed(self.bot, me, self.held, deadline),
            "release": lambda: store.release(
                self.bot, me, self.held, reason=Reason.STOPPED, pass_on=False, leave=False, deadline=deadline
            ),
            "leave": lambda: store.leave(self.bot, me, reason=Reason.STOPPED, pass_on=False, deadline=deadline),
        }
        return await calls[verb]()

    async def done(self, verb: str) -> bool:
        view = await self.direct.read(self.bot, "a" + self.bot, DEADLINE)
        lease = view.lease
        overview = await self.direct.overview(DEADLINE)
        self.state = next((r["state"] for r in overview["instances"] if r["instance_id"] == "a" + self.bot), "")
        return {
            "register": lambda: view.generation > 0,
            "claim": lambda: view.assigned is not None,
            "acquire": lambda: lease is not None and lease.holder is not None,
            "acquire unread": lambda: lease is not None and lease.nonce == "m",
            "renew": lambda: lease is not None and lease.beat == 77,
            "renew and touch": lambda: lease is not None and lease.beat == 77,
            "touch": lambda: self.state == "warming",
            "promote": lambda: view.assigned is not None and view.assigned.instance_id == "b" + self.bot,
            "deactivate": lambda: view.assigned is None,
            "pause": lambda: view.paused,
            "passed": lambda: view.probation is Probation.PASSED,
            "release": lambda: lease is not None and lease.holder is None,
            "leave": lambda: view.ended,
        }[verb]()


VERBS = ("register", "claim", "acquire", "acquire unread", "renew", "renew and touch", "passed", "release", "leave")
OTHERS = ("touch", "promote", "deactivate", "pause")
SILENT = ("leave", "touch", "promote")
"""What answers nothing, when it is done."""


async def consistent(url: str, bot: str) -> None:
    """Lease and journal say the same: nothing is half done."""
    rows = await run_sql(  # in one statement: what was asked before the cut may be done just now
        url,
        f"SELECT 'lease', term, holder FROM bot_leases WHERE bot = '{bot}' AND holder IS NOT NULL UNION ALL "
        f"SELECT 'term', term, instance_id FROM bot_terms WHERE bot = '{bot}' AND released_at IS NULL",
    )
    kinds = [[(r[1], r[2]) for r in rows if r[0] == kind] for kind in ("lease", "term")]
    assert kinds[0] == kinds[1]


def at_message(number: int, do: Callable[[Link], bool]) -> tuple[Callable[[Link, str, bytes], bool], list[int]]:
    """Do something at the so-manieth message from now on, whoever sends it."""
    count = [0]

    def hook(link: Link, direction: str, message: bytes) -> bool:
        count[0] += 1
        return do(link) if count[0] == number else True

    return hook, count


@pytest.fixture
def lag() -> Iterator[list[float]]:
    """By how much this machine let a thread come late meanwhile: no call can be better. Not the loop: a driver that
    blocks it would make its own excuse."""
    late, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            asked = time.monotonic()
            time.sleep(0.01)
            late.append(time.monotonic() - asked - 0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield late
    finally:
        over.set()
        watching.join()


@pytest.fixture
async def direct(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    yield store
    await store.aclose()


async def connected(url: str, port: int) -> PostgresStore:
    """A store that has nothing left to ask for itself."""
    store = PostgresStore(url.replace(str(port_of(url)), str(port)))
    store.listens = False  # its messages come when they like
    await store.open(DEADLINE)
    await store.read("x", "x", DEADLINE)
    # the first use of an array makes the driver ask for its type
    await store.renew("x", "x", Held(0, ""), 1, DEADLINE)
    await store.release("x", "x", Held(0, ""), reason=Reason.STOPPED, pass_on=False, leave=False, deadline=DEADLINE)
    await store._plan_ahead()  # which it would do half a second after the read, in the middle of the test
    return store


def port_of(url: str) -> int:
    return int(url.split(":")[-1].split("/")[0])


ROADS = ("direct", "connecting", "before a pooler", "behind a pooler")


@contextlib.asynccontextmanager
async def road(kind: str, url: str) -> AsyncIterator[tuple[Proxy, Callable[[], Awaitable[PostgresStore]]]]:
    """A proxy on the way to the server, and how to make a store that goes this way. "connecting": the store has lost
    its connection, so that the messages of making one count too."""
    if "pooler" in kind and not has_pgbouncer():
        pytest.skip("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
    async with contextlib.AsyncExitStack() as over:
        port = port_of(url)
        if kind == "before a pooler":
            pooler = PgBouncer(port, 2)
            over.callback(pooler.stop)
            port = pooler.port
        proxy = await over.enter_async_context(Proxy(port))
        port = proxy.port
        if kind == "behind a pooler":
            pooler = PgBouncer(port, 2)
            over.callback(pooler.stop)
            port = pooler.port

        async def new() -> PostgresStore:
            store = await connected(url, port)
            if kind == "connecting":
                store._drop()
            return store

        yield proxy, new


WAYS = [
    *(("direct", verb) for verb in (*VERBS, *OTHERS)),
    ("connecting", "acquire"),
    *((way, verb) for way in ROADS[2:] for verb in ("acquire", "release")),
]
MOST = (("direct", "acquire"), ("direct", "renew"), ("direct", "release"))
"""Of the ways, for a test that has to wait out a deadline for each message: the others are done with the long ones."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("way", "verb"), WAYS)
async def test_a_connection_cut_at_any_message_leaves_the_verb_done_or_not_and_never_half(
    direct: PostgresStore, postgres_url: str, way: str, verb: str
) -> None:
    def before(link: Link) -> bool:
        link.reset()
        return False

    def after(link: Link) -> bool:
        asyncio.get_running_loop().call_soon(link.reset)
        return True

    outcomes = set()
    async with road(way, postgres_url) as (proxy, new):
        for how in (before, after):
            for number in range(1, LONGEST):
                case = await Case(direct, f"{verb}-{how.__name__}-{number}").prepare(verb)
                store = await new()
                proxy.on_message, count = at_message(number, how)
                try:
                    answered = await case.call(verb, store, 2.0) not in (False, None)
                    answered = answered or verb in SILENT
                except StoreError:
                    answered = False
                proxy.on_message = None
                done = await case.done(verb)
                assert done or not answered, f"{verb}, {how.__name__} message {number}: answered, and not done"
                await consistent(postgres_url, case.bot)
                outcomes.add((done, answered))
                await store.aclose()
                if count[0] < number:
                    break
            else:
                pytest.fail("it never ended")
    # the one that matters was among them: done, and whoever asked did not learn of it
    assert outcomes == {(True, True), (True, False), (False, False)}


async def take_over(store: Store, bot: str, me: str, deadline: float) -> None:
    """The holder is taken for dead, whoever it is."""
    view = await store.read(bot, me, DEADLINE)
    grant = await store.acquire(
        *(bot, me, lease_of(view).key),
        nonce="newer",
        floor=0,
        origin=view.origin,
        how=How.EXPIRED,
        ttl=10.0,
        proof="q",
        probation=Probation.NONE,
        deadline=deadline,
    )
    assert grant is not None


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "register"])
async def test_a_request_that_arrives_once_more_byte_for_byte_after_a_newer_term_began_changes_nothing(
    direct: PostgresStore, postgres_url: str, verb: str
) -> None:
    # Its own row may look fresher by that: a sign of life that came late.
    own = "to_jsonb(t) ->> 'instance_id' = 'areplayed' THEN to_jsonb(t) - 'beat' - 'last_heartbeat'"
    rows = f"SELECT (CASE WHEN {own} ELSE to_jsonb(t) END)::text FROM {{}} t ORDER BY 1"
    async with Proxy(port_of(postgres_url)) as proxy:
        case = await Case(direct, "replayed").prepare(verb)
        store = await connected(postgres_url, proxy.port)
        # a statement is prepared once for a connection, and that can't be said twice
        await (await Case(direct, "earlier").prepare(verb)).call(verb, store, DEADLINE)
        recorded: list[bytes] = []
        answered: list[bytes] = []

        def record(link: Link, direction: str, message: bytes) -> bool:
            if direction == ASKS:
                recorded.append(message)
            return True

        def swallow(link: Link, direction: str, message: bytes) -> bool:
            answered.append(message)
            return False

        proxy.on_message = record
        await case.call(verb, store, DEADLINE)
        assert await case.done(verb)
        syncs = sum(message[:1] in (b"S", b"Q") for message in recorded)
        assert syncs

        await direct.register(registration("b", "d2", case.bot), DEADLINE)
        await direct.promote("b", DEADLINE)
        await take_over(direct, case.bot, "b", DEADLINE)
        tables = ("bot_leases", "bot_terms", "bot_instances", "bot_deployments")
        before = [await run_sql(postgres_url, rows.format(table)) for table in tables]
        (link,) = proxy.links
        proxy.on_message = swallow
        link.server.write(b"".join(recorded))
        async with asyncio.timeout(5):
            while sum(message[:1] == b"Z" for message in answered) < syncs:
                await asyncio.sleep(0.001)
        assert not [message for message in answered if message[:1] == b"E"]  # each of them was carried out
        assert [await run_sql(postgres_url, rows.format(table)) for table in tables] == before
        await store.aclose()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("way", "verb"),
    [
        pytest.param(*w, marks=[] if w in MOST else pytest.mark.long)
        for w in WAYS
        if w[0] == "direct" or w[1] == "acquire"
    ],
)
async def test_a_link_that_stalls_at_any_message_costs_a_call_its_deadline_and_no_more(
    direct: PostgresStore, postgres_url: str, way: str, verb: str, lag: list[float]
) -> None:
    slowest = 0.0
    short = SHORT / 2 if way == "connecting" else SHORT  # it has a hundred messages
    async with road(way, postgres_url) as (proxy, new):

        def stall(link: Link) -> bool:
            proxy.stall()
            return False

        for number in range(1, LONGEST):
            case = await Case(direct, f"{verb}-stall-{number}").prepare(verb)
            store = await new()
            proxy.on_message, count = at_message(number, stall)
            began = time.monotonic()
            with contextlib.suppress(StoreError):
                await case.call(verb, store, short)
            slowest = max(slowest, time.monotonic() - began)
            proxy.on_message = None
            proxy.go_on()
            proxy.reset()  # a pooler would wait for the answer to what was held up for ever
            await consistent(postgres_url, case.bot)
            await store.aclose()
            if count[0] < number:
                break
        else:
            pytest.fail("it never ended")
    assert short <= slowest < short + 0.3 + max(lag)


async def test_a_store_that_is_closed_while_it_connects_leaves_no_connection(postgres_url: str) -> None:
    async with Proxy(port_of(postgres_url)) as proxy:
        for number in range(1, LONGEST):
            store = await connected(postgres_url, proxy.port)
            store._drop()
            closing: list[asyncio.Task[None]] = []

            def close(link: Link, store: PostgresStore = store, to: list[asyncio.Task[None]] = closing) -> bool:
                to.append(asyncio.ensure_future(store.aclose()))
                return True

            proxy.on_message, _ = at_message(number, close)
            # The second one waits for the first, and must not connect anew when that has failed.
            await asyncio.gather(*(store.read("x", "x", 2.0) for _ in range(2)), return_exceptions=True)
            proxy.on_message = None
            if not closing:
                await store.aclose()
                break
            await closing[0]
            assert store._connection is None
            async with asyncio.timeout(2):
                while proxy.links:
                    await asyncio.sleep(0.001)
        else:
            pytest.fail("it never ended")


async def test_an_order_that_stalls_between_check_and_commit_keeps_a_takeover_waiting_or_is_refused(
    direct: PostgresStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fencing token of ``trading_bot.ledger``: the bot has asked whether it may, and is held up for so long that
    its term is over and another one's begins. Held up after each message of the transaction."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from trading_bot.ledger import Order, Stale, open_ledger

    outcomes = set()
    async with Proxy(port_of(postgres_url)) as proxy:
        for number in range(1, LONGEST):
            case = await Case(direct, f"order-{number}").prepare("renew")
            away = postgres_url.replace(str(port_of(postgres_url)), str(proxy.port))
            ledger = open_ledger(away, case.bot, case.held.term)
            await ledger.open()

            def stall(link: Link) -> bool:
                proxy.stall()
                return True

            proxy.on_message, count = at_message(number, stall)
            placing = asyncio.ensure_future(ledger.place(Order(number, 1, "BTC", 0.1, 50_000.0)))
            while count[0] < number and not placing.done():
                await asyncio.sleep(0.001)
            # The holder is taken for dead, and another one begins.
            with contextlib.suppress(StoreError):  # an order is on its way into the database; or the answer was late
                await take_over(direct, case.bot, "a" + case.bot, 0.3)
            newer = lease_of(await direct.read(case.bot, "a" + case.bot, DEADLINE)).nonce == "newer"
            orders = f"SELECT term FROM trades WHERE bot = '{case.bot}'"
            before = await run_sql(postgres_url, orders)
            proxy.on_message = None
            proxy.go_on()
            try:
                await placing
                outcome = "placed"
            except Stale:
                outcome = "refused"
            after = await run_sql(postgres_url, orders)
            assert len(after) == (outcome == "placed")
            if newer:
                assert len(before) == len(after), f"held up at message {number}: placed after a newer term began"
            outcomes.add((outcome, newer))
            await ledger.close()
            if count[0] < number:
                break
        else:
            pytest.fail("it never ended")
    # refused; waited for; placed before it
    assert outcomes == {("refused", True), ("placed", False), ("placed", True)}


# Tables that are somebody else's, or drifted ------------------------------------------------------------------------

SEED = "instance_id text PRIMARY KEY, started_at timestamptz NOT NULL, last_heartbeat timestamptz NOT NULL"
ACTIVE = "is_active boolean NOT NULL DEFAULT FALSE"
TABLES = {
    "the seed's": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE})",
    "no key": "CREATE TABLE bot_instances (instance_id text, started_at timestamptz, last_heartbeat timestamptz, "
    "is_active boolean)",
    "varchar": f"CREATE TABLE bot_instances ({SEED.replace('text', 'varchar(255)')}, {ACTIVE})",
    "short varchar": f"CREATE TABLE bot_instances ({SEED.replace('text', 'varchar(8)')}, {ACTIVE})",
    "plain timestamps": f"CREATE TABLE bot_instances ({SEED.replace('timestamptz', 'timestamp')}, {ACTIVE})",
    "no default": f"CREATE TABLE bot_instances ({SEED}, is_active boolean NOT NULL)",
    "nullable flag": f"CREATE TABLE bot_instances ({SEED}, is_active boolean)",
    "flag is an integer": f"CREATE TABLE bot_instances ({SEED}, is_active integer)",
    "flag is text": f"CREATE TABLE bot_instances ({SEED}, is_active text)",
    "flag is missing": f"CREATE TABLE bot_instances ({SEED})",
    "id is an integer": f"CREATE TABLE bot_instances ({SEED.replace('text', 'integer')}, {ACTIVE})",
    "id is a uuid": f"CREATE TABLE bot_instances ({SEED.replace('text', 'uuid')}, {ACTIVE})",
    "id is missing": f"CREATE TABLE bot_instances (id serial PRIMARY KEY, {ACTIVE})",
    "heartbeat is missing": f"CREATE TABLE bot_instances (instance_id text, started_at timestamptz, {ACTIVE})",
    "heartbeat is a number": "CREATE TABLE bot_instances (instance_id text PRIMARY KEY, started_at timestamptz, "
    f"last_heartbeat double precision, {ACTIVE})",
    "another column": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, note text)",
    "another with a default": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, note text NOT NULL DEFAULT '')",
    "another that demands": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, note text NOT NULL)",
    "ours, another type": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, term text)",
    "ours, another generation": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, generation text)",
    "ours, another beat": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, beat text)",
    "ours, no default": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, beat bigint)",
    "ours, another end": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, ended_at text)",
    "a check": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, CHECK (instance_id LIKE 'x%'))",
    "a check on the flag": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}, CHECK (NOT is_active))",
    "a view": "CREATE VIEW bot_instances AS SELECT 'a' AS instance_id, FALSE AS is_active",
    "an index of our name": f"CREATE TABLE t (x text); CREATE INDEX bot_instances_live ON t (x); "
    f"CREATE TABLE bot_instances ({SEED}, {ACTIVE})",
    "another's leases": "CREATE TABLE bot_leases (flat text)",
    "another's terms": "CREATE TABLE bot_terms (semester text)",
    "another's deployments": "CREATE TABLE bot_deployments (x text)",
    "another's schema table": "CREATE TABLE botlease_schema (version text)",
    "two rows active": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}); INSERT INTO bot_instances VALUES "
    "('a', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, TRUE), ('b', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, TRUE)",
    "rows with one name": "CREATE TABLE bot_instances (instance_id text, started_at timestamptz, "
    f"last_heartbeat timestamptz, {ACTIVE}); INSERT INTO bot_instances VALUES "
    "('a', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, TRUE), ('a', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, FALSE)",
}
ONLY_POSTGRES = {
    "partitioned": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}) PARTITION BY HASH (instance_id)",
    "unlogged": f"CREATE UNLOGGED TABLE bot_instances ({SEED}, {ACTIVE})",
    "generated flag": f"CREATE TABLE bot_instances ({SEED}, is_active boolean GENERATED ALWAYS AS (FALSE) STORED)",
    "a rule": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}); "
    "CREATE RULE r AS ON INSERT TO bot_instances DO INSTEAD NOTHING",
    "a trigger that refuses": f"CREATE TABLE bot_instances ({SEED}, {ACTIVE}); CREATE FUNCTION no() RETURNS trigger "
    "LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'; CREATE TRIGGER t BEFORE INSERT ON bot_instances "
    "FOR EACH ROW EXECUTE FUNCTION no()",
    "a materialized view": "CREATE MATERIALIZED VIEW bot_instances AS SELECT 'a'::text AS instance_id",
    "a sequence": "CREATE SEQUENCE bot_instances",
}


ADOPTED = {
    *("the seed's", "no key", "varchar", "plain timestamps", "no default", "nullable flag", "another column"),
    *("another with a default", "ours, no default", "two rows active"),
}
ADOPTED_BY_SQLITE = {  # to which a type is only a wish
    *("short varchar", "flag is an integer", "flag is text", "id is a uuid", "heartbeat is a number"),
    *("ours, another type", "ours, another generation", "ours, another beat", "ours, another end"),
    "an index of our name",
}


async def layout(url: str) -> list[Any]:
    """Every table with its columns, what hangs on it, and its rows."""
    if url.startswith("sqlite"):
        found = [tuple(r) for r in await run_sql(url, "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2")]
        tables = [name for kind, name, _ in found if kind == "table"]
    else:
        parts = (
            "SELECT relname::text, relkind::text, attname::text, atttypid::text FROM pg_class c JOIN pg_attribute a "
            "ON attrelid = c.oid WHERE relnamespace = 'public'::regnamespace AND attnum > 0 AND NOT attisdropped",
            "SELECT conrelid::regclass::text, 'constraint', conname::text, pg_get_constraintdef(oid) "
            "FROM pg_constraint WHERE connamespace = 'public'::regnamespace",
            "SELECT tgrelid::regclass::text, 'trigger', tgname::text, '' FROM pg_trigger WHERE NOT tgisinternal",
            "SELECT tablename::text, 'index', indexname::text, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        )
        found = [tuple(r) for r in await run_sql(url, f"{' UNION ALL '.join(parts)} ORDER BY 1, 2, 3, 4")]
        tables = sorted({r[0] for r in found if r[1] == "r"})
    rows = [(t, sorted(map(repr, [tuple(r) for r in await run_sql(url, f'SELECT * FROM "{t}"')]))) for t in tables]
    return [*found, *rows]


async def works(url: str) -> None:
    """A whole life: two instances, a handover, the journal."""
    store = open_store(url)
    try:
        await store.open(DEADLINE)
        case = Case(store, "b")
        await case.prepare("renew")
        renewal = await store.renew("b", "ab", case.held, 5, DEADLINE)
        assert renewal is not None and renewal.assigned
        await store.register(registration("second", "d2", "b"), DEADLINE)
        await store.promote("second", DEADLINE)
        assert not (await store.renew("b", "ab", case.held._replace(beats=(5,)), 6, DEADLINE)).assigned  # type: ignore[union-attr]
        held = case.held._replace(beats=(6,))
        gone: Any = {"reason": Reason.SUPERSEDED, "pass_on": False, "leave": True, "deadline": DEADLINE}
        assert await store.release("b", "ab", held, **gone)
        assert [t["term"] for t in await store.terms("b", 10, DEADLINE)] == [1]
    finally:
        await store.aclose()


async def adopted_or_refused(url: str, script: str) -> str:
    """Either everything works, or one line says what to do and nothing was changed. Nothing in between."""
    for statement in re.split("; (?=CREATE|INSERT)", script):
        await run_sql(url, statement)
    before = await layout(url)
    try:
        await works(url)
    except StoreRefused as e:
        assert "\n" not in str(e) and len(str(e)) < 600
        assert await layout(url) == before
        return f"refused: {e}"
    return "works"


@pytest.mark.parametrize("name", TABLES)
async def test_tables_that_drifted_or_are_foreign_are_adopted_whole_or_refused_untouched(
    any_url: str, name: str
) -> None:
    script, sqlite = TABLES[name], any_url.startswith("sqlite")
    if sqlite:
        script = script.replace("id serial", "id integer")
    verdict = await adopted_or_refused(any_url, script)
    assert (verdict == "works") is (name in ADOPTED or (sqlite and name in ADOPTED_BY_SQLITE)), verdict


@pytest.mark.parametrize("name", ONLY_POSTGRES)
async def test_tables_of_postgresqls_own_kinds_are_adopted_whole_or_refused_untouched(
    postgres_url: str, name: str
) -> None:
    verdict = await adopted_or_refused(postgres_url, ONLY_POSTGRES[name])
    assert (verdict == "works") is (name == "unlogged"), verdict


# A disk that fails under SQLite --------------------------------------------------------------------------------------


def under(world: World, *wrap: str, deployment: str = "v1") -> tuple[subprocess.Popen[bytes], Path]:
    """A deployment under another program, and what it says."""
    log = world.folder / f"log-{deployment}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*wrap, *BOTLEASE, "run", "--ttl", "1.5", "--deployment", deployment, "--", *world.bot()],
            env=clean_env(BOTLEASE_DATABASE_URL=world.url),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    return process, log


def ended(process: subprocess.Popen[bytes]) -> None:
    from botlease.work.tree import descendants

    for pid in [*descendants(process.pid)][:1] or [process.pid]:  # strace passes nothing on
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def can_trace() -> bool:
    try:
        return subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


SYNC = "fsync,fdatasync"
TRACE = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={SYNC}", "-e")


@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
def test_a_disk_that_fails_ends_the_work_in_time_and_a_good_one_takes_over(sqlite_world: World) -> None:
    """The holder's own syncs fail; the other deployment has a good disk, and must wait the lease out."""
    world = sqlite_world
    sick, log = under(world, *TRACE, f"inject={SYNC}:error=EIO:when=40+")
    try:
        world.works(1)
        world.run("--deployment", "v1")  # stands by
        until(lambda: world.terms()[-1:] == [2], 30)
        until(lambda: "disk I/O error" in log.read_text())
        assert world.overlap() == 0
    finally:
        ended(sick)


def longest_silence(world: World) -> float:
    stamps = sorted(float(line.split()[2]) for line in world.witness.read_text().rpartition("\n")[0].splitlines())
    return max(b - a for a, b in pairwise(stamps))


@pytest.mark.long
@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
def test_syncs_of_three_seconds_end_the_work_in_time_and_when_they_are_quick_again_somebody_works(
    sqlite_world: World,
) -> None:
    """Twice the ttl. Whoever waits for such a sync holds the write lock of the file, so that nobody else can begin."""
    world = sqlite_world
    slow, log = under(world, *TRACE, f"inject={SYNC}:delay_enter=3000000:when=40..44")
    try:
        world.works(1)
        world.run("--deployment", "v1")
        until(lambda: "no renewal was confirmed in time" in log.read_text(), 30)
        ended_at = max(last for _, last in world.stamps().values())
        until(lambda: max(last for _, last in world.stamps().values()) > ended_at + 1.0, 40)
        assert world.overlap() == 0 and world.terms()[-1] > 1
        # Five syncs of 3 s in a row: whoever did not stop at the end of trust would have stamped in between.
        assert longest_silence(world) > 3.0 - 1.5
    finally:
        ended(slow)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    except OSError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as f:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while f.write(b"x" * size) == size:
                    pass


def test_a_full_disk_does_not_end_the_work_whose_journal_has_its_room(small_disk: Path, tmp_path: Path) -> None:
    world = World(tmp_path, f"sqlite:///{small_disk}/lease.db")
    try:
        world.run("--deployment", "v1")
        world.works(1)
        fill(small_disk)
        full = time.clock_gettime(time.CLOCK_BOOTTIME)
        until(lambda: max(last for _, last in world.stamps().values()) > full + 3 * 1.5)  # the ttl
        assert world.terms() == [1]
    finally:
        world.close()


def test_a_full_disk_ends_the_work_in_time_and_when_there_is_room_somebody_works_again(
    small_disk: Path, tmp_path: Path
) -> None:
    """Without a journal: another program has deleted it, as SQLite does by itself."""
    world = World(tmp_path, f"sqlite:///{small_disk}/lease.db")
    journal = small_disk / "lease.db-journal"
    try:
        first = world.run("--deployment", "v1")
        world.works(1)
        world.run("--deployment", "v1").says("standby")
        fill(small_disk)
        while journal.exists():  # a commit may have come between the two
            journal.unlink()
            fill(small_disk)
        full = time.clock_gettime(time.CLOCK_BOOTTIME)
        first.says("database or disk is full")
        first.says("no renewal was confirmed in time")
        until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > full + 1.5 + 0.5)
        assert max(last for _, last in world.stamps().values()) < full + 1.5  # the ttl
        (small_disk / "ballast").unlink()
        freed = time.clock_gettime(time.CLOCK_BOOTTIME)
        until(lambda: max(last for _, last in world.stamps().values()) > freed + 0.2, 20)
        assert world.overlap() == 0
    finally:
        world.close()


def test_a_file_renamed_away_and_back_has_one_holder_throughout(sqlite_world: World) -> None:
    world = sqlite_world
    file = Path(world.url.removeprefix("sqlite:///"))
    first = world.run("--deployment", "v1")
    world.works(1)
    # A supervisor that started while the file is away would make a new one, and nobody would find it gone.
    world.run("--deployment", "v1").says("standby")
    file.rename(file.with_suffix(".away"))
    first.says("is gone")
    file.with_suffix(".away").rename(file)
    back = time.clock_gettime(time.CLOCK_BOOTTIME)
    until(lambda: max(last for _, last in world.stamps().values()) > back + 0.2, 20)
    assert world.overlap() == 0 and world.terms_rise()


def test_a_backup_that_takes_the_files_place_has_one_holder_throughout_and_no_term_twice(sqlite_world: World) -> None:
    world = sqlite_world
    file = Path(world.url.removeprefix("sqlite:///"))
    first = world.run("--deployment", "v1")
    world.works(1)
    backup = file.with_suffix(".backup")
    with sqlite3.connect(file) as source, sqlite3.connect(backup) as copy:
        source.backup(copy)
    source.close()
    copy.close()
    second = world.run("--deployment", "v2")
    world.works(2)
    shutil.move(backup, file)  # it knows of term 1 alone
    until(lambda: world.terms()[-1] > 2, 30)
    assert world.overlap() == 0
    assert first.process.poll() is None or second.process.poll() is None


def test_a_backup_copied_into_the_file_has_one_holder_or_says_that_it_is_damaged(sqlite_world: World) -> None:
    """``cp backup lease.db`` under those who have it open: the very way to damage an SQLite file."""
    world = sqlite_world
    file = Path(world.url.removeprefix("sqlite:///"))
    world.run("--deployment", "v1")
    world.works(1)
    backup = file.with_suffix(".backup")
    shutil.copyfile(file, backup)
    world.run("--deployment", "v2")
    world.works(2)
    shutil.copyfile(backup, file)
    copied = time.clock_gettime(time.CLOCK_BOOTTIME)
    until(
        lambda: (
            max(last for _, last in world.stamps().values()) > copied + 3.0
            or all("is damaged" in run.text() or "malformed" in run.text() for run in world.runs)
        ),
        30,
    )
    assert world.overlap() == 0 and world.terms_rise()
