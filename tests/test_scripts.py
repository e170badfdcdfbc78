"""The seed's scripts and its bot, as a platform and an operator use them."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import BOTLEASE, World, clean_env, until
from servers import free_port

from botlease.model import Held
from botlease.telegram.simulator import Chat, Simulator

ROOT = Path(__file__).parent.parent
TOKEN = "424242:AAtokenOfTheTests_abcdefghijklmnop"


@pytest.fixture
def telegram() -> Iterator[tuple[Simulator, Chat, Callable[..., Any]]]:
    """A simulator in a thread of its own, a user, and a way to call into that thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(f: Callable[..., Any], *args: Any) -> Any:
        async def run() -> Any:
            result = f(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), loop).result(10)

    simulator = call(Simulator.start)
    yield simulator, call(simulator.user, 424242), call
    call(simulator.stop)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


class Railway:
    """Does to ``railway_startup.py`` what the platform does."""

    def __init__(self, folder: Path, url: str, api: str) -> None:
        self.folder, self.url, self.api = folder, url, api
        self.started: list[tuple[subprocess.Popen[bytes], int, Path]] = []

    def deploy(self, deployment: str, **more: str) -> int:
        port = free_port()
        log = self.folder / f"railway{len(self.started)}.log"
        env = clean_env(
            DATABASE_URL=self.url,
            PORT=str(port),
            RAILWAY_ENVIRONMENT_ID="prod",
            RAILWAY_DEPLOYMENT_ID=deployment,
            TELEGRAM_BOT_TOKEN=TOKEN,
            TELEGRAM_API_URL=self.api,
            **more,
        )
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "railway_startup.py"], cwd=ROOT, env=env, stdout=out, stderr=out
            )
        self.started.append((process, port, log))
        return len(self.started) - 1

    def get(self, n: int, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.started[n][1]}{path}", timeout=5) as r:
                return r.status, json.load(r)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)
        except OSError:
            return 0, {}

    def until(self, n: int, path: str, status: int, limit: float = 20.0) -> dict[str, Any]:
        until(lambda: self.get(n, path)[0] == status, limit)
        return self.get(n, path)[1]

    def close(self) -> None:
        for process, _, _ in self.started:
            process.terminate()
        for process, _, _ in self.started:
            process.wait(20)


@pytest.fixture
def railway(tmp_path: Path, any_url: str, telegram: Any) -> Iterator[Railway]:
    r = Railway(tmp_path, any_url, telegram[0].url)
    yield r
    r.close()


def answered(telegram: Any, text: str) -> str:
    _, user, call = telegram
    message = call(user.say, text)
    until(lambda: message.replies, 30)
    return str(message.replies[0][1])


def test_a_deployment_on_railway_is_handed_over_within_its_health_window(railway: Railway, telegram: Any) -> None:
    old = railway.deploy("d-1")
    railway.until(old, "/health", 200)
    railway.until(old, "/leader", 200)
    assert "Bought 0.1 BTC" in answered(telegram, "/buy BTC 0.1")

    new = railway.deploy("d-2", BOT_VERSION="2", BOTLEASE_PROBATION="5")
    railway.until(new, "/livez", 200)
    railway.until(new, "/leader", 200)
    assert railway.get(new, "/health")[0] == 503  # on probation: Railway keeps the old one
    assert railway.get(new, "/readyz")[0] == 200
    assert railway.get(old, "/leader") == (503, {"state": "passive", "term": None})
    assert railway.get(old, "/health")[0] == 200  # passive is healthy
    assert "(version 2)" in answered(telegram, "/start")
    assert "BTC 0.1" in answered(telegram, "/portfolio")

    railway.until(new, "/health", 200)  # only now would Railway stop the old one
    assert railway.started[old][0].wait(20) == 0  # and it is gone already: Railway does not restart what ended with 0
    assert "Sold 0.1 BTC" in answered(telegram, "/sell BTC 0.1")
    report = telegram[2](telegram[0].report, 424242)
    assert (report.conflicts, report.lost, report.twice) == (0, 0, 0)


