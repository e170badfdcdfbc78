"""What already runs on this machine: the seed's local check.

Instances of ours are known by the mark that the supervisor puts into the bot's environment. Others are
recognised by their parsed command line (an interpreter with a script, or ``-m`` with a module), never by a
piece of text somewhere in it: an editor with the bot's source open is not the bot. Only processes of the same
user count, and never this process or one of its ancestors.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from botlease.settings import ConfigurationError, bot_name

SCRIPTS = ("railway_startup.py", "instance_manager.py", "trading_bot.py")
MODULES = ("trading_bot",)
_WITH_VALUE = frozenset("WXQ")  # interpreter options that take a value


@dataclass(frozen=True, slots=True)
class Found:
    pid: int
    start: str
    started_at: float
    what: str  # "supervisor", "bot" or "script"
    command: str


def find(bot: str | None, scripts: Sequence[str] = SCRIPTS, modules: Sequence[str] = MODULES) -> list[Found]:
    """Running instances of ``bot`` (None: of any bot), supervisors first."""
    us = _ancestors(os.getpid())
    found: dict[int, Found] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit() or int(name) in us:
            continue
        pid = int(name)
        what = _recognise(pid, bot, scripts, modules)
        if what is None:
            continue
        for each, kind in ((_supervisor(pid) if what == "bot" else 0, "supervisor"), (pid, what)):
            entry = _describe(each, kind) if each and each not in us else None
            if entry is not None and (kind == "supervisor" or each not in found):
                found[each] = entry  # a seed script is recognised by its name, and is a supervisor all the same
    return sorted(found.values(), key=lambda f: (f.what != "supervisor", f.pid))


def _recognise(pid: int, bot: str | None, scripts: Sequence[str], modules: Sequence[str]) -> str | None:
    try:
        if Path(f"/proc/{pid}").stat().st_uid != os.geteuid():
            return None
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    if not argv:
        return None  # a zombie or a kernel thread
    marks = [e for e in environ if e.startswith(b"BOTLEASE_BOT=")]
    if marks and any(e.startswith(b"BOTLEASE_INSTANCE_ID=") for e in environ):
        parent = _stat(pid)
        # what the bot itself started carries the mark too: only the one below the reaper is the bot
        if parent is not None and _comm(int(parent[1])) == "botlease-reaper":
            return "bot" if bot is None or marks[0] == b"BOTLEASE_BOT=" + bot.encode() else None
        return None
    if not runs(argv, scripts, modules):
        return None
    return "script" if bot is None or bot == _bot_of(environ) else None


def _bot_of(environ: list[bytes]) -> str:
    pairs = (e.decode(errors="replace").partition("=") for e in environ)
    try:
        return bot_name(None, {name: value for name, _, value in pairs})
    except ConfigurationError:
        return ""


def runs(argv: Sequence[str], scripts: Sequence[str] = SCRIPTS, modules: Sequence[str] = MODULES) -> bool:
    """Whether this command line is a Python interpreter running one of the scripts or modules."""
    program = PurePath(argv[0]).name
    if not program.startswith("python") and not program.startswith("pypy"):
        return False
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if word == "-m":
            return bool(rest) and rest[0].split(".")[0] in modules
        if word.startswith("-m") and len(word) > 2:
            return word[2:].split(".")[0] in modules
        if word == "-c" or word == "-":
            return False
        if word.startswith("--"):
            continue
        if word.startswith("-"):
            if word[-1] in _WITH_VALUE:
                rest[:1] = []
            continue
        path = PurePath(word)
        return path.name in scripts or (
            path.parent.name in modules and path.name in ("__main__.py", "main.py", "bot.py")
        )
    return False


def _stat(pid: int) -> list[bytes] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _ancestors(pid: int) -> set[int]:
    out = set()
    while pid > 0 and pid not in out:
        out.add(pid)
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return out


def _supervisor(bot: int) -> int:
    fields = _stat(bot)
    fields = _stat(int(fields[1])) if fields else None
    return int(fields[1]) if fields else 0


def _describe(pid: int, what: str) -> Found | None:
    fields = _stat(pid)
    if fields is None or fields[0] in (b"Z", b"X"):
        return None
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    started = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)  # noqa: TID251 - for people's eyes
    words = " ".join(argv)
    shown = "".join(c if c.isprintable() else "?" for c in words)[:80]
    return Found(pid, fields[19].decode(), started, what, shown)


def force_kill(found: Sequence[Found], grace: float = 12.0, say: Callable[[str], None] = print) -> bool:
    """SIGTERM, wait, SIGKILL; through pidfds, so that a reused pid is never hit. True if all are gone."""
    waiting: dict[int, Found] = {}
    for f in found:
        try:
            fd = os.pidfd_open(f.pid)
        except OSError:
            continue
        fields = _stat(f.pid)
        if fields is None or fields[19].decode() != f.start:
            os.close(fd)
            continue
        waiting[fd] = f
    supervised = any(f.what == "supervisor" for f in found)
    for fd, f in waiting.items():
        if f.what == "bot" and supervised:
            continue  # its supervisor drains it, and writes the release
        _send(fd, signal.SIGTERM)
        say(f"sent SIGTERM to {f.what} {f.pid}")
    for number, limit in ((None, grace), (signal.SIGKILL, 3.0)):
        for fd, f in waiting.items():
            if number is not None:
                _send(fd, number)
                say(f"sent SIGKILL to {f.what} {f.pid}")
        until = time.monotonic() + limit
        while waiting and (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select(list(waiting), [], [], left)
            for fd in ready:
                f = waiting.pop(fd)
                os.close(fd)
                say(f"{f.what} {f.pid} has ended")
        if not waiting:
            return True
    for fd in waiting:
        os.close(fd)
    return False


def _send(fd: int, number: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(fd, number)
