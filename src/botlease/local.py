"""What already runs on this machine: the seed's local check.

Instances of ours are known by the note they leave (boot id, pid, start time) and by the mark that a supervisor puts
into the bot's environment. Others are recognised by their parsed command line (an interpreter with a script, or ``-m``
with a module), never by a piece of text somewhere in it: an editor with the bot's source open is not the bot. Or by the
very token of ours in their environment, if they run a program: editors and tests inherit a token from their shell, too.
Only processes of the same user count, and never this process or one of its ancestors.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from botlease import clock, presence, procfs
from botlease.settings import TOKEN_VARIABLES, ConfigurationError, bot_name
from botlease.text import safe

SCRIPTS: Final = ("railway_startup.py", "instance_manager.py", "trading_bot.py")
MODULES: Final = ("trading_bot",)
OURS: Final = ("botlease-reaper", "botlease-front")  # what stands between a supervisor and its bot
WAITING: Final = "botlease-spare"
"""An interpreter that was started ahead (``work.launch``): nothing of the bot runs in it yet."""
_WITH_VALUE: Final = frozenset("WXQ")  # options of Python that take a value
_NODE_WITH_VALUE: Final = frozenset(
    ("-r", "--require", "--import", "--loader", "--experimental-loader", "-C", "--conditions", "--env-file", "--title")
)
_SUFFIXES: Final = frozenset((".py", ".pyw", ".pyc", ".js", ".mjs", ".cjs", ".ts", ".mts"))
# What developers run with -m: it may have the token of the shell it was started from.
_NOT_A_BOT: Final = frozenset(
    (  # noqa: SIM905
        "botlease pytest py pip pipx uv build twine IPython ipykernel ipykernel_launcher jupyter jupyterlab "
        "jupyter_client notebook mypy ruff black isort flake8 pylint pyright pyflakes pycodestyle bandit coverage tox "
        "nox pre_commit pylsp jedi jedi_language_server debugpy ptpython bpython watchdog watchfiles nodemon sphinx "
        "mkdocs setuptools hatchling flit poetry pdm alembic django flask invoke locust memray scalene py_spy viztracer"
    ).split()
)
_NOT_BOTS_FOLDERS: Final = frozenset(("site-packages", "dist-packages", "node_modules", "tests", "test"))
_NOT_BOTS_SCRIPTS: Final = frozenset(
    ("setup.py", "conftest.py", "noxfile.py", "manage.py", "tasks.py", "check_bot_running.py")
)


RELEASE: Final = 2.0
"""Seconds that a supervisor has to kill what would not stop, and to write its release."""


@dataclass(frozen=True, slots=True)
class Found:
    pid: int
    start: str
    started_at: float
    what: str
    """"supervisor", "bot", "script" (its command line says so), "same token" or "program" (an instance inside one)."""
    command: str
    stop_grace: float = 10.0
    """Seconds that it may take to stop; what said nothing of it gets the default of ``botlease run``."""


def find(
    bot: str | None,
    scripts: Sequence[str] = SCRIPTS,
    modules: Sequence[str] = MODULES,
    env: Mapping[str, str] | None = None,
) -> list[Found]:
    """Running instances of ``bot`` (None: of any bot), supervisors first. ``env``: ours, for the token in it."""
    env = os.environ if env is None else env
    if not os.path.isdir("/proc/self"):  # noqa: PTH112
        raise ConfigurationError("the local check reads /proc, which is not there: it works on Linux alone")
    us = _ancestors(os.getpid())
    tokens = {v for name in TOKEN_VARIABLES if len(v := env.get(name, "")) > 20}
    found: dict[int, Found] = {}

    def add(pid: int, what: str, **more: float) -> None:
        known = found.get(pid)
        entry = _describe(pid, what, **more) if pid and pid not in us else None
        if entry is not None and (known is None or what == "supervisor" != known.what):
            found[pid] = entry

    for note in presence.notes(env):
        if bot in (None, note.bot):
            what = "supervisor" if _has_reaper(note.pid) else "program"
            add(note.pid, what, stop_grace=note.stop_grace)
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit() or int(name) in us:
            continue
        pid = int(name)
        kind = _recognise(pid, bot, scripts, modules, tokens)
        if kind is None:
            continue
        if kind == "bot":
            # a seed script is recognised by its name, and is a supervisor all the same
            add(_supervisor(pid), "supervisor")
        add(pid, kind)
    return sorted(found.values(), key=lambda f: (f.what != "supervisor", f.pid))


def _supervisor(bot: int) -> int:
    """The process above everything of ours that stands between it and the bot."""
    pid = procfs.parent(bot)
    while _comm(pid) in OURS:
        pid = procfs.parent(pid)
    return pid


def _has_reaper(pid: int) -> bool:
    """Whether it supervises a command: then its reaper is a child of it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return True  # a kernel without that file: "supervisor" is the word for what must be ended first
    return any(_comm(int(child)) == "botlease-reaper" for child in children)


def _space() -> str:
    return os.readlink("/proc/self/ns/pid")  # noqa: PTH115


