"""What the table of hazards (docs/reliability.md) says of the database: one test a hazard, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import harness
import pytest
from harness import BOTLEASE, clean_env, until
from proxy import Proxy
from servers import PgBouncer, Postgres, has_pgbouncer, libfaketime, set_clock
from simulation import Node, Plan
from simulation import World as Simulated

from botlease import clock, core
from botlease.model import How, Reason, Timing
from botlease.stores import Held, StoreError
from botlease.stores.inbox import Changes, Holding, Update
from botlease.stores.postgres import PostgresStore
from botlease.stores.postgresfleet import Hold, PostgresFleet, slot_name
from botlease.stores.postgresinbox import PostgresInbox
from botlease.testing import DEADLINE, StoreContract, acquire, claim, lease_of, registration

TIMING = Timing.for_ttl(3.0)
SECRETS = ("first-secret", "second-secret")


@contextlib.contextmanager
def with_passwords() -> Iterator[Postgres]:
    """A server on which the role ``runner`` must give a password, and owns the database ``bots``."""
    server = Postgres()
    hba = server.data / "pg_hba.conf"
    hba.write_text("host all runner 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
    try:
        server.start()
        admin(server, f"CREATE ROLE runner LOGIN PASSWORD '{SECRETS[0]}'", "CREATE DATABASE bots OWNER runner")
        yield server
    finally:
        server.stop()


def admin(server: Postgres, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(server.url())
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


def url(server: Postgres, secret: str) -> str:
    return f"postgresql://runner:{secret}@127.0.0.1:{server.port}/bots"


def test_a_password_that_is_changed_under_a_holder_costs_it_nothing_and_the_next_deployment_takes_over(
    tmp_path: Path,
) -> None:
    with with_passwords() as server:
        for world in harness.world(tmp_path, url(server, SECRETS[0])):
            world.run("--deployment", "v1")
            world.works(1)
            admin(server, f"ALTER ROLE runner PASSWORD '{SECRETS[1]}'")
            late = world.run("--deployment", "v1")
            assert late.wait() == 78
            assert "refused the login" in late.text() and not any(secret in late.text() for secret in SECRETS)
            world.url = url(server, SECRETS[1])
            world.run("--deployment", "v2")
            world.works(2)
            assert world.overlap() == 0 and world.gap(2) < 1.5  # handed over, and not waited out
            world.close()


def test_with_no_connection_left_the_holder_goes_on_and_who_comes_late_waits_for_one(tmp_path: Path) -> None:
    with with_passwords() as server:
        admin(server, "ALTER ROLE runner CONNECTION LIMIT 1")
        for world in harness.world(tmp_path, url(server, SECRETS[0])):
            first = world.run("--deployment", "v1")
            world.works(1)
            refused = world.run("--deployment", "v2", "--wait-database", "1")
            assert refused.wait() == 69 and "too many connections" in refused.text()
            patient = world.run("--deployment", "v3", "--wait-database", "30")
            patient.says("too many connections")
            assert len(world.stamps()) == 1
            first.signal(signal.SIGTERM)
            world.works(2)
            assert world.overlap() == 0
            world.close()


def test_times_are_right_whatever_zone_and_style_the_database_has(tmp_path: Path, postgres_url: str) -> None:
    for world in harness.world(tmp_path, postgres_url):
        name = postgres_url.rpartition("/")[2]
        world.sql(f"ALTER DATABASE {name} SET timezone TO 'Pacific/Kiritimati'")
        world.sql(f"ALTER DATABASE {name} SET datestyle TO 'German, DMY'")
        world.sql(f"ALTER DATABASE {name} SET intervalstyle TO 'iso_8601'")
        world.run("--deployment", "v1")
        world.works(1)
        world.run("--deployment", "v2")
        world.works(2)
        for command in ("history", "status"):
            done = subprocess.run(
                [*BOTLEASE, command, "--json"],
                env=clean_env(BOTLEASE_DATABASE_URL=postgres_url, TZ="America/St_Johns"),
                capture_output=True,
                text=True,
                check=True,
            )
            times = [text for line in done.stdout.splitlines() for text in re.findall(r'"(20\d\d-[^"]+)"', line)]
            assert times
            for text in times:
                at = dt.datetime.fromisoformat(text)
                assert abs(clock.wall() - (at if at.tzinfo else at.replace(tzinfo=dt.UTC)).timestamp()) < 60, text
        world.close()


async def test_an_old_primary_that_lives_on_beside_the_new_one_lets_nobody_work_twice_as_long_as_all_see_the_same_one(
    tmp_path: Path,
) -> None:
    """Two that see different ones cannot be told apart from inside: assumption 3."""
    old = Postgres().start()
    new = None
    try:
        async with Proxy(old.port) as proxy:
            loop = asyncio.get_running_loop()
            for world in harness.world(tmp_path, f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"):
                for deployment in ("v1", "v1"):
                    world.run("--deployment", deployment)
                await loop.run_in_executor(None, world.works, 1)
                new = await loop.run_in_executor(None, lambda: Postgres(copy_of=old).start())
                await loop.run_in_executor(None, new.promote)
                for server in (new, old):  # there, and back again: what was committed at the other one is lost
                    terms = len(world.terms())
                    proxy.target = server.port
                    proxy.reset()
                    await loop.run_in_executor(None, until, _grows(world, terms), 30)
                stamps = sorted(world.stamps().items(), key=lambda kv: kv[1])
                assert world.overlap() == 0
                assert [term for (_, term), _ in stamps] == sorted({term for (_, term), _ in stamps})
                await loop.run_in_executor(None, world.close)
    finally:
        for server in (old, new):
            if server is not None:
                server.stop()


def _grows(world: harness.World, terms: int) -> Callable[[], bool]:
    return lambda: len(world.terms()) > terms


def _stamps_after(world: harness.World, moment: float) -> Callable[[], bool]:
    return lambda: max(to for _, to in world.stamps().values()) > moment


def test_forged_notifications_make_nobody_act(tmp_path: Path, postgres_url: str) -> None:
    for world in harness.world(tmp_path, postgres_url):
        world.run("--deployment", "v1", ttl="3")
        world.works(1)
        world.run("--deployment", "v2", "--standby", ttl="3").says("standby")
        for payload in ("bot", ""):  # which wake everybody
            for _ in range(20):
                world.sql(f"SELECT pg_notify('botlease', '{payload}')")
        for payload in ("drain", "v2", '{"holder": null}', "x" * 7_000):
            # each with a text of its own: the same one twice in a transaction is sent once
            world.sql(f"SELECT pg_notify('botlease', $${payload}$$ || n) FROM generate_series(1, 50) n")
        last = max(at for _, at in world.stamps().values())
        until(_stamps_after(world, last + 3))  # a whole ttl later
        assert world.terms() == [1] and len(world.stamps()) == 1
        world.close()


STEPS = (1, -1, 5, -5, 60, -60, 3600, -3600, 86_400, -86_400)


def renewed_at(world: harness.World) -> float:
    """Unix time of the last renewal, as the row has it."""

    async def read() -> float:
        connection = await asyncpg.connect(world.url)
        try:
            return float(await connection.fetchval("SELECT extract(epoch FROM renewed_at) FROM bot_leases"))
        finally:
            await connection.close()

    if world.url.startswith("postgres"):
        return asyncio.run(read())
    with contextlib.closing(sqlite3.connect(world.url.removeprefix("sqlite:///"))) as db:
        (text,) = db.execute("SELECT renewed_at FROM bot_leases").fetchone()
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp()


def stepped(world: harness.World, clock_file: Path, *, rows_too: bool = True) -> None:
    """Each step in mid-lease, and a whole ttl after it; then the bot still changes hands. ``rows_too``: the rows are
    written by the clock that is stepped, and show that it was."""
    for step in STEPS:
        set_clock(clock_file, step)
        last = max(at for _, at in world.stamps().values())
        until(_stamps_after(world, last + 1.6))
        assert world.terms() == [1] and len(world.stamps()) == 1, step
        off = renewed_at(world) - clock.wall()
        assert abs(step) < 60 or abs(off - step * rows_too) < 30, (step, off)
    world.runs[0].signal(signal.SIGTERM)
    world.works(2)
    assert world.overlap() == 0


@pytest.mark.long
@pytest.mark.skipif(libfaketime() is None, reason="libfaketime is not here")
def test_the_databases_clock_is_stepped_by_a_second_to_a_day_in_mid_lease_and_nobody_minds(tmp_path: Path) -> None:
    library = libfaketime()
    assert library is not None
    with tempfile.TemporaryDirectory() as folder:
        clock_file = Path(folder, "clock")
        Path(folder).chmod(0o755)  # PostgreSQL is another user for root
        clock_file.write_text("+0")
        server = Postgres(fake_time=(library, clock_file)).start()
        try:
            for world in harness.world(tmp_path, server.url()):
                world.run("--deployment", "v1")
                world.works(1)
                world.run("--deployment", "v1").says("standby")
                stepped(world, clock_file)
                world.close()
        finally:
            server.stop()


@pytest.mark.long
def test_a_holders_own_clock_is_stepped_by_a_second_to_a_day_in_mid_lease_and_nobody_minds(
    tmp_path: Path, any_url: str
) -> None:
    """On SQLite it is the clock of the rows as well."""
    clock_file = tmp_path / "clock"
    clock_file.write_text("+0")
    site = str(Path(__file__).parent.parent / "soak" / "site")
    for world in harness.world(tmp_path, any_url):
        world.run("--deployment", "v1", env={"SOAK_CLOCK": str(clock_file), "PYTHONPATH": site})
        world.works(1)
        world.run("--deployment", "v1").says("standby")
        stepped(world, clock_file, rows_too=any_url.startswith("sqlite"))
        world.close()


def test_lease_and_journal_deleted_while_the_holders_supervisor_is_stopped_are_waited_out(
    tmp_path: Path, postgres_url: str
) -> None:
    """An operator's reset. Whoever starts just then finds that the bot is known, and nothing else."""
    for world in harness.world(tmp_path, postgres_url):
        first = world.run("--deployment", "v1", ttl="3")
        world.works(1)
        first.signal(signal.SIGSTOP)
        world.sql("DELETE FROM bot_leases; DELETE FROM bot_terms")
        deleted = clock.now()
        world.run("--deployment", "v2", ttl="3")
        world.works(2)
        began = max(first for first, _ in world.stamps().values())
        assert world.overlap() == 0 and began > deleted + 3.0
        assert world.terms()[1] > world.terms()[0]
        first.signal(signal.SIGCONT)
        world.close()


