"""What Linux says about a process: enough to know one again, and never to take another for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def _read(path: str) -> bytes:
    """At once, as /proc gives it, and without the objects that :class:`Path` makes: a standby asks at each look."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def host() -> str:
    """This boot of this machine, and this pid namespace of it: within it a pid with its start time is unique. And this
    time namespace, as start times are told by its clock. "" where there is no /proc."""
    try:
        boot = _read("/proc/sys/kernel/random/boot_id").decode().strip()
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a magic link, not a path
    except OSError:
        return ""
    with contextlib.suppress(OSError):  # Linux 5.6
        space += os.readlink("/proc/self/ns/time")  # noqa: PTH115
    return f"{boot}/{space}"


def is_mounted(path: Path) -> bool:
    """Whether something was mounted on this very path: one file of a host, given to a container alone."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(path)
    for odd in (b"\\", b" ", b"\t", b"\n"):  # as the kernel writes them there; the backslash first
        escaped = escaped.replace(odd, b"\\%03o" % odd[0])
    return any(line.split(b" ")[4] == escaped for line in lines)


def stat(pid: int) -> list[bytes] | None:
    """The fields of ``/proc/PID/stat`` after the command's name, which may hold anything."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return None


def start_time(pid: int) -> str | None:
    """When it started, in ticks since boot; None if there is no such process, or only its zombie."""
    fields = stat(pid)
    return None if fields is None or fields[0] in (b"Z", b"X") else fields[19].decode()


def exists(pid: int) -> bool:
    """Whether there may be such a process, or its zombie: also one that /proc hides from us (``hidepid``, a profile of
    SELinux, more capabilities than ours), and without a descriptor to look with."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def parent(pid: int) -> int:
    """0 if there is none, or it cannot be seen."""
    fields = stat(pid)
    return int(fields[1]) if fields else 0


def owner(pid: int) -> int | None:
    """The effective user of a process."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