def _recognise(
    pid: int, bot: str | None, scripts: Sequence[str], modules: Sequence[str], tokens: set[str]
) -> str | None:
    try:
        if procfs.owner(pid) != os.geteuid():
            return None
        if os.readlink(f"/proc/{pid}/ns/pid") != _space():  # noqa: PTH115 - a magic link, not a path
            return None  # a container's, seen from the host: whoever ends that one is somebody else
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    if not argv:
        return None  # a zombie or a kernel thread
    marks = [e for e in environ if e.startswith(b"BOTLEASE_BOT=")]
    if marks and any(e.startswith(b"BOTLEASE_INSTANCE_ID=") for e in environ):
        # what the bot itself started carries the mark too: only the one below the reaper is the bot
        if _comm(procfs.parent(pid)) in OURS and _comm(pid) != WAITING:
            return "bot" if bot is None or marks[0] == b"BOTLEASE_BOT=" + bot.encode() else None
        return None
    if runs(argv, scripts, modules):
        return "script" if bot is None or bot == _bot_of(environ) else None
    if tokens and looks_like_a_bot(argv):
        values = {e.partition(b"=")[2].decode(errors="replace") for e in environ if e.partition(b"=")[0] in _TOKENS}
        return "same token" if values & tokens else None
    return None


_TOKENS: Final = frozenset(name.encode() for name in TOKEN_VARIABLES)


def _bot_of(environ: list[bytes]) -> str:
    pairs = (e.decode(errors="replace").partition("=") for e in environ)
    try:
        return bot_name(None, {name: value for name, _, value in pairs})
    except ConfigurationError:
        return ""


def program(argv: Sequence[str]) -> tuple[str, str] | None:
    """What an interpreter runs: ("script", path) or ("module", name). None: no interpreter, or neither of them."""
    name = PurePath(argv[0]).name
    if name.startswith(("python", "pypy")):
        return _python(list(argv[1:]))
    if name in ("node", "nodejs", "bun", "deno", "ts-node", "tsx"):
        return _javascript(list(argv[1:]))
    return None


def _python(rest: list[str]) -> tuple[str, str] | None:
    while rest:
        word = rest.pop(0)
        if word == "-m":
            return ("module", rest[0]) if rest else None
        if word.startswith("-m") and len(word) > 2:
            return ("module", word[2:])
        if word in ("-c", "-"):
            return None
        if word.startswith("--"):
            continue
        if word.startswith("-"):
            if "c" in word[1:] and not set(word[1:]) & _WITH_VALUE:
                return None  # -uc, -Ic: a piece of code
            if word[-1] in _WITH_VALUE:
                rest[:1] = []
            continue
        return ("script", word)
    return None


def _javascript(rest: list[str]) -> tuple[str, str] | None:
    while rest:
        word = rest.pop(0)
        if word in ("-e", "--eval", "-p", "--print", "-pe", "-i", "-"):
            return None
        if word in _NODE_WITH_VALUE:
            rest[:1] = []
        elif not word.startswith("-") and word != "run":
            return ("script", word)
    return None


def runs(argv: Sequence[str], scripts: Sequence[str] = SCRIPTS, modules: Sequence[str] = MODULES) -> bool:
    """Whether this command line is a Python interpreter running one of the scripts or modules."""
    if not PurePath(argv[0]).name.startswith(("python", "pypy")):
        return False
    kind, name = program(argv) or ("", "")
    if kind == "module":
        return name.removesuffix(".__main__") in modules  # trading_bot.export is a tool of it
    path = PurePath(name)
    return kind == "script" and (
        path.name in scripts or (path.parent.name in modules and path.name in ("__main__.py", "main.py", "bot.py"))
    )


def looks_like_a_bot(argv: Sequence[str]) -> bool:
    """Whether this is a program of somebody's own, and no tool: with our token it is the bot, however it is called."""
    kind, name = program(argv) or ("", "")
    if kind == "module":
        top = name.split(".")[0]
        return top not in sys.stdlib_module_names and top not in _NOT_A_BOT
    if kind != "script":
        return False
    path = PurePath(name)
    if path.suffix not in _SUFFIXES or path.name in _NOT_BOTS_SCRIPTS or path.name.startswith("test_"):
        return False
    if path.name.endswith((".test.js", ".test.ts", ".spec.js", ".spec.ts", "_test.py")):
        return False
    # a hidden folder is an editor's or a tool's; lib/pythonX.Y is the interpreter's own
    return not any(
        part in _NOT_BOTS_FOLDERS or (part.startswith(".") and part not in (".", "..")) or part.startswith("python3")
        for part in path.parts[:-1]
    )


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _ancestors(pid: int) -> set[int]:
    out = set()
    while pid > 0 and pid not in out:
        out.add(pid)
        pid = procfs.parent(pid)
    return out


def _describe(pid: int, what: str, **more: float) -> Found | None:
    fields = procfs.stat(pid)
    if fields is None or fields[0] in (b"Z", b"X"):
        return None
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    started = clock.wall() - (clock.now() - ticks)  # for people's eyes
    words = " ".join(argv).rstrip()  # a process that has changed what is shown of it leaves room behind it
    shown = safe(words)[:80]
    return Found(pid, fields[19].decode(), started, what, shown, **more)


def force_kill(found: Sequence[Found], grace: float | None = None, say: Callable[[str], None] = print) -> bool:
    """SIGTERM, wait, SIGKILL; through pidfds, so that a reused pid is never hit. True if all are gone.

    ``grace``: seconds to wait; by default the longest that one of them may take to stop, and :data:`RELEASE`.
    """
    if grace is None:
        grace = RELEASE + max((f.stop_grace for f in found), default=0.0)
    if found and not hasattr(os, "pidfd_open"):
        say("this Python was built without pidfd_open, and could hit a stranger: end them with kill")
        return False
    waiting: dict[int, Found] = {}
    for f in found:
        try:
            fd = os.pidfd_open(f.pid)
        except OSError:
            continue
        fields = procfs.stat(f.pid)
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
