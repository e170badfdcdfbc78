"""``botlease run --gateway`` with real processes: the gateway is a part of the work, and stands before its stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from cgroups import Cgroup, has_cgroups
from harness import BOTLEASE, Run, World, clean_env, until
from reapers import comm
from servers import free_port
from telegram_thread import BOT, TOKEN, Telegram

from botlease import clock
from botlease.work.tree import descendants

PLAIN = (sys.executable, str(Path(__file__).parent / "bots" / "bot_plain.py"))


@pytest.fixture
def telegram() -> Iterator[Telegram]:
    t = Telegram()
    yield t
    t.close()


def start(world: World, telegram: Telegram, *options: str, bot: tuple[str, ...] = PLAIN, work: str = "0") -> Run:
    more = () if "--ttl" in options else ("--ttl", "4")
    return world.run("--gateway", *more, *options, bot=bot, env=telegram.env | {"WORK": work}, ttl="4")


def front(run: Run) -> int:
    def find() -> int:
        return next((p for p in descendants(run.pid) if comm(p) == "botlease-front"), 0)

    return int(str(until(find)))


def test_a_crash_of_the_front_leaves_no_core_with_the_token_in_it(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram)
    telegram.answered()
    assert "Max core file size        1 " in Path(f"/proc/{front(run)}/limits").read_text()


def test_what_the_bot_behind_the_front_has_started_dies_with_the_reaper(
    sqlite_world: World, telegram: Telegram
) -> None:
    """The bot has the front's death signal; what is in its group is on the reaper's leash."""
    run = start(sqlite_world, telegram, bot=("sh", "-c", "sleep 600 & wait"))
    helper = int(str(until(lambda: next((p for p in descendants(run.pid) if comm(p) == "sleep"), 0))))
    run.says("active")
    reaper = next(p for p in descendants(run.pid) if comm(p) == "botlease-reaper")
    ends = os.pidfd_open(helper)
    os.kill(run.pid, signal.SIGSTOP)
    try:
        os.kill(reaper, signal.SIGKILL)
        assert select.select([ends], [], [], 10)[0]
    finally:
        os.kill(run.pid, signal.SIGCONT)
        os.close(ends)


def status(world: World) -> dict[str, object]:
    said = subprocess.run(
        [*BOTLEASE, "status", "--json"], env=clean_env(BOTLEASE_DATABASE_URL=world.url), capture_output=True, check=True
    )
    found: dict[str, object] = json.loads(said.stdout)
    return found


def test_a_bot_is_served_and_its_updates_survive_a_handover_and_a_kill(world: World, telegram: Telegram) -> None:
    start(world, telegram, "--deployment", "v1", "--when-superseded", "stay", "--probation", "0.5", work="0.05")
    telegram.answered()
    messages = []
    for n in range(80):  # 4 s of chat
        messages.append(telegram.say(str(n)))
        if n == 20:
            two = start(world, telegram, "--deployment", "v2", "--probation", "0.5", work="0.05")
        if n == 60:
            until(lambda: any(m.replies and m.replies[0][1] == "term 2" for m in messages), 20)
            for pid in [two.pid, *descendants(two.pid)]:
                with contextlib.suppress(ProcessLookupError):  # the others may be quicker than we are
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    until(lambda: all(m.replies for m in messages), 20)
    assert {m.replies[0][1] for m in messages} >= {"term 1", "term 2"}
    report = telegram.do(lambda: telegram.simulator.report(BOT))
    bot = status(world)["gateway"][0]  # type: ignore[index]
    assert report.conflicts == 0 and report.lost == 0
    assert report.twice <= bot["repeated"] <= 1


def test_the_bot_finishes_what_it_has_before_it_is_told_to_stop(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram, work="1.0")  # no signal handler: SIGTERM would end it at once
    telegram.answered()
    message = telegram.say("in hand")
    run.says("bot: has in hand")
    late = telegram.say("too late for this one")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0
    assert len(message.replies) == 1 and not late.replies
    again = start(sqlite_world, telegram)
    until(lambda: late.replies)
    assert len(message.replies) == 1 and len(late.replies) == 1
    again.signal(signal.SIGTERM)
    again.wait()


CONFIRMS_WHAT_IT_IS_WORKING_ON = """
import http.client, json, os, signal, time, urllib.parse
api = urllib.parse.urlsplit(os.environ["BOTLEASE_API_URL"])
polls, spare = http.client.HTTPConnection(api.hostname, api.port), http.client.HTTPConnection(api.hostname, api.port)
def ask(over, method, **params):
    over.request("GET", f"{api.path}/bot{os.environ['TELEGRAM_BOT_TOKEN']}/{method}?{urllib.parse.urlencode(params)}")
