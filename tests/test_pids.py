"""A number that a process had and another one has by now: in a pid namespace of its own, where it can be forced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import clean_env, until

from botlease import local, procfs
from botlease.work import proof, tree

SOURCES = os.pathsep.join(str(Path(__file__).parent.parent / part) for part in ("src", "tests"))
NUMBERS = Path("/proc/sys/kernel/ns_last_pid")
MARKS = {"BOTLEASE_BOT": "pids", "BOTLEASE_INSTANCE_ID": "one"}
alone = pytest.mark.skipif(
    os.geteuid() != 0 or not NUMBERS.exists(), reason="only root forces numbers, in a namespace of his own"
)


def sleeper(env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"], env=clean_env(**(env or {})))


def take(number: int) -> int:
    """A stranger, no child of ours, that gets this number, which must be free."""
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # who starts in the same tick of the kernel's clock cannot be told apart
    (read, write) = os.pipe()
    if os.fork() == 0:  # in between, so that the stranger falls to the first process of the namespace
        NUMBERS.write_text(str(number - 1))
        stranger = subprocess.Popen(["sleep", "600"], env=clean_env(), start_new_session=True)
        os.write(write, str(stranger.pid).encode())
        os._exit(0)
    os.close(write)
    got = int(os.read(read, 20))
    os.close(read)
    os.wait()
    assert got == number
    return got


def end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    process.wait()
    return take(process.pid)


def between(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, happens: Callable[[], object]) -> None:
    """After ``owner.name`` has looked, and before anything is done about what it saw."""
    look = getattr(owner, name)

    def looked(*args: object) -> object:
        seen = look(*args)
        monkeypatch.setattr(owner, name, look)
        happens()
        return seen

    monkeypatch.setattr(owner, name, looked)


def below_us(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the reaper kills: something below a child of its own, that this child has buried already."""
    middle = subprocess.Popen(["sh", "-c", "sleep 600 & wait; exec sleep 600"], env=clean_env())
    until(lambda: len(tree.descendants(os.getpid())) == 2)
    (last,) = set(tree.descendants(os.getpid())) - {middle.pid}

    def reused() -> None:
        os.kill(last, signal.SIGKILL)
        until(lambda: procfs.stat(last) is None)
        take(last)

    between(monkeypatch, tree, "look", reused)
    assert tree.kill_below(os.getpid()) == 2
    middle.wait(5)
    return last


def forced_by_hand(monkeypatch: pytest.MonkeyPatch) -> int:
    bot = sleeper(MARKS)
    found = local._describe(bot.pid, "script")
    assert found is not None
    stranger = end(bot)
    assert local.force_kill([found], grace=0.1, say=lambda text: None)  # there is nothing left to end
    return stranger


def left_of_a_dead_holder(monkeypatch: pytest.MonkeyPatch) -> int:
    first = sleeper()
    holder = proof.make([first.pid])
    first.kill()
    first.wait()
    if os.fork() == 0:
        tree.prctl(tree.PR_SET_PDEATHSIG, 0)
        bot = subprocess.Popen(["sleep", "600"], env=clean_env(**MARKS), start_new_session=True)
        Path("bot").write_text(str(bot.pid))
        os._exit(0)
    os.wait()
    number = int(Path("bot").read_text())

    def reused() -> None:
        os.kill(number, signal.SIGKILL)
        until(lambda: procfs.stat(number) is None)
        take(number)

    between(monkeypatch, proof, "_marked", reused)
    assert proof.gone(holder, MARKS["BOTLEASE_BOT"], MARKS["BOTLEASE_INSTANCE_ID"])
    return number


CASES = {f.__name__: f for f in (below_us, forced_by_hand, left_of_a_dead_holder)}


@alone
@pytest.mark.parametrize("case", CASES)
def test_whoever_has_the_number_of_one_that_was_to_be_killed_is_not_hit(tmp_path: Path, case: str) -> None:
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, __file__, case],
        env=clean_env(PYTHONPATH=SOURCES),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare:" in done.stderr or "ns_last_pid" in done.stderr:
        pytest.skip(f"no number can be forced here: {done.stderr}")
    assert (done.returncode, done.stdout) == (0, "the stranger lives\n"), done.stderr


FAMILY = """
import subprocess, sys, time
from botlease.work import tree
shell = subprocess.Popen(["sh", "-c", "for n in $(seq 50); do sleep 600 & done; wait"])
while len(below := tree.descendants(tree.os.getpid())) < 51:
    time.sleep(0.01)
tree.kill_below(tree.os.getpid())
shell.wait()
print(*below)
"""


def test_what_falls_to_somebody_else_when_its_parent_is_killed_is_killed_all_the_same() -> None:
    """Where there is no sub-reaper, or in another pid namespace, the orphans are not below us any more."""
    done = subprocess.run(
        [sys.executable, "-c", FAMILY], env=clean_env(PYTHONPATH=SOURCES), capture_output=True, text=True
    )
    below = [int(word) for word in done.stdout.split()]
    assert len(below) == 51, done.stderr
    until(lambda: not any(procfs.start_time(pid) for pid in below))


if __name__ == "__main__":
    case = os.fork()
    while case:  # the first process of the namespace: it buries all
        pid, status = os.wait()
        if pid == case:
            os._exit(os.waitstatus_to_exitcode(status))
    with pytest.MonkeyPatch.context() as patch:
        number = CASES[sys.argv[1]](patch)
    assert procfs.start_time(number) is not None, "the stranger was killed"
    print("the stranger lives", flush=True)