def test_a_warm_trading_bot_waits_at_its_gate_and_goes_on_in_its_term(railway: Railway, telegram: Any) -> None:
    old = railway.deploy("d-1")
    railway.until(old, "/leader", 200)
    new = railway.deploy("d-2", BOT_VERSION="2", BOTLEASE_WARM="1")
    railway.until(new, "/leader", 200)
    assert "ready: " in railway.started[new][2].read_text()
    assert "(version 2)" in answered(telegram, "/start")
    assert "Bought 0.1 BTC" in answered(telegram, "/buy BTC 0.1")  # the ledger knows the term of the gate
    report = telegram[2](telegram[0].report, 424242)
    assert (report.conflicts, report.lost, report.twice) == (0, 0, 0)


def test_an_old_container_that_is_restarted_does_not_steal_back(railway: Railway, telegram: Any) -> None:
    old = railway.deploy("d-1")
    railway.until(old, "/leader", 200)
    new = railway.deploy("d-2")
    railway.until(new, "/leader", 200)
    railway.started[old][0].kill()
    again = railway.deploy("d-1")
    railway.until(again, "/readyz", 200)
    assert railway.get(again, "/leader")[0] == 503
    assert railway.get(new, "/leader")[0] == 200


def test_the_scripts_answer_bad_input_with_one_line(tmp_path: Path) -> None:
    for env, says in (({"PORT": "http"}, "not a port number"), ({"DATABASE_URL": "mysql://x/y"}, "use postgresql://")):
        done = subprocess.run(
            [sys.executable, "railway_startup.py"], cwd=ROOT, env=clean_env(**env), capture_output=True, text=True
        )
        assert done.returncode == 78 and says in done.stderr and "Traceback" not in done.stderr


def test_without_a_token_the_bot_says_which_variable_to_set(sqlite_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "instance_manager.py", "--max-crashes", "0"],
        cwd=ROOT,
        env={k: v for k, v in clean_env(BOTLEASE_DATABASE_URL=sqlite_url).items() if "TOKEN" not in k},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78 and "set TELEGRAM_BOT_TOKEN" in done.stderr


# The operator's SQL, typed by hand ------------------------------------------------------------------------------


