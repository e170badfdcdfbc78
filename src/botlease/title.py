"""Our own command line, as ``ps`` shows it to everybody on this machine: blotted where it holds a secret.

Linux shows the memory between ``arg_start`` and ``arg_end``; a process may write there. Elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os


def _arguments() -> tuple[int, bytes]:
    """Where the command line lies in our memory, and what it says; (0, b"") if that cannot be told."""
    try:
        with open("/proc/self/stat", "rb") as f:  # noqa: PTH123
            fields = f.read().rpartition(b")")[2].split()
        begin, end = int(fields[45]), int(fields[46])
        return (begin, ctypes.string_at(begin, end - begin)) if 0 < begin < end else (0, b"")
    except (OSError, ValueError, IndexError):
        return 0, b""


def blot(secret: str) -> None:
    """Replace every occurrence of ``secret`` by asterisks."""
    begin, text = _arguments()
    wanted = os.fsencode(secret)
    at = text.find(wanted) if wanted else -1
    while at >= 0:
        ctypes.memset(begin + at, ord("*"), len(wanted))
        at = text.find(wanted, at + 1)


def hide_password(url: str | None) -> None:
    """Blot the password out of our own command line, which everybody on this machine can read."""
    if not url:
        return
    from botlease.text import passwords

    for secret in passwords(url):
        blot(secret)


def retitle(name: str) -> None:
    """Show ``name`` and nothing else."""
    begin, text = _arguments()
    if text:
        shown = name.encode()[: len(text) - 1]
        ctypes.memmove(begin, shown + b"\0" * (len(text) - len(shown)), len(text))
