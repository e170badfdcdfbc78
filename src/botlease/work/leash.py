"""The leash: what the kernel kills when this process dies, by process groups, whatever has become of them (R2).

The death signal (``PR_SET_PDEATHSIG``) is each process's own: what a bot starts has none, whoever drops his user loses
his. Their supervisor finds and kills them, but only when it gets to run: stopped, frozen or starved until after the end
of trust, they work on beside whoever is next, somewhere else.

A leash is a pair of sockets that are connected with one another, both in this process. When one is closed the kernel
signals the owner of the other one, with SIGKILL as we ask it to; and when this process ends, however it does, the
kernel closes both. The owner is a process group, so that what is born into it later is held as well. Without the right
to signal it (root in a user namespace, and another user), and for the first process of a pid namespace, the leash does
nothing. (fcntl(2), ``F_SETOWN`` and ``F_SETSIG``; ``unix_release_sock``, ``sigio_perm`` and ``sig_task_ignored`` of the
kernel. Dead 0.1 to 3 ms after the end of this process, measured.)
"""

from __future__ import annotations

import ctypes
import os
import resource

from botlease.work import tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
else:  # as in the reaper
    import _signal as signal
    import _socket as socket

MOST = 64
"""Process groups."""
_F_SETFL, _F_SETOWN, _F_SETSIG = 4, 8, 10
_fcntl = getattr(ctypes.CDLL(None), "fcntl", None) if os.uname().sysname == "Linux" else None


class Leash:
    """The process groups that die with this process."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[socket.socket, socket.socket]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, group: int) -> None:
        """This one, too; as long as there is anybody in it. A child of ours that has not made its group yet will be in
        the one of its number."""
        # The sweeps need some descriptors, too; and a bot of very many groups is swept, as it ever was.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = min(MOST, limit // 8) if limit >= 0 else MOST
        if _fcntl is None or len(self._held) >= most:
            return
        try:
            pair = socket.socketpair()
        except OSError:
            return
        for end in pair:
            for what, value in ((_F_SETOWN, -group), (_F_SETSIG, signal.SIGKILL), (_F_SETFL, os.O_ASYNC)):
                if _fcntl(end.fileno(), what, value) < 0:  # it is gone; or a kernel that is none of Linux's
                    _slip(pair)
                    return
        self._held[group] = pair

    def hold_groups_of(self, pids: list[int]) -> None:
        """Those of these processes that are not held yet. Those in which nobody is any more are let go."""
        for group in [*self._held]:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                self._let_go(group)
            except OSError:  # there is somebody, and he is another user
                pass
        for pid in pids:
            group = _group(pid)
            if group in self._held or group in (0, os.getpgrp()):  # ours: it has not left it yet
                continue
            began = tree.started(pid)
            self.hold(group)
            # Its parent may have buried it meanwhile, and its number be a stranger's.
            if not began or tree.started(pid) != began or _group(pid) != group:
                self._let_go(group)

    def _let_go(self, group: int) -> None:
        pair = self._held.pop(group, None)
        if pair is not None:
            _slip(pair)

    def close(self) -> None:
        """Of all: nothing is left to be held."""
        for group in [*self._held]:
            self._let_go(group)


def _group(pid: int) -> int:
    """0 if it is gone, or seen from another namespace."""
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def _slip(pair: tuple[socket.socket, socket.socket]) -> None:
    """Close it without a signal."""
    for end in pair:
        assert _fcntl is not None
        _fcntl(end.fileno(), _F_SETFL, 0)
    for end in pair:
        end.close()
