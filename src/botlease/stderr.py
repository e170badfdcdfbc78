"""One line on standard error, and never a wait for whoever should read it.

A supervisor that waits for its log renews no lease. So a pipe or a terminal is opened anew, as a description of our own
that does not block: on the one that we were given that flag would be the bot's as well. A socket (systemd's journal) is
asked not to wait for each line; a file does not block, and opened anew it would be written from its beginning.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Callable

Write = Callable[[bytes], int]


def open_standard_descriptors() -> None:
    """/dev/null for each of 0, 1, 2 that is closed: what is opened next would get its number, and our lines."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


class Lines:
    """Lines that cannot be written at once are left out, and counted in the next one that can."""

    def __init__(self, fd: int = 2) -> None:
        self._write = _writer(fd)
        self._left_out = 0

    def write(self, text: str) -> None:
        if self._left_out:
            text = f"({self._left_out} lines before this one could not be written) {text}"
        text = f"botlease: {text}"
        # What a pipe takes in one piece or not at all (pipe(7)); a character that is cut there is dropped.
        line = text.encode(errors="replace")[: select.PIPE_BUF - 1].decode(errors="ignore").encode() + b"\n"
        try:
            self._write(line)
            self._left_out = 0
        except BlockingIOError:
            self._left_out += 1
        except OSError:
            pass  # closed, or its reader is gone


def _writer(fd: int) -> Write:
    def plain(line: bytes) -> int:
        return os.write(fd, line)

    def if_ready(line: bytes) -> int:
        if not select.select([], [fd], [], 0)[1]:
            raise BlockingIOError
        return os.write(fd, line)

    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return plain
    if stat.S_ISSOCK(mode):
        import socket  # not before the reaper is forked, which has no use for it

        ours = socket.socket(fileno=os.dup(fd))
        return lambda line: ours.send(line, socket.MSG_DONTWAIT)
    if not (stat.S_ISFIFO(mode) or os.isatty(fd)):
        return plain
    with contextlib.suppress(OSError):  # another user's, or there is no /proc
        anew = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        return lambda line: os.write(anew, line)
    return if_ready
