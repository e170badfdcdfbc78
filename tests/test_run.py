"""``botlease run`` with real supervisors, real bots and real signals. The witness is the judge."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from harness import BOTLEASE, WITNESS, World, clean_env, marked, until

from botlease import clock
from botlease.run import AFTER_A_RELEASE
from botlease.work.tree import descendants


def test_the_newer_deployment_takes_over_without_overlap_and_the_old_one_turns_passive(world: World) -> None:
    old = world.run("--deployment", "v1")
    world.works(1)
    new = world.run("--deployment", "v2")
    world.works(2)
    old.says("passive")
    new.says("active: term 2")

    assert world.overlap() == 0
    assert old.process.poll() is None


def test_who_was_stopped_leaves_the_processors_to_its_successor_for_a_moment(sqlite_world: World) -> None:
    """Tidying up takes some milliseconds of both, in which the next bot would start later."""
    supervisor = sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    ended = os.pidfd_open(supervisor.pid)
    supervisor.signal(signal.SIGTERM)
    assert select.select([ended], [], [], 20)[0]
    end = datetime.fromisoformat(clock.iso(clock.wall()))
    os.close(ended)
    with contextlib.closing(sqlite3.connect(sqlite_world.url.removeprefix("sqlite:///"))) as db:
        (released,) = db.execute("SELECT released_at FROM bot_terms").fetchone()
    assert (end - datetime.fromisoformat(released)).total_seconds() >= AFTER_A_RELEASE


def test_an_equal_deployment_stands_by_and_takes_over_when_the_first_is_stopped(world: World) -> None:
    first = world.run("--deployment", "v1")
    world.works(1)
    second = world.run("--deployment", "v1")
    second.says("standby: ")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    world.works(2)

    assert world.overlap() == 0


def test_a_second_start_by_hand_is_refused_and_names_the_first(world: World) -> None:
    first = world.run()
    world.works(1)
    second = world.run()

    assert second.wait() == 75
    assert f"pid {first.pid} " in second.text() and f"`kill {first.pid}`" in second.text()
    assert len(world.stamps()) == 1


def test_take_over_and_standby_are_the_ways_around_a_refusal(world: World) -> None:
    first = world.run()
    world.works(1)
    waiting = world.run("--standby")
    waiting.says("standby: ")
    world.run("--take-over")
    world.works(2)
    first.says("passive")

    assert world.overlap() == 0


def test_after_a_kill_of_everything_the_next_start_by_hand_works_at_once(world: World) -> None:
    first = world.run(ttl="10")
    world.works(1)
    for pid in [first.pid, *first.children()]:
        with contextlib.suppress(ProcessLookupError):  # the bot dies with the others
            os.kill(pid, signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    world.run(ttl="10")
    world.works(2)

    # the kernel proves the first one dead: nobody waits for its ttl of 10 s
    assert time.monotonic() - began < 5
    assert world.overlap() == 0


@pytest.mark.parametrize(
    ("code", "options"), [(0, ()), (3, ("--max-crashes", "0")), (77, ("--max-crashes", "0"))], ids=str
)
def test_the_exit_code_of_the_bot_is_passed_through(sqlite_world: World, code: int, options: tuple[str, ...]) -> None:
    run = sqlite_world.run(*options, bot=("sh", "-c", f"exit {code}"))
    assert run.wait() == code


def test_a_bot_killed_by_a_signal_gives_128_plus_n(sqlite_world: World) -> None:
    assert sqlite_world.run("--max-crashes", "0", bot=("sh", "-c", "kill -9 $$")).wait() == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_forwarded_and_a_clean_stop_is_0(sqlite_world: World, number: int) -> None:
    run = sqlite_world.run(bot=("sleep", "100"))
    run.says("active")
    run.signal(number)
    assert run.wait() == 0


def test_what_the_bot_says_to_sigterm_is_passed_through(sqlite_world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(sqlite_world.witness), "--stop-code", "9")
    run = sqlite_world.run(bot=witness)
    sqlite_world.works(1)
    run.signal(signal.SIGTERM)
    assert run.wait() == 9


def test_other_signals_reach_the_bot(sqlite_world: World) -> None:
    script = "trap 'echo got-usr1; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
    run = sqlite_world.run("--max-crashes", "0", bot=("sh", "-c", script))
    run.says("ready")
    run.signal(signal.SIGUSR1)
    assert run.wait() == 5
    assert "got-usr1" in run.text()


def test_a_bot_that_ignores_sigterm_is_killed_after_the_grace(world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(world.witness), "--deaf", "1")
    run = world.run("--stop-grace", "0.7", bot=witness)
    world.works(1)
    began = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait() == 137
    assert time.monotonic() - began >= 0.6


def test_a_deaf_old_bot_does_not_overlap_with_the_new_one(world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(world.witness), "--deaf", "1")
    old = world.run("--deployment", "v1", "--stop-grace", "0.7", bot=witness)
    world.works(1)
    world.run("--deployment", "v2")
    world.works(2)
    assert world.overlap() == 0
    old.signal(signal.SIGTERM)
    assert old.wait() == 0  # it was passive by then: that its bot had to be killed is an old story


def test_a_slow_bot_is_given_its_grace_while_the_lease_is_renewed(world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(world.witness), "--slow", "2.5")  # longer than the ttl of 1.5
    world.run("--deployment", "v1", bot=witness)
    world.works(1)
    world.run("--deployment", "v2")
    world.works(2)
    spans = sorted(world.stamps().values())

    assert world.overlap() == 0
    assert spans[1][0] - spans[0][0] > 2.4


def test_a_grandchild_that_daemonised_goes_with_the_bot(world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(world.witness), "--daemon", "1")
    run = world.run("--stop-grace", "0.5", bot=witness)
    world.works(2)
    below = run.children()
    run.signal(signal.SIGTERM)
    run.wait()
    assert [p for p in below if Path(f"/proc/{p}/environ").exists()] == []


def test_the_bot_gets_its_term_and_not_the_database_of_the_lease(sqlite_world: World) -> None:
    run = sqlite_world.run("--name", "mybot", bot=("env",), env={"DATABASE_URL": "postgresql://bots-own/db"})
    assert run.wait() == 0
    lines = run.text().splitlines()
    assert {"BOTLEASE_TERM=1", "BOTLEASE_BOT=mybot", "DATABASE_URL=postgresql://bots-own/db"} <= set(lines)
    assert any(line.startswith("BOTLEASE_INSTANCE_ID=mybot-") for line in lines)
    assert not any(line.startswith("BOTLEASE_DATABASE_URL") for line in lines)


def test_the_bot_gets_the_database_of_the_lease_when_asked(sqlite_world: World) -> None:
    run = sqlite_world.run("--pass-database", bot=("env",))
    run.wait()
    assert f"BOTLEASE_DATABASE_URL={sqlite_world.url}" in run.text()


def test_the_bots_descriptors_are_its_three_standard_ones(world: World) -> None:
    # One write with its own end of line: whatever else is written, it is not on this line.
    run = world.run(bot=("sh", "-c", "echo descriptors $(ls /proc/self/fd)"))
    run.wait()
    fds = next(line for line in run.text().splitlines() if line.startswith("descriptors "))
    assert fds.split()[1:] in (["0", "1", "2"], ["0", "1", "2", "3"])  # ls itself opens the folder


LEND = """
import os, resource, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
os.dup2(os.open(sys.argv[1], os.O_RDONLY), min(most, 8192) - 1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_reaper_and_bot_have_nothing_open_of_the_supervisors_and_of_who_started_it_also_when_forked_anew(
    sqlite_world: World,
) -> None:
    world = sqlite_world
    lent = world.folder / "lent"
    lent.touch()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 4097:
        pytest.skip("no descriptor above 4096 can be had here")
    run = world.run(wrap=(sys.executable, "-c", LEND, str(lent)))
    world.works(1)

    def opened(pid: int) -> set[str]:
        return {os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}

    assert str(lent) in opened(run.pid)
    for anew in (False, True):
        reaper, bot = run.children()
        for pid in (reaper, bot):
            assert not {name for name in opened(pid) if name in (str(lent), world.url.removeprefix("sqlite:///"))}
        if not anew:
            os.kill(reaper, signal.SIGKILL)
            run.says("active: term 2, started")


def test_a_bot_that_crashes_is_restarted_within_the_term(sqlite_world: World) -> None:
    marker = sqlite_world.folder / "crashed"
    script = f"echo term $BOTLEASE_TERM; test -e {marker} && exit 0; touch {marker}; exit 1"
    run = sqlite_world.run(bot=("sh", "-c", script))
    assert run.wait() == 0
    assert run.text().count("term 1\n") == 2


def test_the_first_crash_is_restarted_at_once_and_the_next_one_only_after_a_while(world: World) -> None:
    run = world.run(bot=world.bot(exit=3, **{"for": 0.3}), ttl="10")
    run.says("restart 1 of 5")
    run.says("restart 2 of 5 in 2 s")
    first, second = sorted(world.stamps().values())[:2]
    assert 0 < second[0] - first[1] < 1.0  # 1 s was the shortest pause that there was


def test_a_bot_that_says_its_configuration_is_wrong_is_not_started_again(sqlite_world: World) -> None:
    run = sqlite_world.run(bot=("sh", "-c", "exit 78"))
    assert run.wait() == 78
    assert "restart" not in run.text()


def test_a_stop_signal_between_a_crash_and_the_restart_ends_it(sqlite_world: World) -> None:
    run = sqlite_world.run("--max-crashes", "3", bot=("sh", "-c", "exit 4"))
    run.says("restart 2 of 3 in 2 s")
    run.signal(signal.SIGTERM)
    assert run.wait() == 4


# Kill -9 and SIGSTOP -------------------------------------------------------------------------------------------


TRIALS = 25  # times 8 below: 200


@pytest.mark.parametrize("chunk", [*range(2), *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 8))])
def test_kill_9_of_the_supervisor_leaves_no_living_child_after_100_ms(
    tmp_path: Path, chunk: int, sqlite_url: str
) -> None:
    """At random moments: while it starts, as the bot starts, and in the middle of its work."""
    rng = random.Random(chunk)
    took = []
    for trial in range(TRIALS):
        daemon = ("--daemon", "1") if trial % 3 == 0 else ()
        mark, note = f"trial-{chunk}-{trial}-{os.getpid()}.", tmp_path / f"w{trial}"
        run = subprocess.Popen(
            [*BOTLEASE, "run", "--take-over", "--", sys.executable, "-S", WITNESS, str(note), *daemon],
            env=clean_env(BOTLEASE_DATABASE_URL=sqlite_url, MARK=mark),
            stderr=subprocess.DEVNULL,
        )
        if trial % 5 > 1:  # it works; the others are killed as they start, or as their bot does
            until(lambda w=note: w.exists() and w.stat().st_size, 30)
        time.sleep(rng.uniform(0.0, 0.05 if trial % 5 > 1 else 0.5))
        run.kill()
        run.wait()
        killed = looked = time.monotonic()
        while marked(mark.encode()):  # how long the look itself takes is not theirs
            assert looked < killed + 5
            looked = time.monotonic()
        took.append(looked - killed)
    # A busy machine is late with a few.
    assert sum(seconds > 0.1 for seconds in took) <= TRIALS // 5


