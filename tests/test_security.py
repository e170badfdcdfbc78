"""Secrets, names, pages, files, rights: whatever reaches us from outside does no harm and shows no secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pty
import re
import select
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from harness import BOTLEASE, World, clean_env, until
from servers import free_port
from test_gateway import BOT, TOKEN, House, opened

from botlease import http, presence, procfs, settings
from botlease.settings import ConfigurationError, bot_name
from botlease.stores import Registration, StoreError, open_store
from botlease.stores.inbox import Holding, open_inbox
from botlease.testing import StoreContract
from botlease.text import passwords, redact, safe
from botlease.web.gate import GateServer
from botlease.web.health import Snapshot, serve

CANARY = "CaNaRy99"
FULL = f"123456789:AA{CANARY}efghijklmnopqrstuv"


def cli(*args: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BOTLEASE, *args],
        env=clean_env(HOME=str(tmp_path), **env),
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )


def on_a_terminal(*args: str, tmp_path: Path, **env: str) -> bytes:
    """What reaches the terminal: click strips the escapes of what goes elsewhere."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [*BOTLEASE, *args], env=clean_env(HOME=str(tmp_path), **env), stdin=its, stdout=its, stderr=its, cwd=tmp_path
    )
    os.close(its)
    out, end = b"", time.monotonic() + 15
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:
                break
            out += data
        elif process.poll() is not None:
            break
    process.kill()
    process.wait()
    os.close(ours)
    return out


@pytest.fixture
async def house(sqlite_url: str) -> AsyncIterator[House]:
    store = open_store(sqlite_url)
    await store.open(5.0)
    await store.aclose()
    async for h in opened(sqlite_url):
        yield h


async def test_the_trigger_of_the_tables_runs_for_no_table_but_ours(postgres_url: str) -> None:
    """It runs with the rights of the owner: whoever could put it on a table of his own would have them."""
    import asyncpg

    n = postgres_url.rpartition("_")[2]
    store = open_store(postgres_url)
    await store.open(5.0)
    await store.aclose()
    owner = await asyncpg.connect(postgres_url)
    try:
        await owner.execute(f"CREATE TABLE treasure(x text); CREATE ROLE mallory{n} LOGIN")
        mallory = await asyncpg.connect(postgres_url.replace("postgres@", f"mallory{n}@"))
        with pytest.raises(asyncpg.PostgresError):
            await mallory.execute("""
              CREATE TEMP TABLE t(bot text, instance_id text, is_active boolean, beat bigint, version text,
                                  deployment text, generation bigint);
              GRANT ALL ON t TO PUBLIC;
              CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                EXECUTE 'INSERT INTO public.treasure VALUES (current_user)'; RETURN NULL; END $$;
              CREATE TRIGGER a BEFORE UPDATE OF is_active ON t FOR EACH ROW WHEN (NEW.is_active)
                EXECUTE FUNCTION public.botlease_one_active();
              CREATE TRIGGER b AFTER UPDATE ON t FOR EACH ROW WHEN (NOT NEW.is_active) EXECUTE FUNCTION pg_temp.f();
              INSERT INTO t VALUES ('b', '1', FALSE, 0, '0.1.0', 'd', 1), ('b', '2', TRUE, 0, '0.1.0', 'd', 1);
              UPDATE t SET is_active = TRUE WHERE instance_id = '1'""")
        await mallory.close()
        assert await owner.fetch("SELECT * FROM treasure") == []
    finally:
        await owner.execute(f"DROP OWNED BY mallory{n}; DROP ROLE mallory{n}")
        await owner.close()


async def test_who_knows_the_bot_id_alone_gets_no_update_and_loses_none(house: House) -> None:
    async def strict(request: http.Request) -> http.Response:  # as the Bot API: 401 for another token
        if f"/bot{TOKEN}/" not in request.target:
            return http.Response(401, b'{"ok":false,"error_code":401,"description":"Unauthorized"}')
        return await house.simulator._handle(request)

    server = await http.serve(strict, 0)
    upstream = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    bot = await house.gateway(upstream=upstream)
    house.user().say("my card is 4711")
    assert await bot.poll(3, prefix="") == ["my card is 4711"]
    seen = ""
    for n in range(7):
        async with bot.session.get(f"{bot.base}/batch/bot{BOT}:x{n}/getUpdates?timeout=1") as r:
            seen += await r.text()
    await bot.gateway.close()  # the bot is killed with its update in hand
    bot.offset = 0
    successor = await house.gateway(term=2, upstream=upstream)
    again = await successor.poll(6, prefix="")
    server.close()
    assert "4711" not in seen
    assert again == ["my card is 4711"]


