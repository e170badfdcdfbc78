"""A Python bot's interpreter, started ahead: while another one works, a standby has it load, and wait.

Most of a small bot's start is the interpreter's own. So its process is brought to the point at which the first line of
the bot would run, with the bot's own interpreter, options and environment, and waits there in :mod:`.launch`; at the
beginning of the term it runs the script or the module as the interpreter would have. A planned handover is shorter by
that (docs/benchmarks.md), for 3 MB in a standby.

What the interpreter loads by itself it loads in standby: ``.pth`` files, ``sitecustomize``. Of the bot nothing is run.

Only what is beyond doubt our own interpreter, running a script or a module; everything else is started as it ever was.
A shim or a wrapper that happens to be called ``python`` would run too early, who knows what.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence

LAUNCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")  # noqa: PTH100, PTH118, PTH120
_WITHOUT_VALUE = frozenset("bBdEIOPqsSuv")
"""Options of the interpreter. Not -c, -i, -x, -h, -V, nor what is yet to come: with them it is not started ahead."""


def command(argv: Sequence[str], env: Mapping[str, str]) -> tuple[list[str], list[str]] | None:
    """How to start the interpreter of ``argv`` ahead: what comes before the number of the descriptor on which it hears
    when to go on, and what comes after. None: it cannot be."""
    path = find(argv[0], env)
    if not os.path.isfile(LAUNCH):  # noqa: PTH113 - we run out of an archive
        return None
    if _is_ours(path):
        python, rest = argv[0], list(argv[1:])
    else:  # a script with an interpreter of its own, as pip installs them: what the kernel would make of it
        python, *option = _first_line(path) or [""]
        if not _is_ours(python):
            return None
        rest = [*option, path, *argv[1:]]
    options: list[str] = []
    while rest:
        word = rest[0]
        if word in ("-W", "-X"):
            options += rest[:2]
            del rest[:2]
        elif word[:2] in ("-W", "-X") or (len(word) > 1 and word[0] == "-" and _WITHOUT_VALUE.issuperset(word[1:])):
            options.append(rest.pop(0))
        elif (word == "-m" and len(rest) > 1) or _is_source(word):
            return [python, *options, LAUNCH, os.path.basename(path)], rest  # noqa: PTH119
        else:
            break
    return None


def find(program: str, env: Mapping[str, str]) -> str:
    """What exec would run, or "" if there is no such program. (``shutil.which`` is 26 ms of imports.)"""
    folders = os.get_exec_path(env) if "/" not in program else ("",)
    paths = (os.path.join(folder, program) for folder in folders)  # noqa: PTH118
    return next((p for p in paths if os.access(p, os.X_OK) and not os.path.isdir(p)), "")  # noqa: PTH112


def _is_ours(path: str) -> bool:
    """Whether it is the very interpreter that we run on, whatever environment it is called from."""
    return bool(path and sys.executable) and os.path.realpath(path) == os.path.realpath(sys.executable)


def _first_line(path: str) -> list[str] | None:
    """Interpreter and at most one option, if ``path`` is a script that names them."""
    head = _head(path)
    if not head.startswith(b"#!") or b"\n" not in head:
        return None
    line = head[2:].split(b"\n")[0]
    return os.fsdecode(line).strip(" \t").split(None, 1) if b"\r" not in line else None  # to the kernel a part of it


def _is_source(path: str) -> bool:
    """Not an option, nor a folder or an archive, nor compiled: those begin in ways of their own."""
    head = b"\0" if path.startswith("-") else _head(path)
    return bool(head) and b"\0" not in head


def _head(path: str) -> bytes:
    """Of a file only: what a pipe gives us the bot would not get, and a terminal would have us wait."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return b""
        with open(path, "rb") as f:  # noqa: PTH123 - the supervisor loads no pathlib for it
            return f.read(4096)
    except (OSError, ValueError):
        return b""