@pytest.mark.parametrize("who", ["supervisor", "bot", "supervisor and bot", "everything"])
def test_stopped_for_three_ttl_and_continued_there_is_no_overlap(world: World, who: str) -> None:
    first = world.run("--deployment", "v1", "--lock-delay", "0")
    world.works(1)
    second = world.run("--deployment", "v1", "--lock-delay", "0")
    second.says("standby")
    reaper, bot = first.children()
    stopped = {
        "supervisor": [first.pid],
        "bot": [bot],
        "supervisor and bot": [first.pid, bot],
        "everything": [first.pid, reaper, bot],
    }[who]
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    world.freeze(*stopped)
    if who != "bot":
        world.works(2)  # the second one takes over while the first one sleeps
    while time.clock_gettime(time.CLOCK_BOOTTIME) < began + 3 * 1.5:
        time.sleep(0.01)
    for pid in stopped:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            assert who != "bot"
    before = len(world.witness.read_text())
    until(lambda: len(world.witness.read_text()) > before)
    time.sleep(0.2)

    assert world.overlap() == 0
    if who == "bot":
        assert len(world.stamps()) == 1  # the supervisor goes on renewing: no fail-over


def test_a_killed_reaper_takes_the_bot_and_its_daemons_with_it_and_the_bot_is_started_anew(world: World) -> None:
    witness = (sys.executable, "-S", WITNESS, str(world.witness), "--daemon", "1")
    run = world.run(bot=witness)
    world.works(2)
    reaper, *rest = run.children()
    os.kill(reaper, signal.SIGKILL)
    world.works(4)
    assert all(not Path(f"/proc/{p}/environ").exists() for p in rest)
    run.signal(signal.SIGTERM)
    run.wait()
    assert marked(str(world.witness).encode()) == []