async def test_a_request_from_a_web_page_is_refused_by_the_gateway(house: House) -> None:
    bot = await house.gateway()
    pages = [{"Origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1", "")]
    rebound = [{"Host": host} for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.")]
    methods = ("getMe", "sendMessage", "setWebhook", "deleteWebhook", "logOut", "close", "getUpdates")
    for method in methods:
        for headers in pages + rebound:
            for verb in ("GET", "POST"):
                url = f"{bot.base}/bot{TOKEN}/{method}"
                async with bot.session.request(verb, url, headers=headers) as r:
                    assert r.status in (400, 403), (verb, method, headers)
    assert not any(house.called(method) for method in methods)
    assert (await bot.call("getMe"))["ok"]


async def test_who_does_not_know_the_path_of_a_gate_neither_passes_it_nor_counts_as_ready() -> None:
    ready: list[int] = []
    gate = GateServer()
    gate.arrived = lambda: ready.append(1)
    await gate.listen()
    url = gate.shut()
    former, url = url, gate.shut()  # of a process that is gone
    gate.open(7)
    base = url.partition("/gate/")[0]
    async with aiohttp.ClientSession() as session:
        for verb, address in (
            *(("GET", f"{base}{path}") for path in ("/", "/gate", "/gate/", "/gate/x", "/health")),
            *((verb, url) for verb in ("POST", "HEAD", "OPTIONS")),
            *(("GET", other) for other in (former, url[:-1], f"{url}x", f"{url}/", f"{url}?x=1")),
        ):
            async with session.request(verb, address) as r:
                assert r.status == 404 and "7" not in await r.text(), (verb, address)
        assert ready == []
        async with session.get(url) as r:
            assert await r.json() == {"term": 7} and ready == [1]
    gate.close()


async def test_a_gateway_serves_a_few_tokens_and_no_thousands(house: House) -> None:
    bot = await house.gateway()

    async def one(n: int) -> int:
        async with bot.session.post(f"{bot.base}/bot{10_000 + n}:x/botleaseDone", json={"update_ids": []}) as r:
            return r.status

    await asyncio.gather(*(one(n) for n in range(200)))
    assert len(bot.gateway.pollers) <= 32


@pytest.mark.parametrize(
    "url",
    [
        f"u:{CANARY}@h:5432/d",
        f"postgresql:/u:{CANARY}@h/d",
        f"postgres:u:{CANARY}@h/d",
        f"mysql://u:a {CANARY}@h/d",
        f"host=h user=u password='{CANARY} x'",
        f"host=h password = {CANARY}",
        f"postgresql://u@realm:{CANARY}@127.0.0.1:1/d",
        f"postgresql://u:{CANARY}/x@127.0.0.1:1/d",
        f"postgresql://u:{CANARY}#x@127.0.0.1:1/d",
    ],
)
@pytest.mark.parametrize("command", [("run", "--", "true"), ("status",), ("doctor", "--no-telegram")])
def test_a_database_url_that_cannot_be_used_is_not_quoted(tmp_path: Path, url: str, command: tuple[str, ...]) -> None:
    done = cli(*command, tmp_path=tmp_path, DATABASE_URL=url)
    assert done.returncode != 0 and CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:a {CANARY}@h/d",
        f"postgresql://u:a\t{CANARY}@h/d",
        f"postgresql://u@h/d?password=a'{CANARY}",
        f"postgresql://u@h/d?password=a {CANARY}",
        f"postgresql://u@h/d?p%61ssword={CANARY}",
        f'postgresql://h/d?user=u&password="{CANARY}"',
        f"postgresql://u@h/d?sslpassword=a'{CANARY}",
    ],
)
def test_every_password_that_the_driver_would_read_is_blotted_out_of_urls_and_titles(url: str) -> None:
    assert CANARY not in open_store(url).url
    text = url
    for secret in passwords(url):
        text = text.replace(secret, "*")
    assert CANARY not in text


