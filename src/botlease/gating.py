"""The gate of a warm start, as the bot sees it: everything before it may be done while another instance works."""

from __future__ import annotations

import asyncio
import os
import socket

__all__ = ["NotSupervised", "gate", "wait_at_gate"]


class NotSupervised(RuntimeError):
    """There is no supervisor whose gate this could be."""


def _open_already() -> int | None:
    term = os.environ.get("BOTLEASE_TERM", "")
    if term.isdecimal():
        return int(term)
    if "BOTLEASE_GATE_FD" not in os.environ:
        raise NotSupervised("no gate: start this program with `botlease run --warm -- ...`")
    return None


def _connection() -> socket.socket:
    # The descriptor stays the supervisor's other end: it is duplicated, so that closing ours does not matter.
    return socket.socket(fileno=os.dup(int(os.environ["BOTLEASE_GATE_FD"])))


def _passed(line: bytes) -> int:
    if not line.endswith(b"\n"):
        raise NotSupervised("the gate is gone")
    os.environ["BOTLEASE_TERM"] = line.decode().strip()
    return int(line)


async def gate() -> int:
    """Say "ready", wait for the term to begin, and return its number (the fencing token).

    Do before it what may be done while another instance works: imports, connections, caches. Do after it what only
    one may do: polling, orders. Without ``--warm`` the term has begun before the program did: it returns at once.

    Raises:
        NotSupervised: the program was not started by ``botlease run``.
    """
    term = _open_already()
    if term is not None:
        return term
    loop = asyncio.get_running_loop()
    with _connection() as connection:
        connection.setblocking(False)
        await loop.sock_sendall(connection, b"ready\n")
        line = b""
        while not line.endswith(b"\n") and (more := await loop.sock_recv(connection, 64)):
            line += more
        return _passed(line)


def wait_at_gate() -> int:
    """:func:`gate` for programs without an event loop. It blocks."""
    term = _open_already()
    if term is not None:
        return term
    with _connection() as connection:
        connection.setblocking(True)
        connection.sendall(b"ready\n")
        line = b""
        while not line.endswith(b"\n") and (more := connection.recv(64)):
            line += more
        return _passed(line)
