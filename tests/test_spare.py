"""The process that a standby has forked ahead: it becomes the bot, and is nothing before."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest
from harness import World, marked, until
from reapers import Reaper, a_reaper, gone

from botlease import clock

ECHO = ("sh", "-c", "echo hello; echo $GREETING; exec sleep 60")


def test_the_bot_is_the_process_that_was_forked_ahead(tmp_path: Path) -> None:
    with a_reaper() as r, (tmp_path / "out").open("wb") as out:
        r.prepare(ECHO)
        spare = r.spare()
        r.start({"stdout": out.fileno()}, GREETING="from here")
        assert r.says("started")["pid"] == spare == r.children()[0]
        until(lambda: (tmp_path / "out").read_text() == "hello\nfrom here\n")


def test_a_program_that_is_not_there_is_said_by_the_spare_too() -> None:
    with a_reaper() as r:
        r.prepare(["/nothing/here"])
        r.spare()
        r.start({})
        assert r.says("failed")["error"] == "No such file or directory"
        assert r.says("gone")["status"] == 127


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_spare_that_was_killed_is_replaced_and_one_that_was_stopped_goes_on(tmp_path: Path, how: int) -> None:
    """A platform signals everything that it sees of us, also what only waits."""
    with a_reaper() as r, (tmp_path / "out").open("wb") as out:
        r.prepare(ECHO)
        spare = r.spare()
        os.kill(spare, how)
        if how != signal.SIGSTOP:
            until(lambda: not r.children())
        r.start({"stdout": out.fileno()}, GREETING="from here")
        assert (r.says("started")["pid"] == spare) is (how == signal.SIGSTOP)
        until(lambda: (tmp_path / "out").read_text() == "hello\nfrom here\n")
        r.tell(do="kill")
        assert r.says("gone")["status"] == -signal.SIGKILL


def test_a_spare_that_dies_as_its_order_comes_is_replaced(tmp_path: Path) -> None:
    """The reaper has not heard of its death yet: it reads the order first."""
    with a_reaper() as r, (tmp_path / "out").open("wb") as out:
        r.prepare(ECHO)
        spare = r.spare()
        os.kill(r.pid, signal.SIGSTOP)
        os.kill(spare, signal.SIGKILL)
        until(lambda: gone(spare))
        r.start({"stdout": out.fileno()}, GREETING="from here")
        os.kill(r.pid, signal.SIGCONT)
        assert r.says("started")["pid"] != spare
        until(lambda: (tmp_path / "out").read_text() == "hello\nfrom here\n")


def test_there_is_one_spare_and_none_beside_a_bot() -> None:
    with a_reaper() as r:
        r.prepare(ECHO)
        spare = r.spare()
        r.prepare(ECHO)
        r.tell(do="drop")
        r.says("dropped")  # it has heard of all that was said before
        assert r.children() == [spare]
        r.start({}, GREETING="from here")
        r.prepare(ECHO)
        r.tell(do="drop")
        r.says("dropped")
        assert r.children() == [spare]
        r.tell(do="kill")
        assert r.says("gone")["status"] == -signal.SIGKILL
        assert r.children() == []
        r.prepare(ECHO)
        assert r.spare() != spare


def test_an_order_that_comes_after_the_end_of_trust_starts_nothing(tmp_path: Path) -> None:
    """The fence is armed before the spare hears of anything."""
    r = Reaper()
    r.prepare(ECHO)
    spare = r.spare()
    with (tmp_path / "out").open("wb") as out:
        r.tell({"stdout": out.fileno()}, do="start", env={}, gate=False, until=clock.now() - 0.001)
    assert os.waitstatus_to_exitcode(os.waitpid(r.pid, 0)[1]) == -signal.SIGKILL
    r.sock.close()
    until(lambda: gone(spare))
    assert (tmp_path / "out").read_bytes() == b""


def test_a_spare_dies_with_its_reaper() -> None:
    r = Reaper()
    r.prepare(ECHO)
    spare = r.spare()
    os.kill(r.pid, signal.SIGKILL)
    os.waitpid(r.pid, 0)
    until(lambda: gone(spare))
    r.sock.close()


@pytest.mark.parametrize("drained", [True, False])
def test_the_side_car_lock_goes_with_a_drain_and_stays_with_a_crash(tmp_path: Path, drained: bool) -> None:
    """After a drain the term is over when nothing is left, and the supervisor need not ask. After a crash the bot is
    started again, and the lock is kept."""
    with a_reaper() as r, (tmp_path / "lock").open("w") as lock, (tmp_path / "lock").open("w") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        r.prepare(["sleep", "60"])
        r.start({"guard": lock.fileno()})
        lock.close()
        pid = r.says("started")["pid"]
        if drained:
            r.tell(do="signal", number=int(signal.SIGTERM), drain=True)
        else:
            os.kill(pid, signal.SIGTERM)
        assert r.says("gone")["guarded"] is not drained
        if drained:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_stands_by_has_a_spare_and_who_works_has_none(world: World) -> None:
    first = world.run("--deployment", "v1")
    world.works(1)
    second = world.run("--deployment", "v2", "--standby")
    second.says("standby")
    (spare,) = until(lambda: [p for p in second.children() if len(second.children()) == 2][1:])
    assert len(first.children()) == 2  # reaper and bot
    first.signal(signal.SIGTERM)
    first.wait()
    world.works(2)
    assert second.children()[1:] == [spare] and spare in {pid for pid, _ in world.stamps()}
    assert world.overlap() == 0


def test_who_is_passive_has_a_spare_again(sqlite_world: World) -> None:
    first = sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    sqlite_world.run("--deployment", "v2", "--probation", "60")
    sqlite_world.works(2)
    first.says("ready to take back")
    until(lambda: len(first.children()) == 2)


def test_a_spare_is_gone_with_its_supervisor(sqlite_world: World) -> None:
    holder = sqlite_world.run("--deployment", "v1")
    sqlite_world.works(1)
    mark = f"spare-{os.getpid()}"
    standby = sqlite_world.run("--deployment", "v1", "--standby", env={"MARK": mark})
    standby.says("standby")
    until(lambda: len(standby.children()) == 2)
    standby.process.kill()
    standby.process.wait()
    until(lambda: not marked(mark.encode()), 2.0)
    assert holder.process.poll() is None and len(sqlite_world.stamps()) == 1
