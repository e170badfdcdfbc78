"""Work as a child process: any program, in any language, unchanged."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from botlease import clock
from botlease.model import Reason
from botlease.work import proof, reaper, tree

QUICK_DEATH = 60.0
"""A child that ran for so long has recovered: its earlier crashes are forgotten."""
LONGEST_BACK_OFF = 30.0
BAD_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: the bot says that starting it again cannot help."""


@dataclass(frozen=True, slots=True)
class Command:
    argv: tuple[str, ...]
    env: dict[str, str]
    bot: str
    instance_id: str
    max_crashes: int = 5
    """How many crashes in a row end the term; the first restart comes after ``back_off``, then doubled."""
    back_off: float = 1.0


class ChildWork:
    """The supervisor's side of the reaper."""

    def __init__(self, command: Command, pid: int, sock: socket.socket, say: Callable[[str], None]) -> None:
        self.command = command
        self.say = say
        self.on_ended: Callable[[int], None] = lambda term: None
        self.exit_code = 0
        self.pid = 0
        self.term = 0
        self.stop_signal: signal.Signals = signal.SIGTERM
        self._reaper = pid
        self._sock = sock
        self._inbox = reaper.Inbox(sock)
        self._loop = asyncio.get_running_loop()
        self._until = 0.0
        self._running = False
        self._stopping = False
        self._crashes = 0
        self._began = 0.0
        self._guarded = False
        self._retry: asyncio.TimerHandle | None = None
        self._asked = 0  # the signal we sent, if the child dies of it that is a clean stop
        tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 1)  # what the reaper leaves behind if it is killed falls to us
        self.proof = proof.make((os.getpid(), pid))
        sock.setblocking(False)
        self._loop.add_reader(sock, self._heard)

    # What the keeper asks ----------------------------------------------------------------------------------------

    def start(self, term: int, until: float, guard_fd: int | None) -> None:
        self.term, self._until = term, until
        self._running, self._stopping, self._crashes, self._asked = True, False, 0, 0
        self._guarded = guard_fd is not None
        self._spawn(() if guard_fd is None else (guard_fd,))
        if guard_fd is not None:
            os.close(guard_fd)  # the reaper has it now

    def _spawn(self, fds: tuple[int, ...] = ()) -> None:
        self._retry = None
        env = dict(self.command.env)
        env |= {
            "BOTLEASE_TERM": str(self.term),
            "BOTLEASE_BOT": self.command.bot,
            "BOTLEASE_INSTANCE_ID": self.command.instance_id,
        }
        self._began = clock.now()
        self._send(
            fds,
            do="start",
            argv=list(self.command.argv),
            env=env,
            until=self._until,
        )

    def arm(self, until: float) -> None:
        self._until = until
        if self._running:  # between a crash and the restart, too: the reaper keeps the side-car lock as long
            self._send((), do="arm", until=until)

    def drain(self, until: float, reason: Reason) -> None:
        self._stopping = True
        if self._waiting():
            return
        self._asked = self.stop_signal if reason is Reason.STOPPED else signal.SIGTERM
        self._send((), do="signal", number=int(self._asked), drain=True)

    def kill(self, reason: Reason) -> None:
        self._stopping = True
        if not self._waiting():
            self._send((), do="kill")

    def forward(self, number: int) -> None:
        if self._running and self._retry is None:
            self._send((), do="signal", number=int(number), drain=False)

    def _waiting(self) -> bool:
        """Between a crash and the restart nothing runs: a drain is over at once."""
        if self._retry is None:
            return False
        self._retry.cancel()
        self._retry = None
        self._loop.call_soon(self._ended)
        return True

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._sock.close()  # the reaper ends when it reads the end of file
        if self._reaper:
            try:
                os.waitpid(self._reaper, 0)
            except ChildProcessError:
                pass

    # What the reaper says ----------------------------------------------------------------------------------------

    def _send(self, fds: tuple[int, ...], **message: object) -> None:
        try:
            self._sock.setblocking(True)
            reaper.send(self._sock, message, fds)
            self._sock.setblocking(False)
        except OSError:
            self._loop.call_soon(self._reaper_died, self._sock)

    def _heard(self) -> None:
        messages = self._inbox.receive()
        if messages is None:
            self._reaper_died(self._sock)
            return
        for message in messages:
            match message["say"]:
                case "started":
                    self.pid = message["pid"]
                    self.say(f"active: term {self.term}, started {self.command.argv[0]} (pid {self.pid})")
                case "failed":
                    self.say(f"cannot start {self.command.argv[0]}: {message['error']}")
                    self._stopping = True
                case "gone":
                    self._gone(message["status"])
                case "dropped":
                    self._finished()

    def _gone(self, status: int) -> None:
        if not self._running:
            return
        self.pid = 0
        self.exit_code = 0 if self._asked and status == -self._asked else (status if status >= 0 else 128 - status)
        if status in (0, BAD_CONFIGURATION) or self._stopping:
            self._ended()
            return
        if clock.now() - self._began > QUICK_DEATH:
            self._crashes = 0
        self._crashes += 1
        what = f"signal {-status}" if status < 0 else f"exit code {status}"
        if self._crashes > self.command.max_crashes:
            self.say(f"the bot crashed {self._crashes} times in a row ({what}): giving up")
            self._ended()
            return
        wait = min(self.command.back_off * 2 ** (self._crashes - 1), LONGEST_BACK_OFF)
        self.say(f"the bot crashed ({what}): restart {self._crashes} of {self.command.max_crashes} in {wait:g} s")
        self._retry = self._loop.call_later(wait, self._spawn)

    def _ended(self) -> None:
        """Nothing runs any more. The side-car lock must be free before anybody reads "released"."""
        self._stopping = True  # should the reaper be killed just now, that is no reason to start the bot again
        if self._guarded:
            self._send((), do="drop")
        else:
            self._finished()

    def _finished(self) -> None:
        self._guarded = False
        if self._running:
            self._running = False
            self.on_ended(self.term)

    def _reaper_died(self, sock: socket.socket) -> None:
        """Killed from outside, or by its fence. The bot died with it; what had daemonised is ours now."""
        if sock is not self._sock or sock.fileno() < 0:
            return  # noticed twice: the one that is there now lives
        self._loop.remove_reader(self._sock)
        self._sock.close()
        while True:
            tree.kill_below(os.getpid())
            _, left = tree.reap()
            if not left:
                break
        self.say("the reaper was killed; the bot died with it")
        self._guarded = False  # the kernel dropped it
        self._fork_anew()
        if self._running and self._retry is None:  # else nothing ran, and the restart is on its way already
            self._gone(-signal.SIGKILL)

    def _fork_anew(self) -> None:
        self._reaper, self._sock = reaper.fork()
        self._inbox = reaper.Inbox(self._sock)
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._heard)
        self.proof = proof.make((os.getpid(), self._reaper))