def test_a_reaper_killed_while_the_bot_waits_for_its_restart_leads_to_one_bot(sqlite_world: World) -> None:
    marker = sqlite_world.folder / "crashed"
    witness = f"{sys.executable} -S {WITNESS} {sqlite_world.witness}"
    script = f"test -e {marker}2 && exec {witness}; test -e {marker} && touch {marker}2; touch {marker}; exit 1"
    run = sqlite_world.run(bot=("sh", "-c", script), ttl="10")
    run.says("restart 2 of 5 in 2 s")
    (reaper,) = run.children()
    os.kill(reaper, signal.SIGKILL)
    sqlite_world.works(1)
    time.sleep(2.5)  # the time of another restart, were there one
    assert len(sqlite_world.stamps()) == 1 and sqlite_world.overlap() == 0


def test_the_bot_cannot_gain_privileges_by_which_it_would_escape_the_fence(sqlite_world: World) -> None:
    run = sqlite_world.run(bot=("grep", "NoNewPrivs", "/proc/self/status"))
    assert run.wait() == 0
    assert "NoNewPrivs:\t1" in run.text()


def test_the_side_car_lock_is_kept_between_a_crash_and_a_late_restart(sqlite_world: World) -> None:
    marker = sqlite_world.folder / "crashed"
    script = f"test -e {marker}2 && exec sleep 60; test -e {marker} && touch {marker}2; touch {marker}; exit 1"
    run = sqlite_world.run(bot=("sh", "-c", script), ttl="1")  # the restart comes after the first end of trust
    run.says("restart 2 of 5 in 2 s")
    until(lambda: run.text().count("active: term 1, started sh") == 3)
    (lock,) = sqlite_world.folder.glob("*.lock")
    with lock.open() as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_pid_1_it_stops_on_sigterm_and_buries_orphans(sqlite_world: World) -> None:
    script = "(sleep 0.05 & exec true) & (sleep 0.1 &) ; sleep 0.3; ps -e -o stat= | grep -c Z; sleep 100"
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *BOTLEASE, "run", "--", "sh", "-c", script],
        env=clean_env(BOTLEASE_DATABASE_URL=sqlite_world.url),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None

    def is_ours(pid: int) -> bool:
        try:
            return "botlease" in Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:  # it has just ended
            return False

    try:
        assert process.stdout.readline() == "0\n"
        first = next(p for p in descendants(process.pid) if is_ours(p))
        os.kill(first, signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_has_daemonised_is_told_to_stop_when_the_bot_has(sqlite_world: World) -> None:
    """It was waited for as long as the grace is, at every handover: nobody worked for ten seconds."""
    helper = "setsid sleep 600 & trap 'exit 0' TERM; echo is up; wait; sleep 600 & wait"
    run = sqlite_world.run("--stop-grace", "60", bot=("sh", "-c", helper), ttl="10")
    run.says("is up")
    until(lambda: sum(Path(f"/proc/{p}/comm").read_text() == "sleep\n" for p in run.children()))
    run.signal(signal.SIGTERM)
    assert run.wait(20) == 0


def test_a_helper_that_has_daemonised_may_finish_when_it_is_told_to_stop(sqlite_world: World) -> None:
    note = sqlite_world.folder / "note"
    tidy = f"trap 'sleep 0.3; echo done > {note}; exit 0' TERM; echo is up; while :; do sleep 0.05; done"
    run = sqlite_world.run("--stop-grace", "60", bot=("sh", "-c", f'setsid sh -c "{tidy}" & wait'), ttl="10")
    run.says("is up")
    run.signal(signal.SIGTERM)
    run.wait(20)
    assert note.read_text() == "done\n"


def test_a_bot_that_somebody_else_told_to_stop_is_not_started_again_at_once(sqlite_world: World) -> None:
    """A platform that signals everything reaches one after the other: a bot that is started now is stopped at once."""
    note = sqlite_world.folder / "starts"
    run = sqlite_world.run(bot=("sh", "-c", f"echo $$ $(date +%s.%N) >> {note}; exec sleep 600"), ttl="10")
    until(lambda: note.exists() and note.read_text().endswith("\n"))
    told = time.clock_gettime(time.CLOCK_REALTIME)
    os.kill(int(note.read_text().split()[0]), signal.SIGTERM)
    until(lambda: note.read_text().count("\n") == 2)
    assert float(note.read_text().split()[3]) - told > 0.05
    run.signal(signal.SIGTERM)
    assert run.wait() == 0


def test_a_stop_does_not_wait_for_a_database_that_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"postgresql://u:secret@127.0.0.1:{deaf.getsockname()[1]}/d"
        world = World(tmp_path, url)
        run = world.run("--wait-database", "60")
        deaf.accept()[0].close()  # it has come; and again it will
        connection, _ = deaf.accept()
        began = time.monotonic()
        run.signal(signal.SIGTERM)
        assert run.wait() == 0 and time.monotonic() - began < 4
        assert "SIGTERM: stopping" in run.text() and "secret" not in run.text()
        connection.close()


def test_a_database_that_says_nothing_is_named_with_the_cure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        world = World(tmp_path, f"postgresql://u:secret@127.0.0.1:{port}/d")
        run = world.run("--wait-database", "0")
        assert run.wait() == 69
        assert f"127.0.0.1:{port}" in run.text() and "firewall" in run.text() and "secret" not in run.text()