@pytest.mark.parametrize("end", ["\r", "\n", " ", " x"])
def test_the_doctor_keeps_a_token_with_something_behind_it_to_itself(tmp_path: Path, end: str) -> None:
    env = {"BOT_TOKEN": FULL + end, "TELEGRAM_API_URL": "http://127.0.0.1:1", "DATABASE_URL": "sqlite:///x.db"}
    done = cli("doctor", tmp_path=tmp_path, **env)
    assert CANARY not in done.stdout + done.stderr and "Traceback" not in done.stderr


async def test_the_doctor_survives_a_bot_api_that_speaks_something_else(tmp_path: Path) -> None:
    async def junk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"SSH-2.0-x\r\n")
        writer.close()

    async def echo(request: http.Request) -> http.Response:
        return http.Response(404, json.dumps({"ok": False, "description": "no " + request.target}).encode())

    for server in (await asyncio.start_server(junk, "127.0.0.1", 0), await http.serve(echo, 0)):
        api = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        env = {"BOT_TOKEN": FULL, "TELEGRAM_API_URL": api, "DATABASE_URL": "sqlite:///x.db"}
        done = await asyncio.to_thread(lambda: cli("doctor", tmp_path=tmp_path, **env))  # noqa: B023
        server.close()
        await server.wait_closed()
        assert "Traceback" not in done.stderr and CANARY not in done.stdout + done.stderr


def test_a_token_is_no_name_of_a_bot_and_no_deployment() -> None:
    from botlease import settings

    with pytest.raises(ConfigurationError):
        bot_name(FULL, {})
    with pytest.raises(ConfigurationError):
        bot_name(None, {"BOTLEASE_NAME": FULL})
    with pytest.raises(ConfigurationError):
        settings.make({"HOME": "/x", "BOTLEASE_DEPLOYMENT": FULL})


