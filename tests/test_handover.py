"""Probation, roll-back, warm starts and progress proof, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harness import World, until
from reapers import Reaper
from servers import free_port

from botlease import clock

LONG = "30"


def get(port: int, path: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


# Probation ---------------------------------------------------------------------------------------------------------


def test_a_broken_newcomer_is_rolled_back_by_itself_and_quarantined_after_two_tries(world: World) -> None:
    old = world.run("--deployment", "v1")
    world.works(1)
    for attempt in (1, 2):
        broken = world.run("--deployment", "v2", bot=world.bot(exit=3, **{"for": 0.1}))
        assert broken.wait() == 3
        assert broken.text().count("active: ") == 1  # a term that is given up starts nothing again
        until(lambda n=attempt: world.terms()[-1] == 1 + 2 * n)
    port = free_port()
    broken = world.run("--deployment", "v2", "--health-port", str(port), bot=world.bot(exit=3, **{"for": 0.1}))
    broken.says("quarantined: ")

    assert old.process.poll() is None and world.terms() == [1, 2, 3, 4, 5]
    assert get(port, "/readyz")[0] == 503 and get(port, "/livez")[0] == 200
    assert world.overlap() == 0


def test_a_newcomer_whose_supervisor_is_killed_on_probation_has_failed(world: World) -> None:
    old = world.run("--deployment", "v1")
    world.works(1)
    for n in (1, 2):
        new = world.run("--deployment", "v2")
        world.works(2 * n)
        new.signal(signal.SIGKILL)
        until(lambda n=n: world.terms()[-1] == 1 + 2 * n)
    world.run("--deployment", "v2").says("quarantined: ")

    assert old.process.poll() is None and world.overlap() == 0


def test_when_the_probation_has_passed_the_old_one_ends_with_0(world: World) -> None:
    old = world.run("--deployment", "v1")
    world.works(1)
    new = world.run("--deployment", "v2", "--probation", "0.5")
    new.says("has passed its probation")
    assert old.wait() == 0
    old.says("passive: ")

    assert new.process.poll() is None and world.overlap() == 0


def test_where_the_platform_would_only_restart_it_the_old_one_stays(world: World) -> None:
    old = world.run("--deployment", "v1", "--when-superseded", "stay")
    world.works(1)
    new = world.run("--deployment", "v2", "--probation", "0.3")
    new.says("has passed its probation")
    new.signal(signal.SIGKILL)
    until(lambda: world.terms() == [1, 2, 3])

    assert old.process.poll() is None and world.overlap() == 0


def test_a_crash_on_probation_with_nobody_to_take_back_is_restarted(sqlite_world: World) -> None:
    world = sqlite_world
    old = world.run("--deployment", "v1")
    world.works(1)
    new = world.run("--deployment", "v2", bot=world.bot(exit=1, **{"for": 2.0}))
    world.works(2)
    old.signal(signal.SIGTERM)
    old.wait()
    new.says("restart 1 of 5")
    world.works(3)

    assert world.terms() == [1, 2] and new.process.poll() is None


def test_a_bot_that_ends_with_0_on_probation_has_failed_all_the_same(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--deployment", "v1")
    world.works(1)
    assert world.run("--deployment", "v2", bot=world.bot(exit=0, **{"for": 0.1})).wait() == 70
    until(lambda: world.terms() == [1, 2, 3])


@pytest.mark.long
def test_started_again_fifty_times_a_broken_deployment_costs_the_healthy_one_nothing_more(sqlite_world: World) -> None:
    """What a platform's restart loop does. Two tries; after that the quarantined one stands by. What share of the time
    that leaves is tested in virtual time (test_takeover.py): here it would be a test of this machine."""
    world = sqlite_world
    old = world.run("--deployment", "v1")
    world.works(1)
    for n in range(50):
        broken = world.run("--deployment", "v2", bot=world.bot(exit=1, **{"for": 0.05}))
        if n < 2:
            assert broken.wait() == 1
            until(lambda n=n: world.terms()[-1] == 3 + 2 * n)
        else:
            broken.says("quarantined: ")
            broken.signal(signal.SIGTERM)
            assert broken.wait() == 0

    assert world.terms() == [1, 2, 3, 4, 5] and old.process.poll() is None
    assert world.overlap() == 0


# Warm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["fd", "url"])
def test_a_warm_newcomer_goes_on_within_milliseconds_of_the_acquire(world: World, gate: str) -> None:
    world.run("--deployment", "v1")
    world.works(1)
    new = world.run("--deployment", "v2", "--warm", bot=world.bot(start=2.0, gate=gate))
    new.says("ready: ")
    until(lambda: world.terms() == [1, 2])

    assert world.overlap() == 0
    assert world.gap(2) < 1.0  # its own start takes 2 s; milliseconds, where the machine is not busy with tests


def test_a_newcomer_that_dies_before_its_gate_disturbs_nobody(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--deployment", "v1")
    world.works(1)
    dies = (sys.executable, "-c", "raise SystemExit(9)")
    broken = world.run("--deployment", "v2", "--warm", "--max-crashes", "1", bot=dies)
    assert broken.wait() == 9

    assert "ended before its gate (exit code 9)" in broken.text()
    assert world.terms() == [1]


def test_a_warm_bot_is_not_started_twice_and_is_ended_with_its_supervisor(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--deployment", "v1")
    world.works(1)
    waiting = world.run("--deployment", "v1", "--warm", bot=world.bot(gate="fd"))
    waiting.says("ready: ")
    bots = [p for p in waiting.children() if b"--gate" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(bots) == 1
    waiting.signal(signal.SIGTERM)
    assert waiting.wait() == 0
    until(lambda: not Path(f"/proc/{bots[0]}").exists())


def test_a_superseded_warm_instance_warms_up_again_and_takes_back_at_once(world: World) -> None:
    old = world.run("--deployment", "v1", "--warm", bot=world.bot(start=1.5, gate="fd"))
    world.works(1)
    new = world.run("--deployment", "v2")
    until(lambda: world.terms() == [1, 2])
    old.says("ready: ")
    time.sleep(2.5)  # longer than a ttl: the fence of its former term must not reach the bot at the gate
    assert old.process.poll() is None and old.text().count("warming up") == 2  # once at its start, once more now
    new.signal(signal.SIGKILL)
    until(lambda: world.terms() == [1, 2, 3])

    assert world.overlap() == 0 and world.gap(3) < 1.0  # its own start takes 1.5 s


def test_a_warm_bot_that_dies_while_its_instance_is_passive_is_warmed_up_again(sqlite_world: World) -> None:
    world = sqlite_world
    old = world.run("--deployment", "v1", "--warm", bot=world.bot(gate="fd"))
    world.works(1)
    world.run("--deployment", "v2")
    old.says("ready: ")
    (waiting,) = [p for p in old.children() if b"--gate" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(waiting, signal.SIGKILL)
    old.says("restart 1 of 5")
    until(lambda: old.text().count("ready: ") == 2)
    assert old.process.poll() is None


def test_the_gate_in_python_returns_the_term(sqlite_world: World, tmp_path: Path) -> None:
    world = sqlite_world
    program = tmp_path / "warm.py"
    program.write_text(
        "import asyncio, os, sys, botlease\n"
        "async def main():\n"
        "    term = await botlease.gate()\n"
        "    assert term == await botlease.gate() == botlease.wait_at_gate() == int(os.environ['BOTLEASE_TERM'])\n"
        "    print('through with', term, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    first = world.run("--deployment", "v1")
    world.works(1)
    second = world.run("--deployment", "v1", "--warm", bot=(sys.executable, str(program)))
    second.says("ready: ")
    assert "through with" not in second.text()
    first.signal(signal.SIGTERM)
    second.says("through with 2")
    third = world.run("--deployment", "v2", bot=(sys.executable, str(program)))  # not warm: the same program
    third.says("through with 3")


def test_outside_of_a_supervisor_there_is_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    import botlease

    for name in ("BOTLEASE_TERM", "BOTLEASE_GATE_FD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(botlease.NotSupervised, match="botlease run --warm"):
        botlease.wait_at_gate()


def test_a_gate_is_not_opened_after_the_end_of_trust(tmp_path: Path) -> None:
    """The reaper arms its fence first, and then looks at the clock."""
    code = "import os; g = int(os.environ['BOTLEASE_GATE_FD']); os.write(g, b'x'); os.write(1, os.read(g, 9))"
    r = Reaper()
    with (tmp_path / "out").open("wb") as out:
        r.prepare((sys.executable, "-S", "-c", code))
        r.tell({"stdout": out.fileno()}, do="start", env={}, until=None, gate=True)
    r.says("ready")
    r.tell(do="open", term=7, until=clock.now() - 0.001)
    # its own fence ends the reaper at once, and the bot dies with it
    assert os.waitstatus_to_exitcode(os.waitpid(r.pid, 0)[1]) == -signal.SIGKILL
    r.sock.close()
    assert (tmp_path / "out").read_bytes() == b""


# Progress ----------------------------------------------------------------------------------------------------------


def test_a_hung_bot_alone_is_started_again_within_its_term(sqlite_world: World, tmp_path: Path) -> None:
    world = sqlite_world
    beat = tmp_path / "beat"
    run = world.run(
        *("--healthy-if", str(beat), "--healthy-within", "0.6", "--max-crashes", "9"),
        bot=world.bot(touch=beat, hang=0.3),
        ttl="6",  # a slow disk must not end the term
    )
    run.says("nobody else can take over")
    world.works(2)

    assert world.terms() == [1] and run.process.poll() is None


@pytest.mark.parametrize("rule", ["file", "stdout"])
def test_a_holder_whose_bot_is_dead_inside_gives_the_term_up(sqlite_world: World, tmp_path: Path, rule: str) -> None:
    world = sqlite_world
    beat = tmp_path / "beat"
    signs = {"file": (str(beat), {"touch": beat}), "stdout": ("stdout:poll(ing)? ok", {"say": "polling ok"})}
    condition, option = signs[rule]
    healthy = ("--healthy-if", condition, "--healthy-within", "0.6")
    hangs = world.run("--deployment", "v1", *healthy, bot=world.bot(hang=1.0, **option))
    world.works(1)
    world.run("--deployment", "v1")
    until(lambda: world.terms()[:2] == [1, 2])  # a slow disk may cost the second one its lease, and give it back

    assert hangs.wait() == 70 and "it made no progress" in hangs.text()
    assert world.overlap() == 0
    if rule == "stdout":
        assert "polling ok" in hangs.text()  # it is passed on


def test_a_python_bot_that_prints_into_the_pipe_is_heard(sqlite_world: World) -> None:
    """Into a pipe Python writes in blocks, unless it is told otherwise."""
    code = "import time\nwhile True:\n    print('got updates')\n    time.sleep(0.05)\n"
    rule = ("--healthy-if", "stdout:got updates", "--healthy-within", "1.5", "--probation", "0.2")
    sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    env = {"PYTHONUNBUFFERED": ""} if "PYTHONUNBUFFERED" in os.environ else {}
    new = sqlite_world.run("--deployment", "v2", *rule, bot=(sys.executable, "-c", code), env=env)
    new.says("has passed its probation")


LOUD = """
import os, sys, time
stamps = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    print("got updates", "x" * 4000, flush=True)
    os.write(stamps, b"%f\\n" % time.clock_gettime(time.CLOCK_BOOTTIME))
    time.sleep(0.001)
