"""The processes below a process: found, killed to the last, reaped.

A sub-reaper (``PR_SET_CHILD_SUBREAPER``) inherits every orphan below it, also one that double-forked
into a session of its own. So "no children left" means that nothing of the work runs any more.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


def prctl(option: int, value: int | bytes) -> bool:
    """False where the kernel has no such thing (macOS, other systems)."""
    try:
        call = ctypes.CDLL(None).prctl
    except AttributeError:
        return False
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    return bool(call(option, argument, 0, 0, 0) == 0)


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:  # noqa: PTH123 - the reaper does not pay for pathlib in each scan
            # the command name may hold spaces and brackets: the fields go on after the last one
            return int(f.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def parents() -> dict[int, int]:
    """pid -> parent, for every process that can be seen."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    return {pid: parent for pid in pids if (parent := _parent(pid)) is not None}


def descendants(root: int) -> list[int]:
    """Everything below ``root``, nearest first."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    out: list[int] = []
    level = [root]
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        out += level
    return out


def kill_below(root: int, group: int = 0) -> int:
    """SIGKILL everything below ``root`` once; returns how many there were. Without /proc (macOS) the process ``group``
    has to do."""
    try:
        below = descendants(root)
    except OSError:
        below = []
        if group:
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
    family = {root, *below}
    for pid in below:
        _kill(pid, family)
    return len(below)


def _kill(pid: int, family: set[int]) -> None:
    """Through a pidfd, if it still belongs to the family: a process below us may have died and been buried by its own
    parent since we looked, and a stranger may have its number."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (OSError, AttributeError):  # Linux before 5.3, out of descriptors: rather by its number than not at all
        fd = -1
    try:
        if _parent(pid) not in family:
            return
        if fd >= 0:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        if fd >= 0:
            os.close(fd)


def reap() -> tuple[list[tuple[int, int]], bool]:
    """Collect the dead. Returns ``(pid, exit code)`` pairs and whether any child is left."""
    dead: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return dead, False
        if pid == 0:
            return dead, True
        dead.append((pid, os.waitstatus_to_exitcode(status)))