@pytest.mark.parametrize(
    "args",
    [
        ("run", f"postgresql://u:{CANARY}@h/d"),
        ("run", "--", f"DATABASE_URL=postgresql://u:{CANARY}@h/d", "python"),
        ("status", f"postgresql://u:{CANARY}@h/d"),
        ("run", "--ttl", f"postgresql://u:{CANARY}@h/d", "--", "true"),
        ("run", "--ttl", FULL, "--", "true"),
        ("run", "--healthy-if", f"https://u:{CANARY}@h", "--", "true"),
        ("run", "--danger-signal", FULL, "--", "true"),
    ],
)
def test_an_argument_in_the_wrong_place_is_named_without_the_secret_in_it(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    done = cli(*args, tmp_path=tmp_path, DATABASE_URL="sqlite:///x.db")
    assert done.returncode in (2, 78, 127) and CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize("variable", ["BOTLEASE_TTL", "BOTLEASE_PROFILE", "BOTLEASE_PLATFORM", "BOTLEASE_HEALTH_PORT"])
def test_a_variable_that_got_the_token_by_mistake_is_named_without_it(tmp_path: Path, variable: str) -> None:
    done = cli("run", "--", "true", tmp_path=tmp_path, DATABASE_URL="sqlite:///x.db", **{variable: FULL})
    assert done.returncode == 78 and CANARY not in done.stderr


async def test_the_health_server_takes_in_no_bodies(tmp_path: Path) -> None:
    seen = []

    def snapshot() -> Snapshot:
        seen.append(1)
        return Snapshot("active", ready=True, leading=True, waiting_for=0.0, term=3)

    server = await serve(snapshot, 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 67000000\r\n\r\n")
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        for _ in range(64):  # 64 MB, which it would keep in memory
            writer.write(b"x" * 1_000_000)
            await asyncio.wait_for(writer.drain(), 5)
    writer.close()
    server.close()


def test_slow_clients_of_the_health_port_do_not_cost_the_bot_its_lease(sqlite_world: World) -> None:
    port = free_port()
    limited = ("sh", "-c", "sleep 60")
    log = sqlite_world.folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["prlimit", "--nofile=96", *BOTLEASE, "run", "--ttl", "5", "--health-port", str(port), "--", *limited],
            env=clean_env(BOTLEASE_DATABASE_URL=sqlite_world.url),
            stdout=out,
            stderr=out,
        )
    kept: list[socket.socket] = []
    try:
        until(lambda: "active" in log.read_text())
        end = time.monotonic() + 8  # a slow machine is silent for a second or two, and no longer
        while time.monotonic() < end:
            try:
                kept.append(socket.create_connection(("127.0.0.1", port), 0.2))
                kept[-1].sendall(b"GET /")
            except OSError:
                time.sleep(0.05)
        text = log.read_text()
    finally:
        for c in kept:
            c.close()
        process.terminate()
        process.wait(20)
    assert "draining" not in text and "Traceback" not in text


ESCAPE = "\x1b]0;pwned\x07"


@pytest.mark.parametrize(
    ("edit", "command"),
    [
        (f"UPDATE bot_leases SET holder = 'h', renewed_at = '{ESCAPE}'", ("status",)),
        (f"UPDATE bot_leases SET holder = 'h', term = '{ESCAPE}'", ("status",)),
        (f"UPDATE bot_leases SET bot = '{ESCAPE}'", ("deactivate",)),
        (f"UPDATE bot_leases SET bot = '{ESCAPE}'", ("pause",)),
        (f"UPDATE bot_terms SET term = '{ESCAPE}', acquired_at = 'x'; DELETE FROM bot_leases", ("verify",)),
        ("UPDATE bot_leases SET bot = CAST(X'1b5d303b707707ff' AS TEXT)", ("status",)),
        (
            f"UPDATE bot_instances SET instance_id = '{ESCAPE}', state = 'active', ended_at = NULL; "
            f"UPDATE bot_leases SET holder = '{ESCAPE}'",
            ("wait", "--active", "--timeout", "0"),
        ),
    ],
)
def test_no_row_and_no_error_writes_control_characters_to_the_terminal(
    tmp_path: Path, edit: str, command: tuple[str, ...]
) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    assert cli("run", "--name", "bot", "--", "true", tmp_path=tmp_path, DATABASE_URL=url).returncode == 0
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.executescript(edit)
    db.close()
    assert b"\x1b]0" not in on_a_terminal(*command, tmp_path=tmp_path, DATABASE_URL=url)


def test_a_megabyte_in_every_column_keeps_commands_short_and_a_newcomer_takes_over(tmp_path: Path) -> None:
    """Quotes and control characters too. The patterns for secrets took minutes for a megabyte, and the supervisor that
    wanted to name the holder neither began nor could be stopped."""
    url = f"sqlite:///{tmp_path}/x.db"
    assert cli("run", "--name", "bot", "--", "true", tmp_path=tmp_path, DATABASE_URL=url).returncode == 0
    odd = ESCAPE + "'; DROP TABLE bot_leases; --\"\n" + "x" * 1_000_000
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute(
            "UPDATE bot_instances SET (instance_id, host, state, deployment, ended_at) = (?, ?, ?, ?, NULL)", [odd] * 4
        )
        db.execute("UPDATE bot_terms SET (instance_id, deployment, reason, host) = (?, ?, ?, ?)", [odd] * 4)
        db.execute("UPDATE bot_leases SET (holder, proof, nonce, ttl) = (?, ?, ?, 1)", [odd] * 3)
    db.close()
    for command in (
        *(("status",), ("history",), ("verify",), ("check",), ("wait", "--active", "--timeout", "0"), ("doctor",)),
        *(("pause",), ("resume",), ("promote", "x"), ("promote", odd[:100_000].replace("\n", " "))),
        ("run", "--name", "bot", "--ttl", "1", "--", "true"),
    ):
        done = cli(*command, tmp_path=tmp_path, DATABASE_URL=url)
        said = done.stdout + done.stderr
        assert len(said) < 100_000 and ESCAPE not in said and "Traceback" not in said, (command, said[:1000])
    assert "active: term 2" in done.stderr
    assert odd in cli("history", "--json", tmp_path=tmp_path, DATABASE_URL=url).stdout.encode().decode("unicode_escape")


@pytest.mark.parametrize("args", [("run", "--", ESCAPE), ("status", "--database", f"sqlite:////no/{ESCAPE}")])
def test_an_argument_that_is_quoted_back_is_cleaned(tmp_path: Path, args: tuple[str, ...]) -> None:
    assert b"\x1b]0" not in on_a_terminal(*args, tmp_path=tmp_path, DATABASE_URL="sqlite:///x.db")


async def test_a_row_cannot_write_lines_of_its_own_into_a_program_s_log(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import botlease

    monkeypatch.setenv("BOTLEASE_DATABASE_URL", sqlite_url)
    async with botlease.active("b", ttl=1):
        pass
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as db:
        db.execute("UPDATE bot_leases SET holder = ?", ("h\nINFO bank paid 1000 to mallory",))
    db.close()
    with caplog.at_level(logging.INFO, "botlease"):
        async with botlease.active("b", ttl=1):
            pass
    assert caplog.messages and not any("\n" in m for m in caplog.messages)


@pytest.mark.parametrize("owner", ["99999999999999999999@1", "4194300@\N{SUPERSCRIPT TWO}"])
def test_a_proof_that_cannot_be_read_proves_nothing_and_ends_nobody(tmp_path: Path, owner: str) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    assert cli("run", "--name", "bot", "--", "true", tmp_path=tmp_path, DATABASE_URL=url).returncode == 0
    with sqlite3.connect(tmp_path / "x.db") as db:
        proof = f"{procfs.host()} {os.geteuid()} {owner}"
        db.execute("UPDATE bot_leases SET holder = 'ghost', proof = ?", (proof,))
    db.close()
    args = ("run", "--name", "bot", "--ttl", "1", "--standby", "--", "true")
    done = cli(*args, tmp_path=tmp_path, DATABASE_URL=url)
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize("mask", [0, 0o022])
def test_our_folders_are_ours_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    done = subprocess.run(
        [*BOTLEASE, "run", "--", "true"],
        env=clean_env(HOME=str(tmp_path), XDG_RUNTIME_DIR="/nonexistent"),
        umask=mask,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / ".local/state/botlease").stat().st_mode) == 0o700
    for folder in (".local", ".local/state"):
        assert not (tmp_path / folder).stat().st_mode & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_database_that_another_user_owns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch()
    os.chown(tmp_path / "x.db", 65534, 65534)
    done = cli("run", "--", "true", tmp_path=tmp_path, DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    assert done.returncode == 78 and "belongs to another user" in done.stderr


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_side_car_lock_that_cannot_be_one_is_said_once_with_the_cure(sqlite_world: World, kind: str) -> None:
    import zlib

    path = Path(f"{sqlite_world.url.removeprefix('sqlite:///')}-bot-{zlib.crc32(b'bot'):08x}.lock")
    {"link": lambda: path.symlink_to("/etc/hostname"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    run = sqlite_world.run("--name", "bot", bot=("true",))
    time.sleep(3)
    lines = [line for line in run.text().splitlines() if line]
    assert len(lines) <= 3 and any("lock" in line and "delete it" in line for line in lines)


async def test_a_function_of_the_same_name_does_not_stop_the_claims(postgres_url: str) -> None:
    """A schema in which others may create (public, before PostgreSQL 15) can hold an overload of ours."""
    import asyncpg

    store = open_store(postgres_url)
    await store.open(5.0)
    db = await asyncpg.connect(postgres_url)
    await db.execute(
        "CREATE FUNCTION botlease_claim(text, text, text, integer, integer) RETURNS boolean LANGUAGE sql "
        "AS 'SELECT TRUE'"
    )
    await store.register(Registration("i", "b", "d", "h", 1, "0.2.0", 10.0), 5.0)
    assert await store.claim("b", "i", None, 5.0)
    assert await db.fetchval("SELECT is_active FROM bot_instances")
    await db.close()
    await store.aclose()


async def test_the_doctor_names_the_function_that_the_role_may_not_call(postgres_url: str) -> None:
    import asyncpg

    n = postgres_url.rpartition("_")[2]
    store = open_store(postgres_url)
    await store.open(5.0)
    await store.aclose()
    db = await asyncpg.connect(postgres_url)
    try:
        await db.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC")
        await db.execute(f"CREATE ROLE runner{n} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO runner{n}")
        runner = open_store(postgres_url.replace("postgres@", f"runner{n}@"))
        missing = (await runner.diagnose(5.0))["missing"]
        await runner.aclose()
        assert any("botlease_claim" in m for m in missing)
    finally:
        await db.execute(f"DROP OWNED BY runner{n}; DROP ROLE runner{n}")
        await db.close()


@pytest.mark.parametrize("secret", ["123456789:AAbbCCddEEffGGhhIIjjKKllMMnnOOpp", "postgresql://bot:hunter22@db/x"])
def test_a_secret_in_a_long_text_is_blotted_out_wherever_the_cut_falls(secret: str) -> None:
    """Half a secret is no secret to a pattern; and what was blotted out before it moves it to the front."""
    for before in ("", "password=" + "P" * 4500 + " "):
        for start in (*range(4050, 4110), *range(8150, 8200), *range(3600, 3700)):
            text = before + "y" * (start - len(before)) + " " + secret + " " + "z" * 20_000
            for shown in (redact(text), safe(text)):
                assert "AAbb" not in shown and "hunt" not in shown
                assert len(shown) <= 8192
    assert redact("x" * 5000) == "x" * 5000 and len(redact("x" * 1_000_000)) > 4000


def test_settings_are_shown_without_the_database_url() -> None:
    from botlease import settings
    from botlease.work.child import Front

    url = f"postgresql://u:{CANARY}@h/d"
    made = settings.make({"DATABASE_URL": url}, name="b")
    assert CANARY not in repr(made) + repr(Front("u", url, False, None))  # type: ignore[arg-type]


def test_the_local_check_shows_no_token_of_a_command_line(tmp_path: Path) -> None:
    script = tmp_path / "mybot.py"
    script.write_text("import time; time.sleep(30)")
    env = clean_env(BOT_TOKEN=FULL)
    bot = subprocess.Popen([sys.executable, script.name, FULL], env=env, cwd=tmp_path)  # 80 characters are shown
    try:
        time.sleep(0.5)
        done = cli("check", tmp_path=tmp_path, BOT_TOKEN=FULL)
    finally:
        bot.kill()
        bot.wait()
    assert str(bot.pid) in done.stdout and CANARY not in done.stdout


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("status", "--database", "postgresql://u:x\udcff@127.0.0.1:1/d"), {}),
        (("run", "--health-port", "0", "--health-host", "\udcff", "--", "true"), {}),
        (("run", "--health-port", "0", "--health-host", "a" * 70, "--", "true"), {}),
        (("run", "--gateway", "--max-crashes", "0", "--bot-api", "http://h\udcff", "--", "true"), {}),
        (("doctor",), {"BOT_TOKEN": FULL, "TELEGRAM_API_URL": "http://h:port"}),
    ],
)
def test_bytes_that_are_no_text_and_hosts_that_are_none_get_one_line(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str]
) -> None:
    done = cli(*args, tmp_path=tmp_path, DATABASE_URL=f"sqlite:///{tmp_path}/x.db", **env)
    assert "Traceback" not in done.stderr