def answer(over):
    return json.load(over.getresponse())["result"]
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ask(spare, "getUpdates", offset=offset, limit=1, timeout=0)
    print("confirmed", flush=True)
    answer(spare)
offset = 0
ask(spare, "getMe")
answer(spare)  # it stays open
signal.signal(signal.SIGTERM, stop)
while True:
    ask(polls, "getUpdates", offset=offset, timeout=5)
    for u in answer(polls):
        offset = u["update_id"] + 1
        print("working on it", flush=True)
        time.sleep(1.0)
        chat, number = u["message"]["chat"]["id"], u["message"]["message_id"]
        ask(polls, "sendMessage", chat_id=chat, text="done", reply_parameters=json.dumps({"message_id": number}))
        answer(polls)
"""


def test_a_bot_that_a_platform_has_signalled_is_not_signalled_again_though_the_supervisor_is_quicker(
    sqlite_world: World, telegram: Telegram
) -> None:
    """grammY's last call confirms what it is working on; a second signal would end it, and that would be lost. A
    platform that signals everything at once may reach the bot and the supervisor before the gateway."""
    run = start(sqlite_world, telegram, bot=(sys.executable, "-c", CONFIRMS_WHAT_IT_IS_WORKING_ON))
    message = telegram.say("1")
    run.says("working on it")
    gateway = front(run)
    (bot,) = [p for p in descendants(gateway) if comm(p) != "botlease-front"]
    os.kill(bot, signal.SIGTERM)
    run.says("confirmed")
    run.signal(signal.SIGTERM)
    run.says("draining")
    os.kill(gateway, signal.SIGTERM)
    assert run.wait() == 0 and len(message.replies) == 1


def test_a_bot_that_does_not_finish_is_signalled_in_time(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram, "--stop-grace", "4", work="60")
    telegram.say("a long one")
    run.says("bot: has a long one")
    began = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 0
    assert 1.5 < time.monotonic() - began < 4.0


def test_the_exit_code_of_the_bot_is_passed_through(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram, "--max-crashes", "0", bot=(*PLAIN, "--die"))
    assert run.wait() == 3
    shot = start(sqlite_world, telegram, "--max-crashes", "0", bot=("sh", "-c", "kill -SEGV $$"))
    assert shot.wait() == 128 + signal.SIGSEGV
    missing = start(sqlite_world, telegram, bot=("/dev/null",))
    assert missing.wait() == 126


@pytest.mark.long
def test_a_crash_is_restarted_at_the_same_address_and_the_update_is_not_lost(
    sqlite_world: World, telegram: Telegram
) -> None:
    run = start(sqlite_world, telegram, "--max-crashes", "9")
    telegram.answered()
    telegram.say("die")
    run.says("handed out again", 30)
    run.says("set aside", 60)  # it kills the bot each time
    telegram.answered("and now for something else")
    assert "crashed (exit code 9)" in run.text()


def test_signals_are_passed_on(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram)
    telegram.answered()
    run.signal(signal.SIGUSR1)
    run.says("bot: USR1")


@pytest.mark.parametrize("who", ["front", "reaper", "supervisor"])
def test_nothing_outlives_a_kill(sqlite_world: World, telegram: Telegram, who: str) -> None:
    run = start(sqlite_world, telegram)
    telegram.answered()
    below = descendants(run.pid)
    victim = run.pid if who == "supervisor" else next(p for p in below if comm(p) == f"botlease-{who}")
    spared = [p for p in below if p != victim and not (who == "front" and comm(p) == "botlease-reaper")]
    os.kill(victim, signal.SIGKILL)
    until(lambda: not any(_alive(p) for p in spared), 1.0)
    if who != "supervisor":
        telegram.answered("back again")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def test_no_request_of_a_paused_holder_leaves_after_its_term(sqlite_world: World, telegram: Telegram) -> None:
    """Everything of it is stopped in the middle of a dozen uploads, for three ttl."""
    uploader = (
        "import os, threading, urllib.request, time\n"
        "url = f\"{os.environ['BOTLEASE_API_URL']}/bot{os.environ['TELEGRAM_BOT_TOKEN']}/sendDocument\"\n"
        "def pieces():\n"
        "    for _ in range(40):\n"
        "        yield b'x' * 50_000\n"
        "        time.sleep(0.01)\n"
        "def go():\n"
        "    while True:\n"
        "        request = urllib.request.Request(url, pieces(), {'content-length': '2000000'})\n"
        "        try: urllib.request.urlopen(request).read()\n"
        "        except OSError: time.sleep(0.05)\n"
        "for _ in range(12): threading.Thread(target=go).start()\n"
    )
    run = start(sqlite_world, telegram, "--ttl", "1.5", bot=(sys.executable, "-c", uploader))
    calls = telegram.simulator.calls
    until(lambda: len(calls) > 30)
    tree = [run.pid, *descendants(run.pid)]
    stopped = clock.now()
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4.5)
    resumed = clock.now()
    bot = [p for p in tree if p != run.pid]
    assert not any(_alive(p) for p in bot)  # the kernel ended it at the end of trust, stopped or not
    os.kill(run.pid, signal.SIGCONT)
    run.says("active: term 2")
    began = clock.now()
    time.sleep(0.5)
    late = [when - stopped for when, _, _ in list(calls) if stopped + 1.5 < when < min(began, resumed)]
    assert late == []
    run.signal(signal.SIGKILL)


def test_big_files_pass_in_constant_memory(sqlite_world: World, telegram: Telegram) -> None:
    size = 50_000_000
    code = (
        "import os, urllib.request, time\n"
        "base, token = os.environ['BOTLEASE_API_URL'], os.environ['TELEGRAM_BOT_TOKEN']\n"
        "def pieces():\n"
        f"    for _ in range({size // 50_000}): yield b'x' * 50_000\n"
        "url = f'{base}/bot{token}/sendDocument'\n"
        f"up = urllib.request.Request(url, pieces(), {{'content-length': '{size}'}})\n"
        "print('bot: small', urllib.request.urlopen(f'{base}/bot{token}/getMe').status, flush=True)\n"
        "time.sleep(1.0)\n"
        f"assert b'\"file_size\": {size}' in urllib.request.urlopen(up).read()\n"
        "print('bot: up', flush=True)\n"
        f"down = urllib.request.urlopen(f'{{base}}/file/bot{{token}}/zeros/{size}.bin')\n"
        "n = 0\n"
        "while piece := down.read(100_000): n += len(piece)\n"
        f"assert n == {size}\n"
        "print('bot: down', flush=True)\n"
        "time.sleep(60)\n"
    )
    run = start(sqlite_world, telegram, bot=(sys.executable, "-c", code))
    run.says("bot: small")
    before = _peak(front(run))
    run.says("bot: down", 60)
    assert _peak(front(run)) - before < 4_000  # kB


def _peak(pid: int) -> int:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1])


def test_a_warm_bot_may_read_before_its_term_and_polls_after(sqlite_world: World, telegram: Telegram) -> None:
    start(sqlite_world, telegram, "--deployment", "v1", "--when-superseded", "stay")
    telegram.answered()
    two = start(sqlite_world, telegram, "--deployment", "v2", "--warm", bot=(*PLAIN, "--gate"))
    two.says("waits at its gate")
    two.says("active: term 2")
    assert telegram.answered().replies[0][1] == "term 2"
    assert telegram.do(lambda: telegram.simulator.report(BOT)).conflicts == 0


def test_the_token_is_in_no_title_no_table_and_no_output(world: World, telegram: Telegram) -> None:
    run = start(world, telegram)
    telegram.answered()
    secret = TOKEN.split(":")[1]
    for pid in [run.pid, *descendants(run.pid)]:
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert secret not in run.text() + json.dumps(status(world))
    if world.url.startswith("sqlite"):
        for file in world.folder.iterdir():
            assert secret.encode() not in file.read_bytes(), file


def test_health_and_metrics_say_for_how_long_the_bot_is_deaf(sqlite_world: World, telegram: Telegram) -> None:
    from servers import free_port

    port = free_port()
    start(sqlite_world, telegram, "--health-port", str(port))
    telegram.answered()

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return str(answer.read().decode())

    until(lambda: "deaf" in get("/health"))
    assert json.loads(get("/health"))["deaf"] < 6
    metrics = get("/metrics")
    assert f'botlease_gateway_deaf_seconds{{bot="{BOT}",api="{BOT}"}}' in metrics
    assert f'botlease_active{{bot="{BOT}"}} 1' in metrics


def test_the_local_check_knows_a_bot_behind_the_gateway(sqlite_world: World, telegram: Telegram) -> None:
    run = start(sqlite_world, telegram)
    telegram.answered()
    said = subprocess.run(
        [*BOTLEASE, "check", "--name", str(BOT), "--json"], env=clean_env(), capture_output=True, text=True
    )
    tree = [run.pid, *descendants(run.pid)]  # others of this name belong to tests that run beside this one
    found = {p["pid"]: p["what"] for p in json.loads(said.stdout) if p["pid"] in tree}
    assert found.pop(run.pid) == "supervisor" and list(found.values()) == ["bot"]


def test_what_cannot_work_is_refused_with_the_cure(sqlite_world: World) -> None:
    for options, text in (
        (("--gateway", "--bot-api", "ftp://x"), "should read https://api.telegram.org"),
        (("--gateway", "--bot-api", "https://me:secret@host"), "without a name or a password"),
        (("--bot-api", "https://host"), "--bot-api is for the gateway: add --gateway"),
        (("--delete-webhook",), "--delete-webhook is for the gateway: add --gateway"),
    ):
        run = sqlite_world.run("--name", "b", *options, bot=("true",))
        assert run.wait() == 78 and text in run.text() and "secret" not in run.text()


def test_the_danger_signal_of_the_command_line_reaches_the_bot(sqlite_world: World, telegram: Telegram) -> None:
    code = "import os, signal, time; signal.signal(signal.SIGALRM, lambda *_: print('bot: ALRM', flush=True))\n"
    code += "print('bot: ready', flush=True)\nwhile True: time.sleep(1)"
    run = start(sqlite_world, telegram, bot=(sys.executable, "-c", code))
    run.says("bot: ready")
    os.kill(front(run), signal.SIGALRM)  # as the reaper sends it to its group
    run.says("bot: ALRM")


def test_next_step_handlers_of_telebot_are_acknowledged(sqlite_world: World, telegram: Telegram) -> None:
    code = """
