"""Be told when somebody committed to an SQLite file, without polling it.

With the rollback journal every commit ends by closing ``<file>-journal``, which was written to; inotify on the folder
reports that at once, and costs nothing while nothing happens. It is only a hint.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

IN_CLOSE_WRITE = 0x8
IN_CLOEXEC_NONBLOCK = 0o2000000 | 0o4000
EVENT = struct.Struct("iIII")


class JournalWatch:
    def __init__(self, fd: int, name: bytes, changed: Callable[[int], None]) -> None:
        self.fd, self.name, self.changed = fd, name, changed
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(fd, self._ready)

    @classmethod
    def start(cls, path: str, changed: Callable[[int], None]) -> JournalWatch | None:
        """None where the kernel has no inotify: then the poll alone has to do."""
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = libc.inotify_init1(IN_CLOEXEC_NONBLOCK)
        except (AttributeError, OSError):
            return None
        if fd < 0:
            return None
        file = Path(path)
        if libc.inotify_add_watch(fd, os.fsencode(file.parent), IN_CLOSE_WRITE) < 0:
            os.close(fd)
            return None
        return cls(fd, os.fsencode(file.name + "-journal"), changed)

    def _ready(self) -> None:
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return
        at = 0
        hits = 0
        while at + EVENT.size <= len(data):
            _, mask, _, length = EVENT.unpack_from(data, at)
            name = data[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0")
            # mask 0x4000 is IN_Q_OVERFLOW: events were lost, so look.
            hits += 1000 if mask & 0x4000 else name == self.name
            at += EVENT.size + length
        if hits:
            self.changed(hits)

    def close(self) -> None:
        self.loop.remove_reader(self.fd)
        os.close(self.fd)
