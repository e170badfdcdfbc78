"""A reaper without a supervisor: the test speaks for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from harness import until

from botlease import clock
from botlease.work import ahead, reaper

OPEN_IN_A_SPARE = ("stdin", "stdout", "stderr", "its orders", "where it says what is wrong")


class Reaper:
    def __init__(self) -> None:
        self.pid, self.sock = reaper.fork()
        self.inbox = reaper.Inbox(self.sock)
        self.seen: list[dict[str, Any]] = []

    def tell(self, fds: dict[str, int] | None = None, **message: Any) -> None:
        fds = fds or {}
        reaper.send(self.sock, {**message, "fds": list(fds)}, tuple(fds.values()))

    def prepare(self, argv: Sequence[str], *, early: bool = False, **env: str) -> None:
        """``early``: with its interpreter started ahead."""
        whole = dict(os.environ) | env
        found = ahead.command(argv, whole)
        assert found is not None or not early
        self.tell(do="prepare", argv=list(argv), env=whole, front={}, ahead=found if early else None)

    def prepare_ahead(self, argv: Sequence[str], **env: str) -> int:
        """The pid of the interpreter, when it waits."""
        self.prepare(argv, early=True, **env)
        until(lambda: [comm(pid) for pid in self.children()] == ["botlease-spare"])
        return self.children()[0]

    def start(self, fds: dict[str, int], *, seconds: float = 30, **env: str) -> None:
        self.tell(fds, do="start", env=env, until=clock.now() + seconds, gate=False)

    def says(self, word: str) -> dict[str, Any]:
        """The next message of this kind."""

        def said() -> dict[str, Any] | None:
            return next((m for m in self.seen if m["say"] == word), None)

        # Two may have come at once: what has been heard is not waited for.
        found: dict[str, Any] = said() or until(lambda: self.seen.extend(self.inbox.receive() or []) or said())
        self.seen.remove(found)
        return found

    def close(self) -> None:
        self.sock.close()
        os.waitpid(self.pid, 0)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def spare(self) -> int:
        """It has set itself up, and closed what is the reaper's."""
        until(lambda: [len(opened(pid)) for pid in self.children()] == [len(OPEN_IN_A_SPARE)])
        return self.children()[0]


def comm(pid: int) -> str:
    """The name of the process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def gone(pid: int) -> bool:
    """Dead, buried or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def opened(pid: int) -> list[str]:
    return [fd.name for fd in Path(f"/proc/{pid}/fd").iterdir()]


def a_reaper() -> closing[Reaper]:
    return closing(Reaper())