import os
from telebot import TeleBot
from botlease.telegram import telebot as hook
bot = TeleBot(os.environ["TELEGRAM_BOT_TOKEN"])
hook.through_gateway(bot)
@bot.message_handler(commands=["name"])
def ask(message):
    asked = bot.reply_to(message, "your name?")
    bot.register_next_step_handler(asked, told)
    print("bot: listens", flush=True)  # after the question was seen by whoever answers it
def told(message):
    bot.reply_to(message, "hello " + message.text)
bot.infinity_polling()
"""
    run = start(sqlite_world, telegram, bot=(sys.executable, "-c", code))
    telegram.answered("/name", 30)
    run.says("bot: listens")
    assert telegram.answered("Alice").replies[0][1] == "hello Alice"
    telegram.say("nobody handles this")
    until(lambda: status(sqlite_world)["gateway"][0]["waiting"] == 0)  # type: ignore[index]
    began = time.monotonic()
    run.signal(signal.SIGTERM)
    run.wait()
    assert time.monotonic() - began < 4.0


@pytest.mark.skipif(not has_cgroups(), reason="no cgroup can be made here")
def test_a_warm_bot_gets_nothing_through_before_the_fence_of_its_term_is_armed(
    sqlite_world: World, telegram: Telegram
) -> None:
    one = start(sqlite_world, telegram, "--deployment", "v1", "--when-superseded", "stay")
    telegram.answered()
    code = """
