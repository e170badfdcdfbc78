"""What a supervisor does whose reaper was killed or stopped, or cannot be had: it goes on, and harms nobody else."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import BOTLEASE, World, clean_env, until
from reapers import Reaper, gone

from botlease import procfs


def reaper_of(run: object) -> int:
    return run.children()[0]  # type: ignore[attr-defined, no-any-return]


def test_what_whoever_started_us_had_started_before_is_none_of_ours(sqlite_world: World) -> None:
    """`sh -c "something & exec botlease run ..."`: its children are ours, and not the bot's."""
    note = sqlite_world.folder / "sidecar"
    script = f'(sleep 600 & echo $! > {note}; wait) & exec "$@"'
    run = sqlite_world.run(wrap=("sh", "-c", script, "sh"), ttl="10")
    sqlite_world.works(1)
    until(lambda: note.exists() and note.read_text().strip())
    sleeper = int(note.read_text())
    (reaper,) = [p for p in run.children() if Path(f"/proc/{p}/comm").read_text() == "botlease-reaper\n"]
    try:
        os.kill(reaper, signal.SIGKILL)
        sqlite_world.works(2)
        assert not gone(sleeper)
    finally:
        run.signal(signal.SIGTERM)
        run.wait()
        assert not gone(sleeper)
        os.kill(sleeper, signal.SIGKILL)


def fewer_descriptors(pid: int) -> tuple[int, int]:
    """None more than it has. Returns the limits that it had."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))  # what is open stays open
    return before


def test_a_reaper_that_cannot_be_forked_is_tried_again_until_it_can(sqlite_world: World) -> None:
    """Here for want of descriptors; it is the same for want of processes or memory."""
    run = sqlite_world.run("--max-crashes", "9", ttl="10")
    sqlite_world.works(1)
    reaper = reaper_of(run)
    before = fewer_descriptors(run.pid)
    os.kill(reaper, signal.SIGKILL)
    run.says("cannot start ")
    run.says("restart 2 of 9")
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, before)
    sqlite_world.works(2)
    assert "Traceback" not in run.text()
    run.signal(signal.SIGTERM)
    assert run.wait() == 0


def test_a_supervisor_without_a_reaper_ends_when_it_is_told_to(sqlite_world: World) -> None:
    run = sqlite_world.run("--max-crashes", "9", ttl="10")
    sqlite_world.works(1)
    fewer_descriptors(run.pid)
    os.kill(reaper_of(run), signal.SIGKILL)
    run.says("cannot start ")
    run.says("restart 2 of 9")
    run.signal(signal.SIGTERM)
    run.wait()
    sqlite_world.run()
    sqlite_world.works(2)  # the lease was given back
    assert sqlite_world.gap(2) < 9  # and not waited out


def test_a_bot_that_cannot_be_forked_is_a_crash_and_not_the_end_of_the_reaper() -> None:
    reaper = Reaper()
    try:
        reaper.tell(do="prepare", argv=["sleep", "60"], env=dict(os.environ), front={}, ahead=None)
        spare = reaper.spare()
        before = fewer_descriptors(reaper.pid)
        os.kill(spare, signal.SIGKILL)
        until(lambda: not reaper.children())
        reaper.start({})
        failed = reaper.says("failed")
        assert failed["again"] and "Too many open files" in failed["error"]
        assert reaper.says("gone")["status"] == 71
        resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE, before)
        reaper.start({})
        reaper.says("started")
    finally:
        reaper.close()


def test_a_reaper_that_was_stopped_while_it_had_no_fence_is_woken_for_its_work(world: World) -> None:
    first = world.run("--deployment", "v1", ttl="3")
    world.works(1)
    second = world.run("--deployment", "v1", ttl="3")
    second.says("standby")
    os.kill(reaper_of(second), signal.SIGSTOP)
    first.signal(signal.SIGTERM)
    first.wait()
    world.works(2)
    assert world.overlap() == 0


def test_a_supervisor_whose_reaper_was_stopped_ends_when_it_is_told_to(sqlite_world: World) -> None:
    sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    second = sqlite_world.run("--deployment", "v1")
    second.says("standby")
    os.kill(reaper_of(second), signal.SIGSTOP)
    second.signal(signal.SIGTERM)
    assert second.wait() == 0


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="needs Linux")
def test_why_a_reaper_cannot_live_is_said_and_nothing_spins(sqlite_url: str) -> None:
    """No kernel timer is left (`ulimit -i`)."""
    with subprocess.Popen(
        ["prlimit", "--sigpending=0:0", *BOTLEASE, "run", "--", sys.executable, "-c", "input()"],
        env=clean_env(BOTLEASE_DATABASE_URL=sqlite_url),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "restart 2 of 5" not in seen and (line := process.stderr.readline()):
            seen += line
        process.send_signal(signal.SIGTERM)
        seen += process.stderr.read()
    assert "ulimit -i" in seen and "Traceback" not in seen
    assert len(seen.splitlines()) < 40 and procfs.start_time(process.pid) is None


def test_a_term_whose_reaper_was_killed_ends_and_the_next_one_names_who_owns_it_now(world: World) -> None:
    """The row named the dead one. Whoever asked on this host took the lease beside a bot that worked; and a lost file
    was guarded by nobody."""
    run = world.run("--name", "b", ttl="10")
    world.works(1)
    os.kill(reaper_of(run), signal.SIGKILL)
    run.says("active: term 2, started")
    world.works(2)
    said = [*BOTLEASE, "history", "--name", "b", "--json"]
    done = subprocess.run(said, env=clean_env(BOTLEASE_DATABASE_URL=world.url), capture_output=True, text=True)
    assert [json.loads(line)["ended"] for line in done.stdout.splitlines()] == [None, "work_ended"]
    reaper = reaper_of(run)
    if world.url.startswith("sqlite"):
        (lock,) = world.folder.glob("*.lock")
        with lock.open() as f, pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = world.run("--name", "b", "--standby", ttl="10")
    second.says("standby: ")
    os.kill(reaper, signal.SIGSTOP)
    try:
        os.kill(run.pid, signal.SIGKILL)
        time.sleep(1.0)  # it would have been proved dead within 0.1 s; this one cannot fail by being slow
        assert world.terms() == [1, 2]
    finally:
        os.kill(reaper, signal.SIGCONT)
    world.works(3)
    assert world.terms() == [1, 2, 3] and world.overlap() == 0


def test_a_reaper_that_is_stopped_between_a_crash_and_the_restart_keeps_no_lock_for_ever(sqlite_world: World) -> None:
    script = "sleep 0.2; exit 1"
    run = sqlite_world.run(bot=("sh", "-c", script), ttl="1.5")
    run.says("restart 2 of 5 in 2 s")
    reaper = reaper_of(run)
    sqlite_world.freeze(run.pid, reaper)
    try:
        (lock,) = sqlite_world.folder.glob("*.lock")
        with lock.open() as f:

            def free() -> bool:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            until(free, 10)
    finally:
        os.kill(run.pid, signal.SIGCONT)
