"""Proof of death by the kernel of the same host (R3).

The lease names who owns the work: boot id, pid namespace, user, and pid with start time of the supervisor
and of its reaper. Another instance on the same boot, in the same pid namespace and of the same user (or root)
can then tell beyond doubt that both are dead; whatever is left of their work it finds by the bot and the instance
in its environment, kills it, and waits until it is gone. Anything else proves nothing.

The same marks serve the successor after a lease that ran out: see :func:`sweep`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Iterable
from pathlib import Path

from botlease import clock, procfs
from botlease.value import value
from botlease.work import tree


@value
class Owner:
    pid: int
    start: str


OWNER = re.compile(r"([1-9][0-9]{0,8})@([0-9]{1,19})")  # a pid has at most 22 bits


def make(pids: Iterable[int]) -> str:
    """The proof string for these processes of ours. Where the kernel has no /proc it proves nothing, but it is not
    empty: an empty one beside no holder is what a release writes, and nobody else."""
    host = procfs.host()
    if not host:
        return "-"
    owners = [f"{pid}@{procfs.start_time(pid)}" for pid in pids]
    return " ".join([host, str(os.geteuid()), *owners])


def owners(proof: str) -> list[Owner]:
    """Who would have to be dead; empty if we are not in a position to tell."""
    parts = proof.split()
    try:
        if len(parts) < 3 or parts[0] != procfs.host() or os.geteuid() not in (0, int(parts[1])):
            return []
        found = [OWNER.fullmatch(part) for part in parts[2:]]
    except ValueError:
        return []
    # a row can be written by anybody: what cannot be read proves nothing
    return [Owner(int(m[1]), m[2]) for m in found if m] if all(found) else []


def alive(owner: Owner) -> bool:
    """Whether it may be: dead is who is gone, a zombie, or somebody else by now, and not who cannot be looked at."""
    fields = procfs.stat(owner.pid)
    if fields is None:
        return procfs.exists(owner.pid)
    return fields[0] not in (b"Z", b"X") and fields[19].decode() == owner.start


def _marks(bot: str, instance_id: str) -> frozenset[bytes]:
    """What the environment of a work holds (``child``). Both: an id alone may be a setting of the user's, which his
    shell and our supervisor carry as well."""
    return frozenset({f"BOTLEASE_BOT={bot}".encode(), f"BOTLEASE_INSTANCE_ID={instance_id}".encode()})


def gone(proof: str, bot: str, instance_id: str, wait: float = 0.5) -> bool:
    """True if the owners are proved dead and nothing of their work is left, after killing what was."""
    those = owners(proof)
    if not those or any(alive(o) for o in those):
        return False
    give_up = clock.now() + wait
    since = min(int(o.start) for o in those)
    marks = _marks(bot, instance_id)
    others: set[int] = set()
    clean = 0
    while True:
        left, moving, unreadable = _marked(marks, since, others)
        for pid in left:
            _kill(pid, marks)
        if unreadable and not left:
            return False
        # Twice, as one may have been in the middle of an exec, and none that ended while it was looked at: it may have
        # forked before.
        clean = 0 if left or moving else clean + 1
        if clean == 2:
            return True
        if clock.now() > give_up:
            return False
        if left:
            with contextlib.suppress(OSError):
                select.select([], [], [], 0.002)


def sweep(proof: str, bot: str, instance_id: str, wait: float = 0.2) -> None:
    """Kill what is left on this host of a work whose lease ran out, before its successor begins.

    Its owners need not be dead: they may be stopped or frozen, and a process without a death signal (it daemonised, or
    dropped its user) then works on when it is continued. Waits for their deaths for at most ``wait`` seconds: one that
    is frozen dies when it is thawed, before it returns to its program. What the instance has warmed up meanwhile dies
    as well, and is warmed up anew.
    """
    those = owners(proof)
    marks = _marks(bot, instance_id)
    spared = {o.pid for o in those if alive(o)}  # a standby now, which may have been started from inside a bot
    killed: set[int] = set()
    give_up = clock.now() + wait
    others: set[int] = set()
    clean = 0
    while those and clean < 2 and clock.now() < give_up:  # as above
        left, moving, _ = _marked(marks, 0, others)
        new = {*left} - spared - killed
        clean = 0 if new or moving else clean + 1
        for pid in new:
            _kill(pid, marks)
        killed |= new
    while any(procfs.start_time(pid) for pid in killed) and clock.now() < give_up:
        with contextlib.suppress(OSError):
            select.select([], [], [], 0.002)


def _marked(marks: frozenset[bytes], since: int, others: set[int]) -> tuple[list[int], bool, bool]:
    """Who carries the marks, whether somebody ended while we looked, and whether a process of our user from after
    ``since`` would not let us look; not we ourselves, should we have been started from inside that bot. ``others``: who
    does not carry them, so that a second look reads only what is new. It grows."""
    try:
        names = os.listdir("/proc")  # noqa: PTH208
    except OSError:  # out of descriptors
        return [], False, True
    found, doubtful, moving = [], [], False
    for pid in (int(n) for n in names if n.isdigit()):
        if pid in others:
            continue
        try:
            environment = _environment(pid)
        except ProcessLookupError:
            if procfs.start_time(pid) is None:  # it has just ended, or is a zombie since who knows when
                moving = True
            others.add(pid)  # else a thread of the kernel
            continue
        if environment is None:
            start = procfs.start_time(pid)
            if _ours(pid) if start is None else int(start) >= since:
                doubtful.append(pid)
        elif marks.issubset(environment.split(b"\0")):
            found.append(pid)
        elif environment:
            others.add(pid)
        else:  # it has none, is in the middle of an exec, or has just ended
            moving = moving or procfs.start_time(pid) is None
    if found or doubtful:  # else it is of no interest who is below us, and takes another look at all processes
        try:
            below = {os.getpid(), *tree.descendants(os.getpid())}
        except OSError:
            return [], moving, True
        found, doubtful = ([pid for pid in pids if pid not in below] for pids in (found, doubtful))
    return found, moving, bool(doubtful)


def _ours(pid: int) -> bool:
    """Whether it may be of our user: a signal would reach it. (Of others nothing at all is to be read with hidepid.)"""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _has(pid: int, marks: frozenset[bytes]) -> bool | None:
    """None: it cannot be told."""
    try:
        environment = _environment(pid)
    except ProcessLookupError:
        return False
    return None if environment is None else marks.issubset(environment.split(b"\0"))


def _environment(pid: int) -> bytes | None:
    """As it was at the last exec; empty in the middle of one; of another user's some words of ours. None: a process of
    our user that we may not look into (it made itself undumpable), or one that cannot be looked at just now. Raises
    ProcessLookupError if it has none any more (it is gone, or a zombie), or is a thread of the kernel."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:  # noqa: PTH123
            return f.read()
    except PermissionError:
        try:
            # bytes: a name may be cut in the middle of a character
            uids = Path(f"/proc/{pid}/status").read_bytes().split(b"Uid:")[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessLookupError from None
        except (OSError, IndexError):
            return None
        return None if str(os.geteuid()).encode() in uids else b"another user's"
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError from None
    except OSError:  # out of descriptors
        return None


def _kill(pid: int, marks: frozenset[bytes]) -> None:
    """Through a pidfd, checked again after opening it: a reused pid must not be hit."""
    fd = -1
    try:
        fd = os.pidfd_open(pid)
    except AttributeError:  # a Python that was built without: what is checked last has to do
        pass
    except OSError:
        return
    try:
        if _has(pid, marks):
            signal.pidfd_send_signal(fd, signal.SIGKILL) if fd >= 0 else os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
    finally:
        if fd >= 0:
            os.close(fd)