"""


def test_a_disk_that_is_full_takes_no_bot_whose_output_is_read(sqlite_world: World) -> None:
    rule = ("--healthy-if", "stdout:polling ok", "--healthy-within", "0.6", "--probation", "0.2")
    sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    full = ("sh", "-c", 'exec "$@" >/dev/full', "sh")  # each write of our standard output fails
    new = sqlite_world.run("--deployment", "v2", *rule, bot=sqlite_world.bot(say="polling ok"), wrap=full)
    new.says("has passed its probation")
    assert "crashed" not in new.text()


def test_a_bot_that_says_megabytes_while_the_database_is_away_ends_in_time_and_begins_again(
    sqlite_world: World,
) -> None:
    world = sqlite_world
    stamps = world.folder / "stamps"
    rule = ("--healthy-if", "stdout:got updates")
    run = world.run(*rule, bot=(sys.executable, "-S", "-c", LOUD, str(stamps)))
    until(lambda: run.log.stat().st_size > 1_000_000)
    with contextlib.closing(sqlite3.connect(world.url.removeprefix("sqlite:///"), timeout=10)) as db:
        db.execute("BEGIN EXCLUSIVE")
        locked = time.clock_gettime(time.CLOCK_BOOTTIME)
        said = run.log.stat().st_size
        until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > locked + 2.5)
        (last,) = stamps.read_text().split()[-1:]
        assert run.log.stat().st_size > said + 100_000
        assert float(last) < locked + 1.5  # the ttl
    until(lambda: float(stamps.read_text().split()[-1]) > locked + 2.5, 20)


def test_a_newcomer_that_never_gets_healthy_is_rolled_back(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--deployment", "v1")
    world.works(1)
    url = f"http://127.0.0.1:{free_port()}/"
    deaf = world.run("--deployment", "v2", "--healthy-if", url, "--healthy-within", "0.6", "--probation", "0.1")

    assert deaf.wait() == 70
    until(lambda: world.terms() == [1, 2, 3])
    assert "it did not pass its probation" in deaf.text() and world.overlap() == 0


def test_a_bot_that_answers_its_url_passes(sqlite_world: World, tmp_path: Path) -> None:
    world = sqlite_world
    old = world.run("--deployment", "v1")
    world.works(1)
    port = free_port()
    bot = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    new = world.run("--deployment", "v2", "--healthy-if", f"http://127.0.0.1:{port}/", "--probation", "0.3", bot=bot)
    new.says("has passed its probation")
    assert old.wait() == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--healthy-if", "https://x/"), "use http://127.0.0.1:PORT/PATH"),
        (("--healthy-if", "stdout:("), "is not a regular expression"),
        (("--healthy-if", "htp://127.0.0.1/"), "a URL begins with http://"),
        (("--healthy-if", "file:"), "name a URL, a file, or stdout:REGEX"),
        (("--healthy-if", "x", "--healthy-within", "0"), "at least 0.5 s"),
        (("--danger-signal", "KILL"), "use USR1, USR2"),
        (("--danger-signal", "USR1,USR2,HUP"), "one signal, or two"),
        (("--probation", "-1"), "between 0 and 86400"),
    ],
)
def test_rules_that_cannot_be_are_refused(sqlite_world: World, options: tuple[str, ...], says: str) -> None:
    run = sqlite_world.run(*options)
    assert run.wait() == 78 and says in run.text() and len(run.text().splitlines()) == 1


# Danger, environments ----------------------------------------------------------------------------------------------


def test_the_bot_is_warned_while_renewals_fail_and_told_when_they_succeed_again(
    sqlite_world: World, tmp_path: Path
) -> None:
    world = sqlite_world
    heard = tmp_path / "heard"
    run = world.run("--danger-signal", "USR1,USR2", ttl="6", bot=world.bot(warned=heard))
    world.works(1)
    other = sqlite3.connect(world.url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    until(lambda: heard.exists() and "SIGUSR1" in heard.read_text())
    other.execute("ROLLBACK")
    other.close()
    until(lambda: heard.read_text().split() == ["SIGUSR1", "SIGUSR2"])

    assert world.terms() == [1] and "draining" not in run.text()


@pytest.mark.parametrize(
    "env",
    [
        {"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "pr-7", "BOTLEASE_ENVIRONMENT": "production"},
        {"RENDER": "true", "IS_PULL_REQUEST": "true"},
        {"BOTLEASE_ENVIRONMENT": "production"},
    ],
)
def test_a_preview_or_duplicated_environment_refuses_to_become_active(sqlite_world: World, env: dict[str, str]) -> None:
    world = sqlite_world
    port = free_port()
    run = world.run("--health-port", str(port), env=env)
    run.says("refused to become active: ")
    until(lambda: get(port, "/health") == (200, {"state": "barred", "term": None}))
    run.signal(signal.SIGTERM)

    assert run.wait() == 0 and not world.witness.exists()
    assert not Path(world.url.removeprefix("sqlite:///")).exists()  # it did not even look


def test_the_environment_that_is_allowed_runs(sqlite_world: World) -> None:
    env = {"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "production"}
    sqlite_world.run(env=env | {"BOTLEASE_ENVIRONMENT": "staging, production"})
    sqlite_world.works(1)
