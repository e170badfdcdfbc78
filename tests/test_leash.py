"""The leash: what dies with the reaper by the kernel's hand, while nobody else gets to run (R2)."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import clean_env, until
from netns import has_pid_namespaces, is_the_root
from reapers import Reaper, a_reaper, gone, opened

from botlease import clock
from botlease.work import tree
from botlease.work.leash import Leash

LEASH = 2
"""Descriptors that one takes."""
LONG = 3000.0
"""Seconds, at half of which all is looked through: not in these tests."""

# Writes pid and group of what it has started, and waits. "group": in its own; "session": in one of its own, below it;
# "daemon": in one of its own, and an orphan.
BOT = """
import os, sys, time
kind, path, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
note = open(path, "w")
if user:
    os.setresuid(user, user, user)
first = os.fork() if kind != "alone" else 0
if kind == "daemon" and first == 0:
    os.setsid()
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)
elif kind == "daemon":
    os.waitpid(first, 0)
elif kind == "session" and first == 0:
    os.setsid()
if kind == "alone" or not first:
    print(os.getpid(), file=note, flush=True)
while True:
    time.sleep(100)
"""


class Bot:
    """Below a reaper whose supervisor does nothing any more."""

    def __init__(self, reaper: Reaper, folder: Path, kind: str, user: int = 0, *, warm: bool = False) -> None:
        self.reaper = reaper
        note = folder / "pid"
        note.unlink(missing_ok=True)
        reaper.prepare([sys.executable, "-S", "-c", BOT, kind, str(note), str(user)])
        if warm:
            reaper.tell(do="start", env={}, until=None, gate=True)
        else:
            reaper.start({}, seconds=LONG)
        reaper.says("started")
        self.pid = int(until(lambda: note.exists() and note.read_text().strip()))
        self.ends = os.pidfd_open(self.pid)

    def dies(self, within: float = 10.0) -> bool:
        return bool(select.select([self.ends], [], [], within)[0])


@contextlib.contextmanager
def a_bot(folder: Path, kind: str, user: int = 0) -> Iterator[tuple[Reaper, Bot]]:
    with a_reaper() as reaper:
        try:
            bot = Bot(reaper, folder, kind, user)
            try:
                yield reaper, bot
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(bot.ends, signal.SIGKILL)
                os.close(bot.ends)
        finally:
            os.kill(reaper.pid, signal.SIGKILL)


def leashes(reaper: Reaper) -> int:
    """How many there are that hold: what makes the kernel signal is set last (``O_ASYNC``)."""
    ends = 0
    for fd in opened(reaper.pid):
        with contextlib.suppress(OSError):  # closed meanwhile
            flags = Path(f"/proc/{reaper.pid}/fdinfo/{fd}").read_text().partition("flags:")[2].split()[0]
            ends += bool(int(flags, 8) & os.O_ASYNC)
    return ends // LEASH


def arm(reaper: Reaper, seconds: float) -> None:
    reaper.tell(do="arm", until=clock.now() + seconds)


@pytest.fixture(autouse=True)
def orphans() -> Iterator[None]:
    """Come to this process, as they come to a supervisor; which does not kill them here."""
    tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 1)
    yield
    tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 0)
    for pid in tree.Children(os.getpid())():
        if gone(pid):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def test_what_a_bot_has_started_in_its_group_dies_with_the_reaper(tmp_path: Path) -> None:
    with a_bot(tmp_path, "group") as (reaper, bot):
        until(lambda: leashes(reaper) == 1)
        os.kill(reaper.pid, signal.SIGKILL)
        assert bot.dies()


def test_what_has_daemonised_is_held_from_the_next_renewal_on(tmp_path: Path) -> None:
    with a_bot(tmp_path, "daemon") as (reaper, bot):
        arm(reaper, LONG)
        until(lambda: leashes(reaper) == 2)
        os.kill(reaper.pid, signal.SIGKILL)
        assert bot.dies()


def test_a_stopped_reaper_that_the_kernel_kills_at_the_end_of_trust_takes_them_along(tmp_path: Path) -> None:
    with a_bot(tmp_path, "daemon") as (reaper, bot):
        arm(reaper, 5.0)
        until(lambda: leashes(reaper) == 2)
        os.kill(reaper.pid, signal.SIGSTOP)
        assert bot.dies()
        until(lambda: gone(reaper.pid))  # the kernel closes what it has open before it is dead


def test_what_has_a_session_of_its_own_is_held_when_a_renewal_is_late(tmp_path: Path) -> None:
    with a_bot(tmp_path, "session") as (reaper, bot):
        arm(reaper, LONG)
        arm(reaper, 4)  # half of it
        until(lambda: leashes(reaper) == 2)
        os.kill(reaper.pid, signal.SIGKILL)
        assert bot.dies()


@pytest.mark.skipif(not is_the_root(), reason="only root can become another user, and signal it")
def test_a_bot_that_has_dropped_its_user_dies_with_the_reaper(tmp_path: Path) -> None:
    """And with its user its death signal."""
    with a_bot(tmp_path, "alone", user=65534) as (reaper, bot):
        until(lambda: leashes(reaper) == 1)
        os.kill(reaper.pid, signal.SIGKILL)
        assert bot.dies()


def test_a_group_that_has_ended_is_let_go(tmp_path: Path) -> None:
    with a_bot(tmp_path, "daemon") as (reaper, bot):
        arm(reaper, LONG)
        until(lambda: leashes(reaper) == 2)
        os.kill(bot.pid, signal.SIGKILL)
        assert bot.dies()
        until(lambda: arm(reaper, LONG) or leashes(reaper) == 1)


def test_what_has_daemonised_while_it_warmed_up_is_held_before_the_gate_opens(tmp_path: Path) -> None:
    with a_reaper() as reaper:
        bot = Bot(reaper, tmp_path, "daemon", warm=True)
        reaper.tell(do="open", until=clock.now() + LONG, term=1)
        reaper.says("opened")
        assert leashes(reaper) == 2
        os.kill(reaper.pid, signal.SIGKILL)
        assert bot.dies()
        os.close(bot.ends)


def test_all_children_are_found_however_many_there_are() -> None:
    code = """
