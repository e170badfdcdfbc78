"""Both stores pass the public conformance suite against the real thing, and what only one of them can do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import World, clean_env, one_side_car_lock
from proxy import Proxy
from servers import PgBouncer, has_pgbouncer

from botlease import clock
from botlease.model import Held, How, Lease, Probation, Reason
from botlease.stores import (
    SCHEMA_VERSION,
    Store,
    StoreEmpty,
    StoreError,
    StoreRefused,
    open_store,
    postgres,
    postgresschema,
    sqlitefile,
    sqliteschema,
    within,
)
from botlease.stores.inbox import Changes, Holding, Update
from botlease.stores.postgres import PostgresStore
from botlease.stores.postgresinbox import PostgresInbox
from botlease.stores.sqlite import SqliteStore
from botlease.stores.sqlitefile import NETWORK_FILE_SYSTEMS, prepare
from botlease.testing import DEADLINE, STOPPED, StoreContract, acquire, claim, lease_of, registration
from botlease.text import redact
from botlease.value import replace


async def two(url: str) -> AsyncIterator[list[Store]]:
    stores = [open_store(url), open_store(url)]
    # both at once: creating the schema must survive that
    await asyncio.gather(*(s.open(30) for s in stores))
    yield stores
    for s in stores:
        await s.aclose()


def sqlite_execute(url: str) -> Callable[[str], Any]:
    async def execute(sql: str) -> Any:
        with sqlite3.connect(url.removeprefix("sqlite:///")) as db:
            db.row_factory = sqlite3.Row
            rows = [dict(r) for r in db.execute(sql).fetchall()]
        db.close()
        return rows

    return execute


class TestSqlite(StoreContract):
    @pytest.fixture
    async def stores(self, sqlite_url: str) -> AsyncIterator[list[Store]]:
        async for s in two(sqlite_url):
            with one_side_car_lock(*s):
                yield s

    @pytest.fixture
    def execute(self, sqlite_url: str) -> Callable[[str], Any]:
        return sqlite_execute(sqlite_url)


class TestPostgres(StoreContract):
    @pytest.fixture
    async def stores(self, postgres_url: str) -> AsyncIterator[list[Store]]:
        async for s in two(postgres_url):
            yield s

    @pytest.fixture
    def execute(self, postgres_url: str) -> Callable[[str], Any]:
        async def execute(sql: str) -> Any:
            connection = await asyncpg.connect(postgres_url)
            try:
                return [dict(r) for r in await connection.fetch(sql)]
            finally:
                await connection.close()

        return execute


@pytest.mark.skipif(not has_pgbouncer(), reason="PgBouncer is not installed (Debian: apt-get install pgbouncer)")
class TestThroughPgBouncer(TestPostgres):
    """Transaction pooling: no LISTEN, another server process for every statement. Found out by itself."""

    @pytest.fixture(params=[1, 2])
    async def stores(self, postgres_url: str, request: pytest.FixtureRequest) -> AsyncIterator[list[Store]]:
        port = int(postgres_url.split(":")[-1].split("/")[0])
        pooler = PgBouncer(port, request.param)
        try:
            async for s in two(postgres_url.replace(f":{port}/", f":{pooler.port}/")):
                assert all(isinstance(x, PostgresStore) and x.pooled for x in s)
                yield s
        finally:
            pooler.stop()


@pytest.mark.skipif(not has_pgbouncer(), reason="PgBouncer is not installed (Debian: apt-get install pgbouncer)")
async def test_a_pooler_that_passes_for_a_server_costs_an_attempt_and_no_more(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some hand the server's process id through. What was prepared is then on another connection."""
    real = PostgresStore._identify

    async def passes_for_a_server(self: PostgresStore, connection: asyncpg.Connection) -> int:
        await real(self, connection)
        return int(connection.get_server_pid())

    monkeypatch.setattr(PostgresStore, "_identify", passes_for_a_server)
    port = int(postgres_url.split(":")[-1].split("/")[0])
    pooler = PgBouncer(port, 2)
    url = postgres_url.replace(f":{port}/", f":{pooler.port}/")
    store = PostgresStore(url)
    store.listens = False
    try:
        await store.open(DEADLINE)
        await store.register(registration("i"), DEADLINE)
        await store.read("bot", "i", DEADLINE)
        assert not store.pooled
        other = await asyncpg.connect(url, statement_cache_size=0)
        failed = 0
        for _ in range(6):
            async with other.transaction():  # takes the server connection that the store has just used
                await other.fetchval("SELECT 1")
                try:
                    await store.read("bot", "i", DEADLINE)
                except StoreError:
                    failed += 1
        await other.close()
        assert failed == 1
    finally:
        await store.aclose()
        pooler.stop()