async def test_after_a_promotion_that_lost_the_last_commits_nobody_begins_for_a_whole_ttl_and_no_term_comes_twice(
    tmp_path: Path,
) -> None:
    ttl = 3.0
    old = Postgres().start()
    new = None
    loop = asyncio.get_running_loop()
    try:
        async with Proxy(old.port) as proxy:
            for world in harness.world(tmp_path, f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"):
                world.run("--deployment", "v1", ttl="3")
                await loop.run_in_executor(None, world.works, 1)
                new = await loop.run_in_executor(None, lambda: Postgres(copy_of=old).start())
                for pid in old.processes("walsender"):
                    os.kill(pid, signal.SIGSTOP)  # what follows is committed, and lost
                world.run("--deployment", "v2", ttl="3")
                await loop.run_in_executor(None, world.works, 2)
                assert world.terms() == [1, 2]
                await loop.run_in_executor(None, old.signal, signal.SIGKILL)
                await loop.run_in_executor(None, new.promote)
                connection = await asyncpg.connect(new.url())
                assert await connection.fetchval("SELECT term FROM bot_leases") == 1
                await connection.close()
                promoted = clock.now()
                proxy.target = new.port
                proxy.reset()
                await loop.run_in_executor(None, until, _grows(world, 2), 30)
                began = min(first for (_, term), (first, _) in world.stamps().items() if term > 2)
                assert began > promoted + ttl and world.overlap() == 0
                await loop.run_in_executor(None, world.close)
    finally:
        for server in (old, new):
            if server is not None:
                server.stop()


class Crashing:
    """A server that crashes, and forgets what it was not made to write."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.server = Postgres().start()
        self.pooler = PgBouncer(self.server.port, 1) if setting == "off, and a pooler" else None
        self.store: PostgresStore | None = None

    async def lazy(self, on: bool) -> None:
        connection = await asyncpg.connect(self.server.url())
        await connection.execute(f"ALTER SYSTEM SET synchronous_commit = {'off' if on else 'on'}")
        await connection.execute("SELECT pg_reload_conf()")
        while (await connection.fetchval("SHOW synchronous_commit") == "off") is not on:
            await asyncio.sleep(0.01)
        await connection.close()

    async def again(self, *, crash: bool = True) -> PostgresStore:
        if self.store is not None:
            await self.store.aclose()
        if crash:
            self.server.signal(signal.SIGKILL)
            self.server.start()
        await self.lazy(self.setting.startswith("off"))
        self.store = PostgresStore(self.server.url(port=self.pooler.port if self.pooler else None))
        self.store._plans = False  # which commits, and waits for it
        await self.store.open(DEADLINE)
        await self.store.read("bot", "b", DEADLINE)
        if self.setting == "switched off later":
            await self.lazy(True)
        writers = self.server.processes("walwriter")
        assert len(writers) == 1
        os.kill(writers[0], signal.SIGSTOP)  # which would write within a moment what nobody waits for
        return self.store

    async def written(self) -> str:
        connection = await asyncpg.connect(self.server.url())
        at = await connection.fetchval("SELECT pg_current_wal_flush_lsn()::text")
        await connection.close()
        return str(at)

    def stop(self) -> None:
        if self.pooler is not None:
            self.pooler.stop()
        self.server.signal(signal.SIGCONT)
        self.server.stop()


@pytest.mark.parametrize(
    "setting",
    [
        "on",
        "off",
        "switched off later",
        pytest.param("off, and a pooler", marks=pytest.mark.skipif(not has_pgbouncer(), reason="needs pgbouncer")),
    ],
)
async def test_grants_and_renewals_outlast_a_crash_of_a_server_that_waits_for_no_disk_and_a_release_waits_for_none(
    setting: str,
) -> None:
    crashing = Crashing(setting)
    server = crashing.server
    end: Any = {"reason": Reason.STOPPED, "pass_on": True, "leave": True, "deadline": DEADLINE}
    try:
        first = PostgresStore(server.url())
        await first.open(DEADLINE)
        await first.register(registration("b"), DEADLINE)
        await first.aclose()
        store = await crashing.again(crash=False)
        await store.register(registration("a"), DEADLINE)
        store = await crashing.again()
        assert await claim(store, "a")
        store = await crashing.again()
        grant = await acquire(store, "a", lease_of(await store.read("bot", "a", DEADLINE)))
        store = await crashing.again()
        lease = lease_of(await store.read("bot", "a", DEADLINE))
        assert (lease.term, lease.holder, lease.beat) == (grant.term, "a", 0)
        assert await store.renew("bot", "a", Held(grant.term, "nonce-a", (0,)), 7, DEADLINE)
        store = await crashing.again()
        assert await store.renew("bot", "a", Held(grant.term, "nonce-a", (7,)), 8, DEADLINE, "active")
        store = await crashing.again()
        lease = lease_of(await store.read("bot", "a", DEADLINE))
        assert (lease.term, lease.holder, lease.beat) == (grant.term, "a", 8)

        before, held = await crashing.written(), Held(grant.term, "nonce-a", (8,))
        assert await store.release("bot", "a", held, **end)
        assert await crashing.written() == before
        lost = lease_of(await store.read("bot", "b", DEADLINE))
        assert lost.holder is None
        store = await crashing.again()
        view = await store.read("bot", "b", DEADLINE)
        assert lease_of(view) == lease and view.assigned is not None and view.assigned.instance_id == "a"
        assert await acquire(store, "b", lost) is None  # what it had seen is not so any more
        assert await store.release("bot", "a", held, **end)
        after = await acquire(store, "b", lease_of(await store.read("bot", "b", DEADLINE)))
        store = await crashing.again()  # has not lost the release before it either
        lease = lease_of(await store.read("bot", "b", DEADLINE))
        assert (lease.term, lease.holder) == (after.term, "b") and after.term == grant.term + 1
        await store.aclose()
    finally:
        crashing.stop()


async def test_what_was_stored_of_the_bot_api_and_what_a_fleet_took_outlast_a_crash_of_such_a_server_too() -> None:
    crashing = Crashing("off")
    try:
        first = PostgresStore(crashing.server.url())
        await first.open(DEADLINE)
        slot = slot_name("f", 1)
        await first.register(registration("i", bot=slot), DEADLINE)
        assert await claim(first, "i", bot=slot)
        lease = lease_of(await first.read(slot, "i", DEADLINE))
        grant = await acquire(first, "i", lease, bot=slot)
        hold = Hold("f", 1, "i", grant.term, "nonce-i", grant.origin, 10.0)
        await PostgresFleet(first).mark(hold, DEADLINE, is_open=True)
        await PostgresFleet(first).add("f", ["x"], 10.0, DEADLINE)
        await first.aclose()
        store, me = await crashing.again(crash=False), Holding("bot", 1, "nonce")
        (row,) = await PostgresFleet(store).rows(hold, [1], DEADLINE)
        ((_, term),) = await PostgresFleet(store).take(hold, [(row.bot, row.term, row.slot)], DEADLINE)
        store = await crashing.again()
        (row,) = await PostgresFleet(store).rows(hold, [1], DEADLINE)
        assert (row.term, row.ours) == (term, True)
        assert await PostgresInbox(store).begin(me, "api", DEADLINE)
        store = await crashing.again()
        received = Changes(received=[Update(5, "{}", 0)], offset=6)
        assert await PostgresInbox(store).save(me, "api", received, DEADLINE)
        store = await crashing.again()
        begun = await PostgresInbox(store).begin(me, "api", DEADLINE)
        assert begun is not None and (begun.offset, [u.update_id for u in begun.updates]) == (6, [5])
        store = await crashing.again()
        view = await store.read(slot, "i", DEADLINE)
        assert await PostgresFleet(store).bury("f", slot, lease_of(view), view.origin, How.EXPIRED, DEADLINE)
        store = await crashing.again()
        assert lease_of(await store.read(slot, "i", DEADLINE)).holder is None
        await store.aclose()
    finally:
        crashing.stop()


def quiet(worlds: contextlib.ExitStack, nodes: int, *, same_host: bool = False) -> Simulated:
    """A world of the simulation (the core and the store statements as they are, virtual time) without faults."""
    none = {name: False for name, kind in Plan.__annotations__.items() if kind == "bool"}
    plan = Plan(nodes=nodes, length=0, timings=[TIMING], loss=0, late=0, ambush=0, **none | {"same_host": same_host})
    world = worlds.enter_context(contextlib.closing(Simulated(1, plan)))
    world.calm = True
    for _ in range(nodes):
        world.deploy("d1")
    world.run_until(world.time + 30)
    assert len(world.running) == 1
    return world


@pytest.mark.parametrize("same_host", [False, True])
def test_of_a_hundred_candidates_one_follows_a_dead_holder_and_the_others_write_next_to_nothing(
    worlds: contextlib.ExitStack, same_host: bool
) -> None:
    world = quiet(worlds, 100, same_host=same_host)
    dead = next(iter(world.running)).node
    written: Counter[core.Verb] = Counter()
    serve = world.serve

    def counted(node: Node, q: core.Question) -> None:
        written[q.verb] += 1
        serve(node, q)

    world.serve = counted  # type: ignore[method-assign]
    died = world.time
    world.crash(dead)
    # it saw the last renewal when it looked next
    waited_out = TIMING.patience(TIMING.ttl) + TIMING.lock_delay + 2 * TIMING.renew_every
    world.run_until(died + (1 if same_host else waited_out))
    assert [w.term for w in world.running] == [2]  # the world itself cries out at two
    world.run_until(died + 3 * TIMING.ttl)
    assert [w.term for w in world.running] == [2]
    assert written[core.Verb.ACQUIRE] == 1 and written[core.Verb.CLAIM] <= 3
    # heartbeats: each standby once in its ttl
    assert written[core.Verb.TOUCH] <= 101 * 4


def test_an_hour_without_a_database_is_asked_after_gently_and_over_at_once(worlds: contextlib.ExitStack) -> None:
    """In virtual time: how often it is asked, and how soon somebody works when it is back."""
    world = quiet(worlds, 2)
    there, asked = True, 0
    delay = world.delay

    def lost(node: Node, *, answer: bool = False) -> float | None:
        nonlocal asked
        asked += not answer
        return delay(node, answer=answer) if there else None

    world.delay = lost  # type: ignore[method-assign]
    there = False
    world.run_until(world.time + 3600)
    assert not world.running
    # each waits for an answer, and then for its next turn
    assert asked <= 2 * 3600 / (TIMING.attempt + TIMING.renew_every) * 1.1
    there, back = True, world.time
    while not world.running:
        world.run_until(world.time + 0.05)
    assert world.time - back <= 2 * TIMING.renew_every + TIMING.attempt


@pytest.mark.skipif(not has_pgbouncer(), reason="no pgbouncer (Debian: apt-get install pgbouncer)")
@pytest.mark.parametrize("size", [1, 2])
def test_whole_deployments_change_places_and_die_through_a_transaction_pooler(
    tmp_path: Path, postgres_server: Postgres, postgres_url: str, size: int
) -> None:
    pooler = PgBouncer(postgres_server.port, size)
    try:
        for world in harness.world(tmp_path, postgres_url.replace(str(postgres_server.port), str(pooler.port), 1)):
            old = world.run("--deployment", "v1")
            world.works(1)
            new = world.run("--deployment", "v2")
            world.works(2)
            old.says("passive")
            new.signal(signal.SIGKILL)
            world.works(3)
            world.run("--deployment", "v3")
            world.works(4)
            assert world.overlap() == 0 and world.terms() == [1, 2, 3, 4]
            world.close()
    finally:
        pooler.stop()


# Load -----------------------------------------------------------------------------------------------------------------


async def test_beats_stay_fast_and_small_beside_a_transaction_that_nobody_ends(postgres_url: str) -> None:
    """Whatever it might still see is kept for it: every beat leaves a dead row behind."""
    async with contextlib.AsyncExitStack() as stack:
        store, idle, plain = PostgresStore(postgres_url), *[await asyncpg.connect(postgres_url) for _ in range(2)]
        for close in (store.aclose, idle.close, plain.close):
            stack.push_async_callback(close)
        await store.open(5)
        grant = await StoreContract().held(store)
        beat = 0

        async def beats(count: int) -> tuple[float, int]:
            """The quickest tenth, in those of a commit that touches no row (how fast the machine is varies by itself),
            and the size of the table then."""
            nonlocal beat
            took: dict[str, list[float]] = {"beat": [], "commit": []}
            for _ in range(count):
                began = time.perf_counter()
                held = Held(grant.term, "nonce-a", (beat,))
                assert await store.renew("bot", "a", held, beat + 1, 5) is not None
                between = time.perf_counter()
                await plain.fetchval("SELECT pg_current_xact_id()")
                took["beat"].append(between - began)
                took["commit"].append(time.perf_counter() - between)
                beat += 1
            renewals, commits = (statistics.quantiles(each, n=10)[0] for each in took.values())
            return renewals / commits, await plain.fetchval("SELECT pg_relation_size('bot_leases')")

        async with idle.transaction(isolation="repeatable_read"):
            await idle.fetchval("SELECT count(*) FROM bot_leases")
            first, _ = await beats(1000)
            last, size = await beats(1000)
            assert size < 2000 * 200  # 141 B each, measured: a day of the default ttl is 6 MB
            assert last < 2 * first  # measured: the same
        await plain.execute("VACUUM bot_leases")
        _, after = await beats(1000)
        assert after <= size  # what was left behind is used again


WRITERS = """
import asyncio, os, sys
from botlease.stores.sqlite import SqliteStore
from botlease.testing import registration

async def writer(me):
    store = SqliteStore(sys.argv[1])
    await store.open(60)
    await store.register(registration(me), 60)
    for n in range(20):
        await store.touch(me, f"state {n}", 60)
    await store.aclose()

pids = []
for n in range(16):
    pids.append(os.fork())
    if not pids[-1]:
        asyncio.run(writer(f"writer {n}"))
        os._exit(0)
print([os.waitpid(pid, 0)[1] for pid in pids])
"""


def test_of_sixteen_processes_that_write_into_one_file_without_pause_none_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path / "lease.db")],
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{[0] * 16}\n", done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "lease.db")) as db:
        assert db.execute("SELECT DISTINCT state FROM bot_instances").fetchall() == [("state 19",)]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_notification_that_is_lost_with_its_session_costs_no_more_than_a_poll(
    tmp_path: Path, postgres_url: str
) -> None:
    listener = f"listener_{os.getpid()}"
    throw_out = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{listener}'"
    as_listener = {"BOTLEASE_DATABASE_URL": postgres_url.replace("postgres@", f"{listener}@")}
    elsewhere = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")  # it cannot see the other one die
    for world in harness.world(tmp_path, postgres_url):
        world.sql(f"CREATE ROLE {listener} LOGIN SUPERUSER")
        old = world.run("--deployment", "v1", ttl="10")
        world.works(1)
        new = world.run("--standby", "--deployment", "v1", ttl="10", wrap=elsewhere, env=as_listener)
        new.says("standby")
        old.signal(signal.SIGTERM)
        while old.process.poll() is None:  # whoever listens is not there when it would be told
            world.sql(throw_out)
        world.works(2)
        assert world.gap(2) < 5  # a poll is 2 s; waited out, it would be more than the ttl
        assert world.overlap() == 0
        new.signal(signal.SIGKILL)  # unshare heeds nothing else


COLUMNS = {
    "bot_deployments": {"generation", "bot", "deployment", "first_seen"},
    "bot_failures": {"bot", "deployment", "failures"},
    "bot_instances": {
        *("instance_id", "started_at", "last_heartbeat", "is_active", "bot", "deployment", "generation", "host", "pid"),
        *("state", "term", "version", "stop_reason", "beat", "ended_at"),
    },
    "bot_leases": {
        *("bot", "term", "beat", "nonce", "holder", "ttl", "origin", "proof", "served", "renewed_at", "paused"),
    },
    "bot_terms": {
        *("bot", "term", "instance_id", "deployment", "how", "acquired_at", "released_at", "reason", "probation"),
        *("host", "last_beat", "ttl"),
    },
    "botlease_schema": {"version", "origin"},
}
THE_INBOX = {"bot_polls", "bot_updates"}  # holds messages, and says so: docs/gateway.md


def test_the_tables_hold_these_columns_and_no_others(tmp_path: Path, any_url: str) -> None:
    """Whoever may read the database of the bot reads them: a new one is thought about first."""
    for world in harness.world(tmp_path, any_url):
        world.run()
        world.works(1)
        world.close()
    if any_url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(tmp_path / "lease.db")) as db:
            rows = db.execute(
                "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c "
                "WHERE m.type IN ('table', 'view') AND m.name NOT LIKE 'sqlite_%'"
            ).fetchall()
    else:
        columns = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
        rows = asyncio.run(query(any_url, columns))
    tables: dict[str, set[str]] = {}
    for table, column in rows:
        tables.setdefault(table, set()).add(column)
    if any_url.startswith("sqlite"):
        assert tables["botlease_schema"] - COLUMNS["botlease_schema"] == {"store_id"}
        tables["botlease_schema"] -= {"store_id"}
    else:
        assert tables["bot_leases"] - COLUMNS["bot_leases"] == {"fleet", "slot"}  # fleets are for PostgreSQL
        tables["bot_leases"] -= {"fleet", "slot"}
    assert {name: found for name, found in tables.items() if name not in THE_INBOX} == COLUMNS


async def query(url: str, statement: str) -> list[tuple[str, ...]]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(statement)
    await connection.close()
    return [tuple(row) for row in rows]


async def test_of_two_hosts_the_one_that_is_a_replica_is_not_stuck_to_when_the_primary_is_back() -> None:
    """It answers, and is of no use: whoever asked it once, as the primary was away for a moment, never came back."""
    primary = Postgres().start()
    replica = None
    loop = asyncio.get_running_loop()
    try:
        replica = await loop.run_in_executor(None, lambda: Postgres(copy_of=primary).start())
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{replica.port}"
        store = PostgresStore(f"postgresql://postgres@{hosts}/postgres")
        try:
            await store.open(DEADLINE)
            await loop.run_in_executor(None, primary.signal, signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(StoreError):
                    await store.open(DEADLINE)
            await loop.run_in_executor(None, primary.start)
            for left in (2, 1, 0):
                try:
                    await store.open(DEADLINE)
                    break
                except StoreError:
                    assert left
        finally:
            await store.aclose()
    finally:
        for server in (primary, replica):
            if server is not None:
                server.stop()