import os, signal
from botlease.work import tree
made = []
try:
    for _ in range(700):
        pid = os.fork()
        if pid == 0:
            tree.prctl(tree.PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pause()
        made.append(pid)
    print(sorted(tree.Children(os.getpid())()) == sorted(made))
finally:
    for pid in made:
        os.kill(pid, signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_nothing_is_left_of_a_leash_when_its_bot_is_gone(tmp_path: Path) -> None:
    with a_reaper() as reaper:
        for _ in range(3):
            bot = Bot(reaper, tmp_path, "daemon")
            arm(reaper, LONG)
            until(lambda: leashes(reaper) == 2)
            reaper.tell(do="kill")
            reaper.says("gone")
            os.close(bot.ends)
            until(lambda: leashes(reaper) == 0)


def test_a_spare_is_held_and_when_it_has_ended_or_was_replaced_nothing_is_left_of_its_leash(tmp_path: Path) -> None:
    with a_reaper() as reaper:
        reaper.prepare(["sleep", "600"])
        spare = reaper.spare()
        until(lambda: leashes(reaper) == 1)
        os.kill(spare, signal.SIGKILL)
        until(lambda: leashes(reaper) == 0)
        reaper.prepare(["sleep", "600"])
        spare = reaper.spare()
        os.kill(reaper.pid, signal.SIGSTOP)  # it hears of the order first, and then of the death
        os.kill(spare, signal.SIGKILL)
        until(lambda: gone(spare))
        reaper.start({}, seconds=LONG)
        os.kill(reaper.pid, signal.SIGCONT)
        assert reaper.says("started")["pid"] != spare
        # Not buried yet, it may have been taken for something that had daemonised: until the next renewal.
        until(lambda: arm(reaper, LONG) or leashes(reaper) == 1)


@pytest.mark.skipif(
    not has_pid_namespaces() or not is_the_root(), reason="numbers are chosen by root in a pid namespace"
)
def test_whoever_has_the_number_of_one_that_ended_meanwhile_is_not_held() -> None:
    code = """
import subprocess, time
from pathlib import Path
from botlease.work import tree
from botlease.work.leash import Leash
def sleeps():
    return subprocess.Popen(["sleep", "600"], start_new_session=True)
ended, asked, strangers = sleeps(), tree.started, []
time.sleep(0.05)  # the kernel tells starts to a hundredth of a second
def meanwhile(pid):
    began = asked(pid)
    if not strangers:
        ended.kill()
        ended.wait()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        strangers.append(sleeps())
    return began
tree.started = meanwhile
leash = Leash()
leash.hold_groups_of([ended.pid])
(stranger,) = strangers
print(stranger.pid == ended.pid, len(leash), stranger.poll())
stranger.kill()
"""
    wrap = ("unshare", "--pid", "--fork", "--mount-proc")
    done = subprocess.run([*wrap, sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True)
    assert done.stdout == "True 0 None\n", done.stderr


def test_a_leash_that_is_let_go_does_not_kill(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        try:
            leash = Leash()
            leash.hold(stranger.pid)
            assert len(leash) == 1
            leash.close()
            assert len(leash) == 0
            os.sched_yield()
            assert stranger.poll() is None
            leash.hold(stranger.pid)
            _, (one, other) = leash._held.popitem()
            one.close()  # as when the process ends
            assert stranger.wait(10) == -signal.SIGKILL
            other.close()
        finally:
            stranger.kill()


def test_a_bot_of_very_many_groups_is_swept_as_ever(tmp_path: Path) -> None:
    """The leashes leave the reaper descriptors to look with."""
    many = f"""
import os, sys, time
for n in range(40):
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
for n in range(40):
    os.wait()
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(600)
"""
    with a_reaper() as reaper:
        resource.prlimit(reaper.pid, resource.RLIMIT_NOFILE, (64, 64))
        reaper.prepare([sys.executable, "-S", "-c", many])
        reaper.start({}, seconds=LONG)
        reaper.says("started")
        until((tmp_path / "ready").exists)
        arm(reaper, LONG)
        until(lambda: leashes(reaper) == 8)
        reaper.tell(do="kill")
        reaper.says("gone")
        assert reaper.children() == []


@pytest.mark.skipif(not has_pid_namespaces(), reason="needs pid namespaces")
def test_under_the_proc_of_another_pid_namespace_nobody_is_taken_for_ours() -> None:
    asks = f"print(tree.Children({os.getpid()})()); print(tree.kill_below(1)); tree.descendants(1)"
    code = f"from botlease.work import tree; {asks}"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True
    )
    assert done.stdout.split() == ["[]", "0"]
    assert "another pid namespace" in done.stderr