async def test_a_direct_connection_is_not_taken_for_a_pooler(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    assert not store.pooled
    await store.aclose()


async def test_a_dozen_first_starts_at_once_create_one_schema(any_url: str) -> None:
    stores = [open_store(any_url) for _ in range(12)]
    await asyncio.gather(*(s.open(20) for s in stores))
    views = await asyncio.gather(*(s.register(registration(f"i{n}", "same"), 20) for n, s in enumerate(stores)))

    assert len({v.generation for v in views}) == 1
    for s in stores:
        await s.aclose()


SEED_TABLE = """CREATE TABLE bot_instances (instance_id VARCHAR(64) PRIMARY KEY, started_at TIMESTAMP, last_heartbeat
TIMESTAMP, is_active BOOLEAN DEFAULT TRUE)"""


async def run_sql(url: str, *statements: str) -> list[Any]:
    out: list[Any] = []
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            for s in statements:
                out = db.execute(s).fetchall()
    else:
        connection = await asyncpg.connect(url)
        try:
            for s in statements:
                out = [tuple(r) for r in await connection.fetch(s)]
        finally:
            await connection.close()
    return out


async def test_a_table_of_an_earlier_system_is_adopted_and_its_rows_are_kept(any_url: str) -> None:
    old = "INSERT INTO bot_instances VALUES ('old1', '2024-01-01', '2024-01-01', TRUE)"
    await run_sql(any_url, SEED_TABLE, old, old.replace("old1", "old2"))
    store = open_store(any_url)
    await store.open(DEADLINE)
    view = await store.register(registration("a"), DEADLINE)
    assert await claim(store, "a")
    assert await acquire(store, "a", lease_of(view)) is not None
    await store.aclose()

    rows = await run_sql(any_url, "SELECT instance_id FROM bot_instances WHERE NOT is_active ORDER BY instance_id")
    assert [r[0] for r in rows] == ["old1", "old2"]


@pytest.mark.parametrize(
    "table",
    [
        "CREATE TABLE bot_instances (id INTEGER PRIMARY KEY, name TEXT)",
        "CREATE VIEW bot_instances AS SELECT 1 AS instance_id, 2 AS started_at, 3 AS last_heartbeat, 4 AS is_active",
    ],
)
async def test_a_foreign_table_is_refused_with_the_cure_and_left_alone(any_url: str, table: str) -> None:
    await run_sql(any_url, table)
    store = open_store(any_url)
    with pytest.raises(StoreRefused, match=r"belongs to something else .* nothing was changed: use"):
        await store.open(DEADLINE)
    await store.aclose()

    names = (
        "SELECT name FROM sqlite_master WHERE name LIKE 'bot%'"
        if any_url.startswith("sqlite")
        else "SELECT relname FROM pg_class WHERE relname LIKE 'bot%' AND relkind IN ('r','v')"
    )
    assert await run_sql(any_url, names) == [("bot_instances",)]


@pytest.mark.parametrize("name", ["bot_leases", "bot_terms", "bot_deployments", "botlease_schema"])
async def test_every_other_table_of_ours_that_is_foreign_is_refused_and_nothing_is_left_half_done(
    any_url: str, name: str
) -> None:
    await run_sql(any_url, f"CREATE TABLE {name} (foo INTEGER)")
    store = open_store(any_url)
    with pytest.raises(StoreRefused, match=r"belongs to something else|is not ours"):
        await store.open(DEADLINE)
    await store.aclose()
    with pytest.raises((sqlite3.Error, asyncpg.PostgresError)):
        await run_sql(any_url, "SELECT * FROM bot_instances")


async def test_a_database_of_the_first_version_is_upgraded_with_all_that_is_in_it(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as old:
        for module in (sqlitefile, sqliteschema, postgresschema):
            old.setattr(module, "SCHEMA_VERSION", 1)
        old_one: Any = open_store(any_url)
        if isinstance(old_one, PostgresStore):
            await old_one.call(DEADLINE, old_one._migrate)
        else:
            await old_one.open(DEADLINE)
        await old_one.aclose()
    looking = open_store(any_url)  # a command that only looks
    with pytest.raises(StoreRefused, match=f"older botlease .version 1, this one knows {SCHEMA_VERSION}"):
        await looking.open(DEADLINE, upgrade=False)
    await looking.aclose()
    rows = "('b', 7, 0, 'n', NULL, 10, 'o', '', 3, CURRENT_TIMESTAMP)"
    await run_sql(
        any_url,
        "INSERT INTO bot_leases (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at) "
        f"VALUES {rows}",
    )
    stores = [open_store(any_url), open_store(any_url)]
    await asyncio.gather(*(s.open(DEADLINE) for s in stores))
    view = await stores[0].register(registration("a", bot="b"), DEADLINE)
    assert lease_of(view).term == 7 and not view.paused and view.probation is Probation.NONE
    assert await claim(stores[1], "a", bot="b")
    assert (await stores[0].read("b", "a", DEADLINE)).assigned is not None
    for s in stores:
        await s.aclose()


async def test_looking_creates_nothing(any_url: str) -> None:
    if any_url.startswith("sqlite"):
        sqlite3.connect(any_url.removeprefix("sqlite:///")).close()
    store = open_store(any_url)
    with pytest.raises(StoreEmpty, match="nothing has run there yet"):
        await store.open(DEADLINE, upgrade=False)
    await store.aclose()
    with pytest.raises((sqlite3.Error, asyncpg.PostgresError)):
        await run_sql(any_url, "SELECT * FROM bot_leases")


async def test_an_upgrade_does_not_keep_renewals_waiting_behind_a_long_transaction(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as old:
        old.setattr(postgresschema, "SCHEMA_VERSION", 1)
        first = PostgresStore(postgres_url)
        await first.call(DEADLINE, first._migrate)
        await first.aclose()
    await run_sql(
        postgres_url,
        "INSERT INTO bot_leases (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at) "
        "VALUES ('b', 1, 0, 'n', 'a', 10, 'o', '', 0, now())",
    )
    reader = await asyncpg.connect(postgres_url)
    renewer = await asyncpg.connect(postgres_url)
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch("SELECT * FROM bot_leases")
    store = open_store(postgres_url)
    opening = asyncio.ensure_future(store.open(6 * DEADLINE))
    slowest = 0.0
    while not opening.done():
        began = time.monotonic()
        await renewer.execute("UPDATE bot_leases SET beat = beat + 1 WHERE bot = 'b'")
        slowest = max(slowest, time.monotonic() - began)
    with pytest.raises(StoreError, match="in use by a long transaction"):
        opening.result()
    assert slowest < 1.0
    await transaction.rollback()
    await store.open(DEADLINE)
    for c in (reader, renewer):
        await c.close()
    await store.aclose()


async def test_an_operators_role_needs_bot_instances_and_nothing_else(postgres_url: str) -> None:
    a = open_store(postgres_url)
    await a.open(DEADLINE)
    for name, deployment in (("a", "d1"), ("a2", "d1"), ("b", "d2")):
        await a.register(registration(name, deployment), DEADLINE)
    assert await claim(a, "b")
    role = f"operator_{os.getpid()}"
    admin = await asyncpg.connect(postgres_url)
    await admin.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT, UPDATE ON bot_instances TO {role}")
    try:
        await admin.execute(f"SET ROLE {role}")
        await admin.execute("UPDATE bot_instances SET is_active = TRUE WHERE deployment = 'd1'")  # two rows: one wins
        await admin.execute("RESET ROLE")
        view = await a.read("bot", "b", DEADLINE)
        assert view.assigned is not None and view.assigned.generation > view.generation
    finally:
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()
        await a.aclose()


async def test_a_claim_of_a_supervisor_of_version_1_is_no_operators_edit(postgres_url: str) -> None:
    a = open_store(postgres_url)
    await a.open(DEADLINE)
    before = (await a.register(registration("a", "d1"), DEADLINE)).generation
    await a.register(registration("b", "d2"), DEADLINE)
    assert await claim(a, "b")
    await run_sql(postgres_url, "SELECT botlease_claim('bot', 'a', 'b')")
    view = await a.read("bot", "a", DEADLINE)
    assert view.assigned is not None and view.assigned.instance_id == "a" and view.generation == before
    await a.aclose()


async def test_a_deployment_row_that_vanished_is_put_back(any_url: str) -> None:
    a = open_store(any_url)
    await a.open(DEADLINE)
    await a.register(registration("a", "d1"), DEADLINE)
    await a.register(registration("b", "d2"), DEADLINE)
    assert await claim(a, "b")
    await run_sql(any_url, "DELETE FROM bot_deployments")
    await a.promote("a", DEADLINE)
    view = await a.read("bot", "a", DEADLINE)
    assert view.assigned is not None and view.assigned.instance_id == "a" and view.generation > 0
    await a.aclose()


async def test_a_schema_from_the_future_is_refused(any_url: str) -> None:
    store = open_store(any_url)
    await store.open(DEADLINE)
    await store.aclose()
    await run_sql(any_url, "UPDATE botlease_schema SET version = 99")
    store = open_store(any_url)
    with pytest.raises(StoreRefused, match="newer botlease .schema 99"):
        await store.open(DEADLINE)
    await store.aclose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://x/y", "use postgresql://"),
        ("", "use postgresql://"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
    ],
)
def test_an_unknown_url_is_refused_with_the_cure(url: str, says: str) -> None:
    with pytest.raises(StoreRefused, match=says):
        open_store(url)


def test_passwords_and_tokens_are_blotted_out() -> None:
    text = redact("postgresql://me:s3cret@db/x?password=s3cret token 123456789:AAabcdefghijklmnopqrstuvwxyz012345678")

    assert "s3cret" not in text and "AAabc" not in text and "123456789:***" in text
    assert "AAE" not in redact("POST https://api.telegram.org/bot123456789:AAEabcdefghijklmnopqrstuvwxyz/getMe")
    assert "SECRET" not in redact("postgresql://u:abc@SECRET@h/d")


@pytest.mark.parametrize(
    "url", ["postgresql://u:hunter2\u2100@h/d", "postgresql://[h/d", "postgresql://u:hunter2@h:x/d"]
)
async def test_a_url_that_cannot_be_parsed_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(StoreRefused, match="is not valid") as caught:
        await open_store(url).open(1)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://bot:pw@127.0.0.1:1,127.0.0.1:2/bots?target_session_attrs=any", "127.0.0.1:1,127.0.0.1:2/bots"),
        ("postgresql://user:2024#rest@127.0.0.1:1/db", "is not valid"),
        ("postgresql://bot@127.0.0.1:1/bots$", "the address in the database URL"),
    ],
    ids=["several hosts", "a hash in the password", "a name that is not shown"],
)
async def test_an_error_names_the_server_as_the_url_has_it_and_no_piece_of_a_password(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says) as caught:
        await open_store(url).open(1)
    assert isinstance(caught.value, StoreRefused) is ("#" in url) and "2024" not in str(caught.value)


