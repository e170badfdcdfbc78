"""Dead is who the kernel says is dead, and nobody else (R3)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import clean_env, until

from botlease import procfs
from botlease.work import proof, tree

MARKS = {"BOTLEASE_BOT": "hopper", "BOTLEASE_INSTANCE_ID": f"of-{os.getpid()}"}
ASKS = """
import sys
from botlease.work import proof
living, dead = (proof.Owner(int(pid), "1") for pid in sys.argv[1:])
print(proof.alive(living), proof.alive(dead))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, who mounts")
def test_who_cannot_be_looked_at_is_not_taken_for_dead() -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    shell = 'mount -t tmpfs none /proc && exec "$@"'  # nothing can be read of anybody
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", ASKS, str(os.getpid()), str(dead.pid)],
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.stdout == "True False\n", done.stderr


def test_a_zombie_is_dead_and_so_is_whose_number_another_one_has() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        start = procfs.start_time(process.pid) or ""
        assert proof.alive(proof.Owner(process.pid, start))
        assert not proof.alive(proof.Owner(process.pid, "1"))
        process.kill()
        until(lambda: (procfs.stat(process.pid) or [b""])[0] == b"Z")
        assert not proof.alive(proof.Owner(process.pid, start))


HOPPER = """
import os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("hops", flush=True)
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
end = time.monotonic() + 0.4
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.0005)
"""


def test_a_work_that_forks_and_ends_all_the_time_is_not_proved_gone_before_it_is() -> None:
    """Each of its processes may have ended before it was looked at, and the next one not have been there yet."""
    tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 0)
    with subprocess.Popen(["sleep", "600"]) as dead:
        holder = proof.make([dead.pid])
        dead.kill()
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOPPER], env=clean_env(**MARKS), stdout=subprocess.PIPE
        ) as first:
            assert first.stdout is not None and first.stdout.readline() == b"hops\n"
            until(lambda: proof.gone(holder, *MARKS.values()))
            marks = proof._marks(*MARKS.values())
            for _ in range(5):
                assert not [p for p in os.listdir("/proc") if p.isdigit() and _carries(int(p), marks)]


def _carries(pid: int, marks: frozenset[bytes]) -> bool:
    try:
        return marks.issubset(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False


DIES = """
import os, subprocess, sys
from botlease.work import proof
dead = subprocess.Popen(["sleep", "600"])
holder = proof.make([dead.pid])
dead.kill()
dead.wait()
print(proof.gone(holder, "nobody", "at all"))
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, who mounts")
@pytest.mark.parametrize("hidden", ["1", "2"])
def test_processes_of_others_that_may_not_be_looked_at_keep_no_death_from_being_proved(hidden: str) -> None:
    user = 64_000 + os.getpid() % 1000  # nobody else's: a process of ours that hides itself would be in doubt
    shell = f'mount -t proc -o hidepid={hidden} proc /proc && exec setpriv --reuid={user} --clear-groups "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", DIES],
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"nothing can be mounted here, or not be run as another user: {done.stderr}")
    assert done.stdout == "True\n", done.stderr