ODD = {
    "nothing": "",
    "a NUL": "a\0b",
    "an escape": "a\x1b[31mb",
    "a line end": "a\nb",
    "half of a character": "a\udc80b",
    "turned around": "a\u202eb",
    "a megabyte": "x" * 2**20,
}
QUOTES = "'\"; DROP TABLE bot_leases; -- $1 %s {0} \\ <b>🤖"


@pytest.mark.parametrize("what", ["name", "deployment"])
@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_a_name_is_refused_in_one_short_line(what: str, odd: str) -> None:
    if (what, odd) == ("deployment", "nothing"):
        return  # as if it were not given
    with pytest.raises(settings.ConfigurationError) as refused:
        settings.make({"HOME": "/nowhere"}, **{what: ODD[odd]})  # type: ignore[arg-type]
    assert str(refused.value).isprintable() and len(str(refused.value)) < 200


def test_what_can_be_a_name_stays_as_it_is_through_store_and_command(world: World) -> None:
    world.run("--deployment", QUOTES)
    world.works(1)
    done = subprocess.run(
        [*BOTLEASE, "status", "--json"],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        capture_output=True,
        text=True,
    )
    assert [i["deployment"] for i in json.loads(done.stdout)["instances"]] == [QUOTES]


def test_a_crash_of_ours_leaves_no_core_and_the_bots_own_limit_is_as_it_was(sqlite_world: World) -> None:
    """It would hold the database's password and the token."""

    def limit(pid: int) -> str:
        return re.findall(r"Max core file size +(\S+)", Path(f"/proc/{pid}/limits").read_text())[0]

    world = sqlite_world
    run = world.run(wrap=("prlimit", "--core=5000000:unlimited"))
    world.works(1)
    ((bot, _),) = world.stamps()
    ours = [pid for pid in [run.pid, *run.children()] if pid != bot]
    assert len(ours) == 2 and [limit(pid) for pid in ours] == ["1", "1"]
    assert limit(bot) == "5000000"

    waits = subprocess.Popen(
        ["prlimit", "--core=5000000:unlimited", *BOTLEASE, "wait", "--standby", "--timeout", "60"],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        stderr=subprocess.DEVNULL,
    )
    until(lambda: limit(waits.pid) == "1")  # what an operator types has the password as well
    waits.kill()
    waits.wait()


