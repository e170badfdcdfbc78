"""The processes below a process: found, killed to the last, reaped.

A sub-reaper (``PR_SET_CHILD_SUBREAPER``) inherits every orphan below it, also one that double-forked
into a session of its own. So "no children left" means that nothing of the work runs any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Mapping
else:  # without its enumerations, as in the reaper
    import _signal as signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


_PAGE = 4096
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # once, and not in the moment in which a bot is started


def prctl(option: int, value: int | bytes) -> bool:
    """False where the kernel has no such thing (macOS, other systems)."""
    if _prctl is None:
        return False
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    return bool(_prctl(option, argument, 0, 0, 0) == 0)


def keep_only(*fds: int) -> None:
    """Close all descriptors but these and the three standard ones: also those that whoever started us left open."""
    keep = {0, 1, 2, *fds}
    try:
        names = os.listdir("/proc/self/fd")  # noqa: PTH208
        there = [int(name) for name in names]
    except OSError:
        there = list(range(4096))  # more than anything of ours has open
    for fd in there:
        if fd not in keep:
            with contextlib.suppress(OSError):  # that of the folder itself is closed by now
                os.close(fd)


def _look(pid: int) -> tuple[int, bytes] | None:
    """Parent and start time; None if it is gone. Raises OSError if it cannot be looked at."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:  # noqa: PTH123 - the reaper does not pay for pathlib in each scan
            # the command name may hold spaces and brackets: the fields go on after the last one
            fields = f.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), fields[19]


def started(pid: int) -> bytes:
    """Its start time, in clock ticks since the boot; empty if it is gone, or may not be looked at."""
    try:
        seen = _look(pid)
    except OSError:
        seen = None
    return seen[1] if seen else b""


def _see_ourselves() -> None:
    """In a pid namespace of our own under the /proc of another one (``unshare --pid --fork`` without ``--mount-proc``)
    the numbers there are those of strangers here. Raises OSError."""
    if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115
        raise OSError("/proc is that of another pid namespace")


def look() -> dict[int, tuple[int, bytes]]:
    """pid -> parent and start time, for every process that can be seen. Raises OSError where there is no /proc, or not
    ours."""
    _see_ourselves()
    found: dict[int, tuple[int, bytes]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                seen = _look(int(name))
            except OSError:
                continue
            if seen is not None:
                found[int(name)] = seen
    return found


def _below(root: int, spared: Mapping[int, bytes] = {}) -> dict[int, bytes]:
    """Everything below ``root``, nearest first, with its start time. Without the children that are ``spared`` (pid and
    start time), and what is below those."""
    seen = look()
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in seen.items():
        children.setdefault(parent, []).append(pid)
    out: dict[int, bytes] = {}
    level = [root]
    while level:
        level = [
            child
            for pid in level
            for child in children.get(pid, [])
            if child not in out and spared.get(child) != seen[child][1]
        ]
        out |= {pid: seen[pid][1] for pid in level}
    return out


class Children:
    """Those of a process's main thread, without a look at all processes: a call of the kernel or two. None where
    it does not tell (``CONFIG_PROC_CHILDREN``)."""

    def __init__(self, pid: int) -> None:
        try:
            _see_ourselves()
            self._fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def __call__(self) -> list[int]:
        data = b""
        try:
            while more := os.pread(self._fd, 1 << 16, len(data)):
                data += more
                if len(more) < _PAGE // 2:  # the kernel gives a page at a time
                    break
        except OSError:
            return []
        return [int(word) for word in data.split()]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def descendants(root: int) -> list[int]:
    """Everything below ``root``, nearest first. Raises OSError where there is no /proc, or not ours."""
    return list(_below(root))


def kill_below(root: int, group: int = 0, spared: Mapping[int, bytes] = {}, number: int = int(signal.SIGKILL)) -> int:
    """Signal everything below ``root`` once, but for the children that are ``spared`` and what is below them; returns
    how many there were. Without /proc (macOS) the process ``group`` has to do."""
    try:
        below = _below(root, spared)
    except OSError:
        below = {}
        if group:
            try:
                os.killpg(group, number)
            except (ProcessLookupError, PermissionError):
                pass
    for pid, start in below.items():
        _kill(pid, start, number)
    return len(below)


def _kill(pid: int, start: bytes, number: int) -> None:
    """Through a pidfd, if it is still the one that was seen: a process below us may have died since, and been buried by
    its own parent, and a stranger may have its number. In doubt it is killed: what is spared here works on beside the
    next one. (Who its parent is by now says nothing: that one may have been killed a moment ago.)"""
    fd = -1
    try:
        fd = os.pidfd_open(pid)
        seen = _look(pid)
        if seen is not None and seen[1] == start:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    except (OSError, AttributeError):  # Linux before 5.3, a filter of system calls, out of descriptors
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass
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


_core: tuple[int, int] | None = None


def leave_no_core() -> None:
    """A crash dump of this process, or of one forked from it, would hold the database's password and the bot's token.

    The limit is 1 and not 0: then a program that takes the dumps (``|`` in ``core_pattern``) gets none either.
    """
    global _core
    if _core is None:
        _core = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (1 if _core[1] else 0, _core[1]))


def may_leave_a_core() -> None:
    """What comes now, by exec, is the user's program: the limit is as it was given."""
    if _core is not None:
        resource.setrlimit(resource.RLIMIT_CORE, _core)