import botlease, json, os, threading, urllib.request
url = f"{os.environ['BOTLEASE_API_URL']}/bot{os.environ['TELEGRAM_BOT_TOKEN']}/sendMessage"
body = json.dumps({"chat_id": 1000, "text": "I am up"}).encode()
request = urllib.request.Request(url, body, {"content-type": "application/json"})
threading.Thread(target=lambda: urllib.request.urlopen(request).read()).start()  # it waits for the term
botlease.wait_at_gate()
"""
    two = start(sqlite_world, telegram, "--deployment", "v1", "--warm", "--standby", bot=(sys.executable, "-c", code))
    two.says("waits at its gate")
    reaper = next(p for p in descendants(two.pid) if comm(p) == "botlease-reaper")
    cgroup = Cgroup(f"botlease-front-{os.getpid()}")  # one that is only stopped would be woken for its term
    for file in cgroup.files():
        Path(file).write_text(str(reaper))
    cgroup.freeze(True)
    sent = [m for _, _, m in telegram.simulator.calls].count("sendMessage")
    try:
        one.signal(signal.SIGTERM)
        until(lambda: status(sqlite_world)["lease"]["term"] == 2)  # type: ignore[index]
        time.sleep(0.5)  # nothing may happen: there is nothing to wait for
        assert [m for _, _, m in telegram.simulator.calls].count("sendMessage") == sent
        cgroup.freeze(False)
        until(lambda: [m for _, _, m in telegram.simulator.calls].count("sendMessage") == sent + 1)
    finally:
        cgroup.freeze(False)
        two.signal(signal.SIGTERM)
        two.wait()
        cgroup.remove()


def test_nothing_of_a_token_or_a_password_is_in_any_output_page_row_file_or_title(
    tmp_path: Path, postgres_url: str, telegram: Telegram
) -> None:
    """Of a whole life behind the gateway, and of every command that looks or changes something."""
    secret = "pa55canary"
    url = postgres_url.replace("postgres@", f"postgres:{secret}@")
    world, port = World(tmp_path, url), free_port()
    (tmp_path / "notes").mkdir(0o700)
    folder = {"XDG_RUNTIME_DIR": str(tmp_path / "notes")}
    said: dict[str, str] = {}
    try:
        run = world.run("--gateway", "--health-port", str(port), bot=PLAIN, env=telegram.env | folder, ttl="4")
        telegram.answered()
        pids = [run.pid, *descendants(run.pid)]
        ours = [p for p in pids if comm(p).startswith("botlease")]
        said["titles"] = str([Path(f"/proc/{p}/cmdline").read_bytes() for p in pids])
        assert len(ours) >= 2
        for page in ("health", "metrics", "leader", "nothing"):
            with contextlib.suppress(urllib.error.HTTPError):
                said[page] = urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}").read().decode()
        for command in (
            *("status", "status --json", "status --ended", "history", "history --json", "verify", "verify --json"),
            *("doctor", "doctor --json", "check", "check --json", "wait --active", "pause", "resume"),
            *("prune --older-than 1d", "deactivate", "promote nobody", "status --name 123:" + TOKEN),
        ):
            done = subprocess.run(
                [*BOTLEASE, *command.split()],
                env=clean_env(BOTLEASE_DATABASE_URL=url) | telegram.env | folder,
                capture_output=True,
                text=True,
            )
            said[command] = done.stdout + done.stderr
        notes = [p.read_text() for p in (tmp_path / "notes").rglob("*") if p.is_file()]
        assert notes and said["check"] and str(BOT) in said["status"]
        rows = asyncio.run(everything(postgres_url))
        assert str(BOT) in rows
        run.signal(signal.SIGTERM)
        run.wait()
        said |= {str(p): p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file()}
        said |= {"rows": rows, "notes": str(notes)}
    finally:
        world.close()
    for canary in (TOKEN, TOKEN.partition(":")[2], secret):
        assert [where for where, text in said.items() if canary in text] == []


async def everything(url: str) -> str:
    connection = await asyncpg.connect(url)
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    rows = [await connection.fetch(f'SELECT t::text FROM "{name}" t') for (name,) in tables]
    await connection.close()
    return str(rows)


def test_a_connection_that_breaks_under_an_answer_does_not_end_the_bot(sqlite_world: World, telegram: Telegram) -> None:
    """The kernel says so with SIGPIPE, of which a program dies that does not say otherwise; the bot has it as ever."""
    script = "grep SigIgn /proc/self/status; kill -PIPE $PPID; sleep 0.3; echo lives; sleep 600"
    run = start(sqlite_world, telegram, bot=("sh", "-c", script))
    run.says("lives")
    ignored = int(run.text().partition("SigIgn:")[2].split()[0], 16)
    assert "crashed" not in run.text() and not ignored & 1 << signal.SIGPIPE - 1


def test_what_a_dead_bot_has_sent_while_nobody_served_is_turned_away() -> None:
    """The socket is the supervisor's: the kernel takes requests in, and one of term 5 was sent in term 7."""
    from botlease.work.front import _turn_away

    with socket.create_server(("127.0.0.1", 0)) as listening:
        with socket.create_connection(listening.getsockname()) as dead:
            dead.settimeout(5)
            dead.sendall(b"POST /bot1:x/sendMessage HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n")
            _turn_away(listening.fileno())
            with contextlib.suppress(ConnectionResetError):
                assert dead.recv(1) == b""
        with socket.create_connection(listening.getsockname()):
            listening.setblocking(True)
            listening.accept()[0].close()