@pytest.mark.parametrize("server", ["health", "gateway", "gate"])
def test_our_servers_listen_on_the_loopback_address_alone(sqlite_world: World, server: str) -> None:
    code = "import os, time; print('at', *(os.environ.get(f'BOTLEASE_{k}_URL') for k in ('GATE', 'API')), flush=True)"
    options = {
        "health": ("--health-port", str(free_port())),
        "gateway": ("--gateway",),
        "gate": ("--warm",),
    }[server]
    token = {"TELEGRAM_BOT_TOKEN": "1:" + "a" * 35} if server == "gateway" else {}
    run = sqlite_world.run(*options, bot=(sys.executable, "-c", code + "; time.sleep(60)"), env=token)
    if server == "health":
        port = int(options[1])
    else:
        run.says("at ")
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", run.text())[0])
    until(lambda: answers("127.0.0.1", port))
    for elsewhere in ("127.0.0.2", own_address()):
        assert not answers(elsewhere, port), elsewhere


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def own_address() -> str:
    """Of this machine, as others see it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
            return str(s.getsockname()[0])
        except OSError:
            return "127.0.0.3"


ALONE = """
import importlib, pkgutil, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("asyncpg", "telegram", "aiogram", "telebot", "aiohttp", "sqlalchemy", "psycopg"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
before = {*sys.modules}
import botlease
for found in pkgutil.walk_packages(botlease.__path__, "botlease."):
    if "postgres" in found.name or found.name.startswith("botlease.telegram.") or found.name == "botlease.__main__":
        continue
    importlib.import_module(found.name)
roots = {name.partition(".")[0] for name in {*sys.modules} - before}
print(sorted(r for r in roots if r not in sys.stdlib_module_names and not r.startswith("_")))
"""


def test_what_is_imported_is_the_standard_library_and_two_packages() -> None:
    """What is not imported cannot be poisoned."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=clean_env())
    assert done.stderr == "" and done.stdout.strip() == "['botlease', 'click', 'h11']"


@pytest.mark.parametrize("what", ["a file of another", "a link", "a linked folder", "a folder of another", "open"])
def test_no_note_is_left_where_somebody_else_may_have_his_hands(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir(0o700)
    ours, victim = folder / "botlease", tmp_path / "victim"
    victim.mkdir()
    if what == "a linked folder":
        ours.symlink_to(victim)
    else:
        ours.mkdir(0o777 if what == "open" else 0o700)
        ours.chmod(0o777 if what == "open" else 0o700)
    if what == "a folder of another":
        if os.geteuid() != 0:
            pytest.skip("only root can make one")
        os.chown(ours, 65534, 65534)
    if what == "a link":
        (ours / "me.json").symlink_to(victim / "written")
    if what == "a file of another":
        (ours / "me.json").write_text("theirs")
    env = {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(tmp_path / "none"), "HOME": str(tmp_path / "home")}
    with presence.announced("bot", "me", 1.0, env) as path:
        assert path is None or ours not in path.parents
    assert not list(victim.iterdir())
    if what == "a file of another":
        assert (ours / "me.json").read_text() == "theirs"


@pytest.mark.parametrize("suffix", ["-updates", "-journal"])
async def test_a_link_beside_the_database_is_not_followed(tmp_path: Path, suffix: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "db" / "lease.db"
    path.parent.mkdir(0o700)
    Path(f"{path}{suffix}").symlink_to(victim)
    store = open_store(f"sqlite:///{path}")
    with contextlib.suppress(StoreError):
        await store.open(5.0)
        await StoreContract().held(store)
        inbox = open_inbox(f"sqlite:///{path}")
        try:
            await inbox.begin(Holding("bot", 1, "nonce-a"), "api", 5.0)
        finally:
            await inbox.aclose()
    await store.aclose()
    assert victim.read_text() == "precious"