def shell(url: str, sql: str) -> str:
    """psql or sqlite3, as an operator has it."""
    if url.startswith("sqlite"):
        command = ["sqlite3", "-cmd", ".timeout 5000", url.removeprefix("sqlite:///"), sql]  # it does not wait itself
    else:
        command = ["psql", "-At", "-c", sql, url]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_three_statements_of_the_seed_take_effect(world: World) -> None:
    first = world.run("--deployment", "v1")
    world.works(1)
    second = world.run("--deployment", "v1")
    second.says("standby")

    (row,) = shell(world.url, "SELECT * FROM bot_instances WHERE is_active = TRUE;").strip().splitlines()
    standing_by = shell(world.url, "SELECT instance_id FROM bot_instances WHERE NOT is_active;").strip()
    assert standing_by not in row

    shell(world.url, "UPDATE bot_instances SET is_active = FALSE;")
    first.says("draining: term 1: the operator deactivated it", limit=1)
    until(lambda: "holder" in status(world.url)["lease"] and status(world.url)["lease"]["holder"] is None)
    assert len(world.stamps()) == 1  # and nobody promotes himself

    shell(world.url, f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{standing_by}';")
    world.works(2)
    assert status(world.url)["lease"]["holder"] == standing_by
    assert world.overlap() == 0


def test_an_update_takes_effect_within_200_ms_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    import harness

    for w in harness.world(tmp_path, postgres_url):
        first = w.run("--deployment", "v1")
        w.works(1)
        w.run("--deployment", "v1").says("standby")
        took = []
        for _ in range(5):
            (other,) = [i["instance_id"] for i in status(w.url)["instances"] if not i["is_active"]]
            seen = len(w.stamps())
            began = time.clock_gettime(time.CLOCK_BOOTTIME)
            sql = f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{other}'"
            asyncio.run(execute(w.url, sql))
            w.works(seen + 1)
            ends = sorted(end for _, end in w.stamps().values())
            took.append(ends[-2] - began)  # the old one's last act
        # the witness stops within milliseconds of SIGTERM
        assert sorted(took)[2] < 0.2
        assert w.overlap() == 0
        assert first.process.poll() is None


async def execute(url: str, sql: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


def status(url: str) -> dict[str, Any]:
    done = subprocess.run(
        [*BOTLEASE, "status", "--json"], env=clean_env(BOTLEASE_DATABASE_URL=url), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_status_as_json_has_the_documented_form(world: World) -> None:
    world.run("--name", "mybot", "--deployment", "v1")
    world.works(1)
    shown = status(world.url)
    assert set(shown) == {"bot", "paused", "lease", "instances", "quarantine", "handover", "gateway", "fleet"}
    assert (shown["bot"], shown["paused"], shown["quarantine"], shown["handover"]) == ("mybot", False, [], None)
    assert shown["gateway"] == []
    (instance,) = shown["instances"]
    assert list(instance) == [
        *("instance_id", "is_active", "state", "term", "deployment", "generation"),
        *("host", "pid", "started_at", "last_heartbeat", "silent"),
    ]
    assert shown["lease"]["holder"] == instance["instance_id"]
    assert (instance["is_active"], instance["state"], instance["term"]) == (True, "active", 1)
    assert instance["silent"] is False


def test_promote_moves_the_bot(world: World) -> None:
    world.run("--deployment", "v1")
    world.works(1)
    world.run("--deployment", "v1").says("standby")
    (other,) = [i["instance_id"] for i in status(world.url)["instances"] if not i["is_active"]]
    done = subprocess.run([*BOTLEASE, "promote", other], env=clean_env(BOTLEASE_DATABASE_URL=world.url))
    assert done.returncode == 0
    world.works(2)
    assert world.overlap() == 0


# The ledger -----------------------------------------------------------------------------------------------------


async def test_the_database_refuses_an_order_of_a_stale_term_and_a_second_one_for_a_message(
    any_url: str,
) -> None:
    sys.path.insert(0, str(ROOT))
    from botlease.model import Reason
    from botlease.stores import open_store
    from botlease.testing import DEADLINE, StoreContract, acquire, lease_of
    from trading_bot.ledger import AlreadyPlaced, NotEnough, Order, Stale, open_ledger

    url = any_url
    store = open_store(url)
    await store.open(DEADLINE)
    grant = await StoreContract().held(store)
    ledger = open_ledger(url, "bot", grant.term)
    await ledger.open()
    order = Order(chat=1, message=7, symbol="BTC", amount=0.1, price=50_000.0)
    await ledger.place(order)
    with pytest.raises(AlreadyPlaced):
        await ledger.place(order)
    with pytest.raises(NotEnough):
        await ledger.place(Order(1, 8, "BTC", 5.0, 50_000.0))
    with pytest.raises(NotEnough):
        await ledger.place(Order(1, 9, "ETH", -1.0, 3_000.0))
    assert await ledger.holdings(1) == (5_000.0, {"BTC": 0.1})

    await store.release(
        "bot", "a", Held(grant.term, "nonce-a"), reason=Reason.STOPPED, pass_on=False, leave=False, deadline=DEADLINE
    )
    with pytest.raises(Stale):
        await ledger.place(Order(1, 10, "BTC", 0.01, 50_000.0))
    lease = lease_of(await store.read("bot", "a", DEADLINE))
    newer = await acquire(store, "a", lease)
    with pytest.raises(Stale):
        await ledger.place(Order(1, 10, "BTC", 0.01, 50_000.0))
    after = open_ledger(url, "bot", newer.term)
    await after.open()
    await after.place(Order(1, 10, "BTC", 0.01, 50_000.0))
    await after.close()
    await ledger.close()
    await store.aclose()


async def test_prices_are_the_same_on_every_instance_and_move() -> None:
    sys.path.insert(0, str(ROOT))
    from trading_bot.prices import RandomWalk, UnknownSymbol

    a, b = RandomWalk(3), RandomWalk(3)
    one = await a.price("btc")
    assert one > 0 and abs(one - await b.price("BTC")) < one * 0.05
    assert await RandomWalk(4).price("BTC") != one
    with pytest.raises(UnknownSymbol):
        await a.price("DOGE; DROP TABLE")


def test_the_file_of_the_lease_can_be_read_by_an_operator_while_it_is_used(sqlite_world: World) -> None:
    sqlite_world.run()
    sqlite_world.works(1)
    for _ in range(50):
        db = sqlite3.connect(sqlite_world.url.removeprefix("sqlite:///"), timeout=5)
        assert db.execute("SELECT count(*) FROM bot_instances WHERE is_active = TRUE").fetchone()[0] == 1
        db.close()