# PostgreSQL --------------------------------------------------------------------------------------------------------


async def test_no_call_outlasts_its_deadline_behind_a_connection_that_swallows_everything(postgres_url: str) -> None:
    port = int(postgres_url.split(":")[-1].split("/")[0])
    async with Proxy(port) as proxy:
        store = PostgresStore(postgres_url.replace(str(port), str(proxy.port)))
        await store.open(DEADLINE)
        await store.register(registration("a"), DEADLINE)
        for _ in range(2):  # on an open connection, then while connecting
            proxy.stall()
            for call in (
                lambda: store.read("bot", "a", 0.3),
                lambda: store.touch("a", "x", 0.3),
                lambda: store.renew("bot", "a", Held(1, "n"), 7, 0.3),
            ):
                began = time.monotonic()
                with pytest.raises(StoreError, match="no answer within"):
                    await call()
                assert time.monotonic() - began < 0.6
        proxy.go_on()
        assert (await store.read("bot", "a", DEADLINE)).generation > 0
        await store.aclose()


async def test_a_row_lock_does_not_hold_a_call_beyond_its_deadline(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(0.5)
    view = await store.register(registration("a"), 0.5)
    await store.claim("bot", "a", None, 0.5)
    other = await asyncpg.connect(postgres_url)
    async with other.transaction():
        await other.execute("SELECT * FROM bot_leases FOR UPDATE")
        began = time.monotonic()
        with pytest.raises(StoreError):
            await store.acquire(
                "bot",
                "a",
                lease_of(view).key,
                nonce="n",
                floor=0,
                origin=view.origin,
                how="released",
                ttl=10,
                proof="",
                probation=Probation.NONE,
                deadline=0.5,
            )  # type: ignore[arg-type]
        assert time.monotonic() - began < 1.0
    await other.close()
    assert (await store.read("bot", "a", DEADLINE)).lease == view.lease
    await store.aclose()


async def test_a_slow_link_is_connected_although_one_attempt_is_too_short_for_it(postgres_url: str) -> None:
    port = int(postgres_url.split(":")[-1].split("/")[0])
    async with Proxy(port) as proxy:
        proxy.delay = 0.035  # one way: a connection takes several round trips, an attempt has four
        store = PostgresStore(postgres_url.replace(str(port), str(proxy.port)))
        for _ in range(40):
            try:
                await store.read("bot", "a", 0.3)
            except StoreError as e:
                if "does not exist" in str(e):
                    break  # connected: it is only that nothing has made the tables
            else:
                break
        else:
            pytest.fail("never connected")
        await store.aclose()


async def test_the_operators_update_is_noticed_at_once(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    await store.register(registration("a"), DEADLINE)
    noticed = asyncio.Event()
    store.on_change = noticed.set
    operator = await asyncpg.connect(postgres_url)
    await operator.execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = 'a'")
    await asyncio.wait_for(noticed.wait(), 2)  # nothing but the notification would ever set it
    await operator.close()
    await store.aclose()


async def test_a_renewal_that_is_a_heartbeat_does_not_wait_for_an_operators_open_transaction(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    grant = await StoreContract().held(store)
    operator = await asyncpg.connect(postgres_url)
    transaction = operator.transaction()
    await transaction.start()
    await operator.execute("UPDATE bot_instances SET is_active = FALSE")
    renewal = await store.renew("bot", "a", Held(grant.term, "nonce-a"), 7, 0.5, "active")
    assert renewal is not None and renewal.assigned
    await transaction.rollback()
    await operator.close()
    await store.aclose()


async def test_a_call_waits_for_those_before_it_no_longer_than_its_deadline(postgres_url: str) -> None:
    """Also one that comes in the very moment between two: the connection is nobody's then, and still promised."""
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)

    def sleep(seconds: float, deadline: float) -> Coroutine[Any, Any, object]:
        return store.call(deadline, lambda c: c.execute(f"SELECT pg_sleep({seconds})"))

    async def late() -> float:
        began = clock.now()
        with pytest.raises(StoreError, match="no answer within"):
            await sleep(0, 0.3)
        return clock.now() - began

    async def first() -> float:
        await sleep(0.2, DEADLINE)
        return await late()  # the second has been promised the connection, and has not run yet

    begun = asyncio.ensure_future(first())
    while not store._lock.locked():
        await asyncio.sleep(0)
    second = asyncio.ensure_future(sleep(1.5, DEADLINE))
    assert await begun < 1
    assert await late() < 1
    await second
    await sleep(0, DEADLINE)
    await store.aclose()


async def test_a_call_that_is_cancelled_in_the_turn_in_which_it_begins_leaves_nothing_behind() -> None:
    """As at the end of ``asyncio.run``, which cancels whatever there is. A coroutine that nobody awaits is a warning,
    and an error here."""
    call = asyncio.ensure_future(within(5.0, asyncio.sleep(5.0), lambda: None))
    await asyncio.sleep(0)  # it has begun, and what it waits for has not
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)
    gc.collect()


async def test_a_warmed_up_connection_leaves_nothing_behind(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    await store.register(registration("a"), DEADLINE)
    await store._plan_ahead()
    assert store._planned() and store._plans
    for table in ("bot_instances", "bot_leases", "bot_terms", "bot_deployments"):
        assert [r[0] for r in await run_sql(postgres_url, f"SELECT bot FROM {table} WHERE bot <> 'bot'")] == []
    await store.aclose()


async def test_who_takes_over_from_somebody_plans_while_that_one_works_on_and_who_fills_a_vacancy_does_not(
    postgres_url: str,
) -> None:
    stores = [PostgresStore(postgres_url) for _ in "abc"]
    planned = []
    for name, store in zip("abc", stores, strict=True):
        await store.open(DEADLINE)
        peer = (await store.register(registration(name), DEADLINE)).assigned
        assert await store.claim("bot", name, peer.key if peer else None, DEADLINE)
        planned.append(store._planned())
        if name == "b":
            assert await acquire(store, name, lease_of(await store.read("bot", name, DEADLINE)))
    assert planned == [False, False, True]  # b follows one who was to work, and did not
    for store in stores:
        await store.aclose()


async def test_another_bots_changes_wake_nobody_nor_do_ones_own(postgres_url: str) -> None:
    """Or each of ten thousand bots on one database would read at every change of any; and whoever has just acquired
    would look at what he has written, in the moment in which his bot starts."""
    a, b, operator = (PostgresStore(postgres_url) for _ in range(3))
    for store in (a, b, operator):
        await store.open(DEADLINE)
    woken: asyncio.Queue[str] = asyncio.Queue()
    a.on_change, b.on_change = (lambda: woken.put_nowait("a")), (lambda: woken.put_nowait("b"))
    await a.register(registration("a", bot="one"), DEADLINE)
    await b.register(registration("b", bot="two"), DEADLINE)
    assert await claim(a, "a", bot="one") and await claim(b, "b", bot="two")
    for bot in ("one", "two"):
        assert await operator.deactivate(bot, None, DEADLINE) == 1
    async with asyncio.timeout(5):
        assert [await woken.get() for _ in range(2)] == ["a", "b"]
    assert woken.empty()
    for store in (a, b, operator):
        await store.aclose()


async def test_heartbeats_notify_nobody_and_are_hot_updates(postgres_url: str) -> None:
    a, b = PostgresStore(postgres_url), PostgresStore(postgres_url)
    await a.open(DEADLINE)
    await b.open(DEADLINE)
    grant = await StoreContract().held(a)
    await asyncio.sleep(0)
    await b.read("bot", "b", DEADLINE)
    count = 0

    def noticed() -> None:
        nonlocal count
        count += 1

    b.on_change = noticed
    for beat in range(50):
        assert await a.renew("bot", "a", Held(grant.term, "nonce-a", (beat,)), beat + 1, DEADLINE) is not None
        await a.touch("a", "active", DEADLINE)
    await b.read("bot", "b", DEADLINE)

    assert count == 0
    await a.aclose()
    await b.aclose()
    for _ in range(50):  # the statistics arrive when the sessions end
        rows = await run_sql(
            postgres_url, "SELECT n_tup_upd - n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases'"
        )
        done = await run_sql(postgres_url, "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'bot_leases'")
        if done[0][0] >= 50:
            break
        await asyncio.sleep(0.1)
    assert rows[0][0] == 0


async def test_the_database_going_away_and_coming_back_is_survived(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    await store.open(DEADLINE)
    await store.register(registration("a"), DEADLINE)
    killer = await asyncpg.connect(postgres_url)
    await killer.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'botlease'")
    await killer.close()
    with contextlib.suppress(StoreError):  # at most one call notices
        await store.read("bot", "a", DEADLINE)

    assert (await store.read("bot", "a", DEADLINE)).generation > 0
    await store.aclose()


# SQLite ------------------------------------------------------------------------------------------------------------


async def opened(tmp_path: Path) -> SqliteStore:
    store = SqliteStore(str(tmp_path / "lease.db"))
    await store.open(DEADLINE)
    return store


@pytest.mark.parametrize("how", ["delete", "replace", "recreate"])
async def test_a_file_that_was_deleted_or_replaced_is_noticed_at_the_next_beat(tmp_path: Path, how: str) -> None:
    store = await opened(tmp_path)
    grant = await StoreContract().held(store)
    file = tmp_path / "lease.db"
    if how == "replace":
        shutil.copy(file, tmp_path / "copy.db")
        os.replace(tmp_path / "copy.db", file)
    else:
        file.unlink()
        if how == "recreate":
            file.touch()
    with pytest.raises(StoreError, match="gone|replaced"):
        await store.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE)
    await store.aclose()


async def test_while_the_work_of_a_deleted_file_runs_nobody_acquires_on_the_new_one(tmp_path: Path) -> None:
    a = await opened(tmp_path)
    await StoreContract().held(a)
    (tmp_path / "lease.db").unlink()
    b = await opened(tmp_path)
    view = await b.register(registration("b"), DEADLINE)
    assert await claim(b, "b")

    assert await acquire(b, "b", lease_of(view)) is None
    await a.aclose()
    assert await acquire(b, "b", lease_of(view)) is not None
    await b.aclose()


async def test_what_is_in_the_place_of_the_lock_is_named(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    view = await store.register(registration("a"), DEADLINE)
    assert await claim(store, "a")
    (tmp_path / f"lease.db-bot-{zlib.crc32(b'bot'):08x}.lock").mkdir()
    with pytest.raises(StoreRefused, match="cannot open the lock .*Is a directory"):
        await acquire(store, "a", lease_of(view), origin=view.origin)
    await store.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_of_another_user_is_refused_to_whoever_is_not_root(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o005:
            path.chmod(0o755)
    file = tmp_path / "lease.db"
    file.touch()
    file.chmod(0o666)
    os.chown(file, 12345, -1)
    os.seteuid(65534)
    try:
        with pytest.raises(StoreRefused, match="belongs to another user: run as the same one"):
            prepare(str(file))
    finally:
        os.seteuid(0)
    with pytest.raises(StoreRefused, match="belongs to another user"):
        prepare(str(file))  # root as well: its owner could change every lease


async def test_a_term_that_a_replaced_file_does_not_know_keeps_nobody_out_once_that_was_seen(tmp_path: Path) -> None:
    a = await opened(tmp_path)
    await a.register(registration("a"), DEADLINE)
    shutil.copy(tmp_path / "lease.db", tmp_path / "backup")
    await StoreContract().held(a)
    (tmp_path / "backup").rename(tmp_path / "lease.db")
    b = await opened(tmp_path)
    view = await b.register(registration("b"), DEADLINE)
    assert await claim(b, "b")
    assert await acquire(b, "b", lease_of(view), origin=view.origin) is None  # its work may be about to begin

    with pytest.raises(StoreError, match="replaced"):
        await a.read("bot", "a", DEADLINE)
    assert lease_of(await a.read("bot", "a", DEADLINE)).holder is None
    assert await acquire(b, "b", lease_of(view), origin=view.origin) is not None
    await a.aclose()
    await b.aclose()


@pytest.mark.parametrize("how", ["delete", "restore"])
async def test_terms_go_on_rising_when_the_file_was_deleted_or_an_older_one_restored(tmp_path: Path, how: str) -> None:
    store = await opened(tmp_path)
    grant = await StoreContract().held(store)
    shutil.copy(tmp_path / "lease.db", tmp_path / "backup")
    for n in range(3):
        assert await store.release("bot", "a", Held(grant.term, f"nonce-{n}" if n else "nonce-a"), **STOPPED)
        grant = await acquire(store, "a", lease_of(await store.read("bot", "a", DEADLINE)), nonce=f"nonce-{n + 1}")
    assert grant.term == 4
    await store.aclose()
    (tmp_path / "lease.db").unlink()
    if how == "restore":
        (tmp_path / "backup").rename(tmp_path / "lease.db")
    new = await opened(tmp_path)
    view = await new.register(registration("b", "d9"), DEADLINE)
    assert await claim(new, "b", "a" if how == "restore" else None)
    assert (await acquire(new, "b", lease_of(view), origin=view.origin)).term == 5
    await new.aclose()


async def test_a_writer_that_sleeps_inside_its_transaction_cannot_hold_a_call_beyond_its_deadline(
    tmp_path: Path,
) -> None:
    store = await opened(tmp_path)
    await store.register(registration("a"), DEADLINE)
    other = sqlite3.connect(tmp_path / "lease.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    with pytest.raises(StoreError):
        await store.touch("a", "x", 0.4)
    assert time.monotonic() - began < 0.8
    other.execute("ROLLBACK")
    other.close()
    await store.touch("a", "x", DEADLINE)
    await store.aclose()


async def test_a_commit_of_another_process_is_noticed_without_polling(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.register(registration("a"), DEADLINE)
    noticed = asyncio.Event()
    store.on_change = noticed.set
    await sqlite_execute(f"sqlite:///{tmp_path}/lease.db")("UPDATE bot_instances SET is_active = TRUE")
    await asyncio.wait_for(noticed.wait(), 2)
    await store.aclose()


async def test_the_journal_of_a_commit_is_kept_and_void(tmp_path: Path) -> None:
    """A deleted one can be there again after a power failure, as nobody waits for the folder: it would undo the commit.
    And a file that somebody had in another mode is taken out of it."""
    await sqlite_execute(f"sqlite:///{tmp_path}/lease.db")("PRAGMA journal_mode = WAL")
    store = await opened(tmp_path)
    await store.register(registration("a"), DEADLINE)
    assert not (tmp_path / "lease.db-wal").exists()
    journal = (tmp_path / "lease.db-journal").read_bytes()
    assert len(journal) > 4096
    assert not any(journal[:28])
    await store.aclose()


async def test_a_file_that_the_bot_has_open_in_another_mode_is_used_as_it_is(tmp_path: Path) -> None:
    first = await opened(tmp_path)
    await first.register(registration("a"), DEADLINE)
    with contextlib.closing(sqlite3.connect(tmp_path / "lease.db")) as bots:
        bots.execute("PRAGMA journal_mode = WAL")
        bots.execute("CREATE TABLE orders (id)")
        await first.read("bot", "a", DEADLINE)
        second = await opened(tmp_path)  # the next deployment, or an operator's command
        view = await second.register(registration("b"), DEADLINE)
        assert view.others == 1
        await second.aclose()
    await first.aclose()


async def test_network_file_systems_links_and_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "first.db").touch()
    (tmp_path / "second.db").hardlink_to(tmp_path / "first.db")  # the locks beside it would be others
    refused = {"link.db": "symbolic link", "folder.db": "not a regular file", "second.db": "a second name"}
    for name, says in refused.items():
        store = SqliteStore(str(tmp_path / name))
        with pytest.raises(StoreRefused, match=says):
            await store.open(DEADLINE)
        await store.aclose()
    # NFS cannot be mounted here: the kernel's answer for this disk is declared to be that.
    import botlease.stores.sqlitefile as module

    monkeypatch.setitem(NETWORK_FILE_SYSTEMS, module._file_system(str(tmp_path)), "NFS")
    store = SqliteStore(str(tmp_path / "x.db"))
    with pytest.raises(StoreRefused, match="network file system .NFS."):
        await store.open(DEADLINE)
    await store.aclose()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("hello, this is a text file and not a database at all\n" * 100)
    store = SqliteStore(str(tmp_path / "x.db"))
    with pytest.raises(StoreRefused, match="not an SQLite database"):
        await store.open(DEADLINE)
    await store.aclose()


async def test_a_clock_that_is_ahead_by_more_than_rows_are_kept_for_costs_nobody_his_place(any_url: str) -> None:
    """Every row looks 40 days old: the third one's registration prunes what is older than 30."""
    contract = StoreContract()
    store = open_store(any_url)
    await store.open(DEADLINE)
    try:
        grant = await contract.held(store)
        await store.register(registration("b"), DEADLINE)
        back = "datetime({}, '-40 days')" if any_url.startswith("sqlite") else "{} - interval '40 days'"
        for table, columns in {
            "bot_instances": ("started_at", "last_heartbeat"),
            "bot_terms": ("acquired_at",),
            "bot_leases": ("renewed_at",),
            "bot_deployments": ("first_seen",),
        }.items():
            await run_sql(any_url, f"UPDATE {table} SET " + ", ".join(f"{c} = {back.format(c)}" for c in columns))
        await store.register(registration("c", "d2"), DEADLINE)

        assert await store.renew("bot", "a", Held(grant.term, "nonce-a"), 7, DEADLINE) is not None
        assert [t["term"] for t in await store.terms("bot", 10, DEADLINE)] == [grant.term]
        view = await store.register(registration("b"), DEADLINE)
        assert view.generation > 0 and not view.ended
    finally:
        await store.aclose()


async def test_the_file_and_its_lock_are_for_the_owner_only(tmp_path: Path) -> None:
    store = await opened(tmp_path / "sub")
    await StoreContract().held(store)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "sub").iterdir()}
    await store.aclose()

    assert "lease.db" in modes and any(name.endswith(".lock") for name in modes)
    assert {*modes.values()} == {0o600}
    assert (tmp_path / "sub").stat().st_mode & 0o777 == 0o700


async def test_the_side_car_lock_lasts_as_long_as_somebody_keeps_its_descriptor(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    grant = await StoreContract().held(store)
    kept = store.guard_fd("bot")
    assert kept is not None and store.guard_fd("bot") is None
    await store.release(
        "bot", "a", Held(grant.term, "nonce-a"), reason=Reason.STOPPED, pass_on=False, leave=False, deadline=DEADLINE
    )
    path = next(tmp_path.glob("*.lock"))
    with open(path) as f:
        with pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(kept)
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await store.aclose()


async def test_a_grant_that_is_given_back_does_not_hide_whose_work_began_last(tmp_path: Path) -> None:
    """Its answer may have been lost: nobody has looked yet for what that work left."""
    store = await opened(tmp_path)
    grant, begins, found = await StoreContract().held(store), True, []
    for _ in range(3):
        if begins:
            guard = store.guard_fd("bot")
            assert guard is not None
            os.close(guard)
        held = Held(grant.term, "nonce-a")
        await store.release("bot", "a", held, reason=Reason.SUPERSEDED, pass_on=False, leave=False, deadline=DEADLINE)
        grant = await acquire(store, "a", lease_of(await store.read("bot", "a", DEADLINE)))
        found.append(grant.unknown and grant.unknown[1])
        begins = not begins
    assert found == [None, "a", None]
    await store.aclose()


async def a_life(store: PostgresStore, me: str) -> None:
    """Every statement of one that runs bots: a life of its lease, the inbox of its gateway, what an operator asks."""
    view = await store.register(registration(me), DEADLINE)
    assert await claim(store, me, view.assigned.instance_id if view.assigned else None)
    grant = await acquire(store, me, lease_of(view), probation=Probation.ON)
    held, inbox, holding = (
        Held(grant.term, f"nonce-{me}"),
        PostgresInbox(store),
        Holding("bot", grant.term, f"nonce-{me}"),
    )
    assert await inbox.begin(holding, "1", DEADLINE) is not None
    changes = Changes(received=[Update(2 * grant.term, "{}"), Update(2 * grant.term + 1, "{}")])
    assert await inbox.save(holding, "1", changes, DEADLINE)
    numbers = [u.update_id for u in changes.received]
    assert await inbox.save(holding, "1", Changes(given=numbers, done=numbers, confirmed=numbers[0]), DEADLINE)
    assert await store.renew("bot", me, held, 7, DEADLINE) is not None
    held = held._replace(beats=(7,))
    assert await store.passed("bot", me, held, DEADLINE)
    await store.touch(me, "active", DEADLINE)
    assert (await store.overview(DEADLINE))["leases"] and await store.terms("bot", 5, DEADLINE)
    assert await store.diagnose(DEADLINE)
    for on in (True, False):
        await store.pause("bot", on, DEADLINE)
    await store.deactivate("bot", None, DEADLINE)
    await store.promote(me, DEADLINE)
    await store.prune("bot", 30, DEADLINE)
    stopped: dict[str, Any] = {"reason": Reason.STOPPED, "pass_on": True, "leave": True}
    assert await store.release("bot", me, held, deadline=DEADLINE, **stopped)


async def a_life_in_a_fleet(store: PostgresStore, name: str) -> None:
    from botlease.stores.postgresfleet import Hold, PostgresFleet, slot_name

    fleet, slot, me, bots = PostgresFleet(store), slot_name(name, 1), f"{name}-member", [f"{name}-{n}" for n in "ab"]
    await fleet.enlist(name, "d1", DEADLINE)
    assert {*await fleet.add(name, bots, 10.0, DEADLINE)} == {*bots}
    view = await store.register(registration(me, "d1", slot), DEADLINE)
    assert await store.claim(slot, me, None, DEADLINE)
    grant = await store.acquire(
        *(slot, me, lease_of(view).key),
        nonce=name,
        floor=0,
        origin=view.origin,
        how=How.RELEASED,
        ttl=10.0,
        proof="p",
        probation=Probation.NONE,
        deadline=DEADLINE,
    )
    assert grant is not None
    hold = Hold(name, 1, me, grant.term, name, grant.origin, 10.0)
    await fleet.mark(hold, DEADLINE, is_open=False)
    await fleet.mark(hold, DEADLINE, is_open=True)
    rows = await fleet.rows(hold, [1], DEADLINE)
    assert len(await fleet.take(hold, [(r.bot, r.term, r.slot) for r in rows], DEADLINE)) == 2
    assert await fleet.give(hold, [(bot, 1, 1) for bot in bots], Reason.SUPERSEDED, DEADLINE) == set()
    assert await fleet.move(name, [(bots[0], 1, 2)], DEADLINE) == 1
    assert await fleet.remove(name, bots[:1], DEADLINE) == bots[:1]
    assert await fleet.clear(name, bots[1:], DEADLINE) == 0
    slots, origin = await fleet.look(name, "d1", DEADLINE)
    assert await fleet.bury(name, slot, slots[0].lease, origin, How.EXPIRED, DEADLINE)


async def test_the_documented_privileges_are_enough_to_run_and_each_of_them_is_needed(postgres_url: str) -> None:
    owner = PostgresStore(postgres_url)
    await owner.open(DEADLINE)
    await owner.aclose()
    role = f"runner_{os.getpid()}_{postgres_url.rsplit('_', 1)[-1]}"
    rights = [(right, table) for table, words in postgres.PRIVILEGES.items() for right in words.split()]
    grants = [f"GRANT {right} ON {table} TO {role}" for right, table in rights]
    await run_sql(postgres_url, f"CREATE ROLE {role} LOGIN", *grants)
    url = postgres_url.replace("postgres@", f"{role}@")
    store = PostgresStore(url)
    await store.open(DEADLINE)
    await a_life(store, "first")
    await a_life_in_a_fleet(store, f"fleet{os.getpid()}")
    needless = []
    for n, (right, table) in enumerate(rights):
        await run_sql(postgres_url, f"REVOKE {right} ON {table} FROM {role}")
        fresh = PostgresStore(url)
        try:
            await fresh.open(DEADLINE)
            await a_life(fresh, f"without-{n}")
            needless.append(f"{right} on {table}")
        except StoreRefused as e:
            assert f"permission denied for {'view' if table == 'bot_failures' else 'table'} {table}" in str(e)
        await fresh.aclose()
        await run_sql(postgres_url, f"GRANT {right} ON {table} TO {role}")
    assert needless == []
    await a_life(store, "last")
    await store.aclose()


async def test_opening_a_second_store_in_the_process_does_not_drop_the_locks_of_the_first(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.register(registration("a"), DEADLINE)
    db = sqlite3.connect(tmp_path / "lease.db", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    second = await opened(tmp_path)  # in the same process, while a transaction is open
    code = f"import sqlite3; sqlite3.connect({str(tmp_path / 'lease.db')!r}, timeout=0).execute('BEGIN IMMEDIATE')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "database is locked" in other.stderr
    db.execute("ROLLBACK")
    db.close()
    await second.aclose()
    await store.aclose()


async def test_a_failed_acquire_does_not_keep_the_side_car_lock(tmp_path: Path) -> None:
    a = await opened(tmp_path)
    view = await a.register(registration("a"), DEADLINE)
    assert await claim(a, "a")
    other = sqlite3.connect(tmp_path / "lease.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError):
        await a.acquire(
            "bot",
            "a",
            lease_of(view).key,
            nonce="n",
            floor=0,
            origin=view.origin,
            how=How.RELEASED,
            ttl=10,
            proof="",
            probation=Probation.NONE,
            deadline=0.3,
        )
    other.execute("ROLLBACK")
    other.close()
    b = await opened(tmp_path)
    assert b._take_guard("bot")
    await a.aclose()
    await b.aclose()


def test_how_long_sqlite_waits_for_a_lock_is_never_more_than_the_call_at_hand_may_take(tmp_path: Path) -> None:
    """Or a write would still go in after its call was given up."""
    file = sqlitefile.SqliteFile(str(tmp_path / "lease.db"))
    for seconds, most in ((1.2, 1200), (0.08, 80), (0.03, 30), (0.0, 0), (4.0, 4000), (1.199, 1199)):
        file.wait_for_locks(seconds)
        (ms,) = file.db.execute("PRAGMA busy_timeout").fetchone()
        assert most - 50 < ms <= most
    file.close()


async def one_works_one_waits(folder: Path) -> tuple[SqliteStore, SqliteStore, Lease]:
    a, b = await opened(folder), await opened(folder)
    view = await a.register(registration("a"), DEADLINE)
    assert await claim(a, "a") and await acquire(a, "a", lease_of(view), nonce="n")
    return a, b, lease_of(await b.register(registration("b"), DEADLINE))


async def test_while_a_bot_works_on_sqlite_its_release_is_denied_at_once_and_without_the_file(tmp_path: Path) -> None:
    """Each commit wakes the next in line, and most are renewals: it may neither stand in their way nor wait."""
    a, b, held = await one_works_one_waits(tmp_path)
    other = sqlite3.connect(tmp_path / "lease.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")  # a renewal, which takes its time
    took = []
    for _ in range(5):
        began = time.monotonic()
        assert await acquire(b, "b", held, how=How.RELEASED) is None
        took.append(time.monotonic() - began)
    assert min(took) < 0.05  # whoever has read that it is free tries for 0.1 s
    other.execute("ROLLBACK")
    other.close()
    await a.aclose()
    await b.aclose()


async def test_whoever_asked_in_vain_is_still_told_of_the_release(tmp_path: Path) -> None:
    """What is refused writes nothing: counted as a commit of ours, the next one of others would be taken for it."""
    a, b, held = await one_works_one_waits(tmp_path)
    noticed = asyncio.Event()
    b.on_change = noticed.set
    for _ in range(3):
        a._drop_guard("bot")  # as in the moment before a release; or somebody has deleted the lock
        assert await acquire(b, "b", held, how=How.RELEASED) is None
        noticed.clear()
        assert await a.renew("bot", "a", Held(held.term, "n", (held.beat,)), held.beat + 1, DEADLINE) is not None
        await asyncio.wait_for(noticed.wait(), 5)
        held = replace(held, beat=held.beat + 1)
    await a.aclose()
    await b.aclose()


async def test_a_lock_that_cannot_be_opened_is_not_reported_while_somebody_works(tmp_path: Path) -> None:
    a, b, held = await one_works_one_waits(tmp_path)
    (lock,) = tmp_path.glob("*.lock")
    lock.unlink()
    lock.mkdir()
    assert await acquire(b, "b", held, how=How.RELEASED) is None
    with pytest.raises(StoreRefused, match="delete it"):  # whoever has read that it is free
        await acquire(b, "b", replace(held, holder=None), how=How.RELEASED)
    await a.aclose()
    await b.aclose()


async def test_a_lock_that_the_kernel_cannot_give_is_named_and_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import botlease.stores.sqlite as module

    a, b, held = await one_works_one_waits(tmp_path)
    a._drop_guard("bot")
    before = len([*Path("/proc/self/fd").iterdir()])

    def flock(fd: int, how: int) -> None:  # what it says where lockd is away, or its memory; cannot be had here
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", flock)
    for _ in range(3):
        with pytest.raises(StoreError, match="No locks available"):
            await acquire(b, "b", replace(held, holder=None), how=How.RELEASED)
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    await a.aclose()
    await b.aclose()


async def test_a_table_that_demands_other_values_is_refused(any_url: str) -> None:
    await run_sql(any_url, SEED_TABLE.replace("is_active BOOLEAN", "owner TEXT NOT NULL, is_active BOOLEAN"))
    store = open_store(any_url)
    with pytest.raises(StoreRefused, match="demands a value for owner"):
        await store.open(DEADLINE)
    await store.aclose()


MEDDLER = """
import asyncio, os, sys, threading, time
import botlease

path, witness, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
fd = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
end = time.monotonic() + seconds


def meddle():
    # POSIX: whoever closes any descriptor of a file drops all locks that his process has on it
    while time.monotonic() < end:
        for file in (path, path + "-journal"):
            try:
                open(file, "rb").close()
            except OSError:
                pass


async def main():
    threading.Thread(target=meddle, daemon=True).start()
    while time.monotonic() < end:
        try:
            async with (
                asyncio.timeout(end - time.monotonic()),
                botlease.active(ttl=1.5, deployment=str(os.getpid())) as term,
            ):
                until = time.monotonic() + 0.5
                while time.monotonic() < until:
                    now = time.clock_gettime(time.CLOCK_BOOTTIME)
                    os.write(fd, f"{os.getpid()} {term.number} {now:.6f}\\n".encode())
                    await asyncio.sleep(0.002)
        except (botlease.LeaseLost, botlease.StoreError, TimeoutError) as e:
            print(type(e).__name__, e, flush=True)
            await asyncio.sleep(0.05)


asyncio.run(main())
"""


def test_a_program_that_opens_and_closes_the_file_beside_us_may_damage_it_and_still_no_two_work(
    sqlite_world: World,
) -> None:
    """As SQLite documents it: without the locks two write at once (an index lost a row in every other run). The lock
    beside the file, which it does not touch, is what keeps them apart."""
    world = sqlite_world
    file = world.url.removeprefix("sqlite:///")
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", MEDDLER, file, str(world.witness), "8"],
            env=clean_env(BOTLEASE_DATABASE_URL=world.url),
            stdout=subprocess.DEVNULL,
        )
        for _ in range(3)
    ]
    try:
        assert [p.wait(60) for p in programs] == [0, 0, 0]
    finally:
        for p in programs:
            p.kill()
            p.wait()
    assert world.stamps() and world.overlap() == 0


async def test_words_and_times_that_somebody_has_put_into_a_row_blind_nobody(any_url: str) -> None:
    """Each read of each instance failed, and when the holder died nobody followed."""
    async for one, other in two(any_url):
        view = await one.register(registration("a"), DEADLINE)
        await claim(one, "a")
        grant = await acquire(one, "a", lease_of(view))
        assert grant is not None
        await other.register(registration("b"), DEADLINE)
        await run_sql(any_url, "UPDATE bot_terms SET probation = 'x', how = 'y'")
        far = "'infinity'" if any_url.startswith("postgres") else "'some day'"
        await run_sql(any_url, f"UPDATE bot_instances SET last_heartbeat = {far}")
        await run_sql(any_url, f"UPDATE bot_leases SET renewed_at = {far}")
        view = await other.read("bot", "b", DEADLINE)
        assert lease_of(view).holder == "a" and view.probation is Probation.NONE
        held = Held(grant.term, "nonce-a", (0,))
        assert await one.release("bot", "a", held, reason=Reason.STOPPED, pass_on=True, leave=True, deadline=DEADLINE)


async def test_a_host_that_takes_packets_and_says_nothing_does_not_hide_the_others(postgres_url: str) -> None:
    """The driver has one limit for all hosts of a URL: the second one was never asked."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        who, _, rest = postgres_url.rpartition("@")
        store = PostgresStore(f"{who}@127.0.0.1:{deaf.getsockname()[1]},{rest}")
        began = clock.now()
        try:
            with contextlib.suppress(StoreError):  # an attempt may be over before the second host has had its turn
                await store.open(DEADLINE)
            await store.open(DEADLINE)
            assert clock.now() - began < 9
            store._drop()
            began = clock.now()
            await store.open(DEADLINE)  # the one that answered is asked first
            assert clock.now() - began < 2.5
        finally:
            await store.aclose()
