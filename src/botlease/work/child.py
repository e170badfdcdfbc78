"""Work as a child process: any program, in any language, unchanged."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from botlease import clock
from botlease.model import Crashed, Event, Ready, Reason, WorkEnded
from botlease.work import ahead, proof, reaper, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from botlease.web.gate import GateServer
    from botlease.work.pulse import Pulse

QUICK_DEATH = 60.0
"""A child that ran for so long has recovered: its earlier crashes are forgotten."""
LONGEST_BACK_OFF = 30.0
FORK_AGAIN = 1.0
"""Seconds until another reaper is tried, where one could not be forked or has ended as it began."""
AFTER_A_TERM = 0.2
"""Seconds until what can wait is done."""
BAD_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: the bot says that starting it again cannot help."""


@dataclass(frozen=True, slots=True)
class Front:
    """The gateway's part of a command."""

    upstream: str
    database: str = field(repr=False)
    delete_webhook: bool
    listen: socket.socket
    """On loopback, and the same for every start of the bot: its address is known before anybody serves there."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listen.getsockname()[1]}"


@dataclass(frozen=True, slots=True)
class Command:
    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    bot: str
    instance_id: str
    max_crashes: int = 5
    """So many restarts in a row; the crash after them ends the term."""
    back_off: float = 1.0
    """Seconds, doubled with each crash in a row."""
    warm: bool = False
    """While it stands by it is started up to its gate."""
    ahead: bool = True
    """While it stands by the interpreter of a Python bot is started (:mod:`.ahead`)."""
    front: Front | None = None
    """The Bot API is served in front of it."""
    danger: tuple[int, ...] = ()
    """The signals that say "the end of trust comes nearer" and, if there are two, "not any more"."""


class ChildWork:
    """The supervisor's side of the reaper."""

    def __init__(
        self,
        command: Command,
        pid: int,
        sock: socket.socket,
        say: Callable[[str], None],
        *,
        pulse: Pulse | None = None,
        gate: GateServer | None = None,
    ) -> None:
        self.command = command
        self.say = say
        self.pulse = pulse
        self.gate = gate
        self.tell: Callable[[Event], None] = lambda event: None
        self.give_up: Callable[[], None] = lambda: None
        """Called when the bot cannot even come to its gate."""
        if pulse is not None:
            pulse.tell = self._pass_on
        if gate is not None:
            gate.arrived = self._arrived
        self.exit_code = 0
        self.pid = 0
        self.term = 0
        self.stop_signal: signal.Signals = signal.SIGTERM
        self._reaper = pid
        self._sock = sock
        self._forked_at = clock.now()
        # Whoever started us by exec may have had children of his own, and they are ours now: none of them is the bot's.
        those = tree.Children(os.getpid())
        self._strangers = {child: tree.started(child) for child in those() if child != pid}
        those.close()
        self._unheard: asyncio.TimerHandle | None = None  # until the reaper has said that the work has begun
        self._burying: asyncio.TimerHandle | None = None
        self._fork_later: asyncio.TimerHandle | None = None
        self._inbox = reaper.Inbox(sock)
        self._loop = asyncio.get_running_loop()
        self._until = 0.0
        self._running = False
        self._warm = False  # it runs up to its gate, or waits there
        self._ready = False
        self._restarting = False  # we end it ourselves, to start it again
        self._unowned = False  # the reaper that the lease names was killed, and there is another one
        self._orphaned = False  # the term before ended by that: it counts as a crash in this one, too
        self._was_stopped = False  # it ended as one does that was told to stop, and not by us
        self._gated = False  # it was started warm, and its gate has not been opened
        self._stopping = False
        self._crashes = 0
        self._began = 0.0
        self._guarded = False
        self._front: socket.socket | None = None  # ours of the pair, while there is a process in front of the bot
        self._front_inbox: reaper.Inbox | None = None
        self._tallies: dict[str, dict[str, Any]] = {}
        self._nonce = ""
        self._retry: asyncio.TimerHandle | None = None
        self._asked = 0  # the signal we sent, if the child dies of it that is a clean stop
        tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 1)  # what the reaper leaves behind if it is killed falls to us
        self.proof = proof.make((os.getpid(), pid))
        sock.setblocking(False)
        self._loop.add_reader(sock, self._heard)
        self._sparing: asyncio.TimerHandle | None = None
        self._spare()

    def _pass_on(self, event: Event) -> None:
        self.tell(event)

    # What the keeper asks ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        if self.command.warm and not self._running and not self._warm and self._retry is None:
            self._stopping = False  # the earlier term is over
            if not self._orphaned:
                self._crashes = 0
            self._warm_up()

    def _warm_up(self) -> None:
        self._retry = None
        self._warm = True
        self._spawn()

    def _spare(self) -> None:
        """Tell the reaper what the bot is, and have it fork ahead what becomes the next one."""
        c = self.command
        env = c.env | {"BOTLEASE_BOT": c.bot, "BOTLEASE_INSTANCE_ID": c.instance_id}
        front: dict[str, object] = {}
        if c.front is not None:
            env["BOTLEASE_API_URL"] = c.front.url
            front = {"upstream": c.front.upstream, "database": c.front.database, "bot": c.bot}
            front["delete_webhook"] = c.front.delete_webhook
        if self.pulse is not None and self.pulse.rule.kind == "stdout":
            env["PYTHONUNBUFFERED"] = "1"  # into a pipe it would write in blocks, and seem to say nothing
        # Up to its gate it is started long before, and behind a gateway it waits for that one.
        waits = None if c.warm or front or not c.ahead else ahead.command(c.argv, env)
        self._send(do="prepare", argv=list(c.argv), env=env, front=front, ahead=waits)

    def _spare_again(self) -> None:
        if not self._running:  # a look at the bot's file may take long, and a term is no time for it
            self._spare()

    def start(self, term: int, nonce: str, until: float, guard_fd: int | None) -> None:
        self.term, self._nonce, self._until = term, nonce, until
        self._running, self._stopping, self._restarting, self._asked = True, False, False, 0
        if not self._orphaned or clock.now() - self._began > QUICK_DEATH:
            self._crashes = 0
        self._orphaned = self._unowned = False
        self._guarded = guard_fd is not None
        fds = {} if guard_fd is None else {"guard": guard_fd}
        if self._retry is not None:  # it was to be warmed up again
            self._retry.cancel()
            self._retry = None
        self._unheard = self._loop.call_later(max(0.0, until - clock.now()), self._no_word)
        if self._warm:
            self._warm, self._began = False, clock.now()
            self._send(fds, do="open", term=term, until=until)
        else:
            self._spawn(fds)
        if guard_fd is not None:
            os.close(guard_fd)  # the reaper has it now

    def _no_word(self) -> None:
        """It was stopped before it had a fence of its own. Whoever has the lease and no bot must not keep it."""
        self._unheard = None
        if self._reaper and self._sock.fileno() >= 0:
            self.say("the reaper does not answer: ending it")
            try:
                os.kill(self._reaper, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _word(self) -> None:
        if self._unheard is not None:
            self._unheard.cancel()
            self._unheard = None

    def _spawn(self, fds: dict[str, int] | None = None) -> None:
        self._retry = None
        self._ready, self._gated = False, self._warm
        began = self._began = clock.now()
        if self._burying is not None:
            return  # the reaper has just been killed, and something of its work may live: that will be a crash
        try:
            if self._sock.fileno() < 0:
                self._fork_anew()
                if self._unowned:  # a crash, or where no reaper can live there would be one term after the other
                    self._loop.call_soon(self._not_started, began)
                    return
            if self._unowned and not self._warm:
                self._retry = self._loop.call_later(0, self._renounce)
                return
            self._order(fds)
        except (OSError, RuntimeError) as e:  # out of descriptors, processes or threads
            self.say(f"cannot start {self.command.argv[0]}: {getattr(e, 'strerror', None) or e}")
            self._loop.call_soon(self._not_started, began)

    def _not_started(self, began: float) -> None:
        if self._began == began and self._retry is None:  # else another one has begun, or is about to
            self._gone(reaper.EX_OSERR)

    def _renounce(self) -> None:
        """Nothing runs, and who owned it is gone. The lease names him, to whoever wants to know on this host whether
        we live, and with him went the side-car lock: the term is over, and the next one begins with another owner."""
        self._retry = None
        self._running, self._orphaned = False, True
        self._word()
        self.tell(WorkEnded(self.term, unowned=True))

    def _order(self, fds: dict[str, int] | None) -> None:
        """Raises OSError or RuntimeError if there is nothing left to make it of."""
        env = {}  # what is known only now
        if not self._warm:
            env["BOTLEASE_TERM"] = str(self.term)
        elif self.gate is not None:
            env["BOTLEASE_GATE_URL"] = self.gate.shut()
        fds = dict(fds or {})
        theirs: socket.socket | None = None
        output = self.pulse.output() if self.pulse is not None else -1
        try:
            if output >= 0:
                fds["stdout"] = output
            theirs = self._put_in_front(fds)
            self._send(fds, do="start", env=env, until=None if self._warm else self._until, gate=self._warm)
        finally:
            if output >= 0:
                os.close(output)
            if theirs is not None:
                theirs.close()

    def _put_in_front(self, fds: dict[str, int]) -> socket.socket | None:
        """A new line to the process in front of the bot. Returns its end."""
        if self.command.front is None:
            return None
        self._drop_front()
        self._tallies = {}
        self._front, theirs = socket.socketpair()
        self._front_inbox = reaper.Inbox(self._front)
        self._front.setblocking(False)
        self._loop.add_reader(self._front, self._heard_front)
        fds |= {"listen": self.command.front.listen.fileno(), "control": theirs.fileno()}
        if not self._warm:
            self._tell_front(do="term", term=self.term, nonce=self._nonce, until=self._until)
        return theirs

    def _drop_front(self) -> None:
        if self._front is not None:
            self._loop.remove_reader(self._front)
            self._front.close()
            self._front = None

    def _tell_front(self, **message: object) -> None:
        if self._front is not None:
            try:
                reaper.send(self._front, message)
            except OSError:
                pass  # it is gone, or stopped for so long that the fence is near

    def _heard_front(self) -> None:
        assert self._front_inbox is not None
        messages = self._front_inbox.receive()
        if messages is None:
            self._drop_front()
        for message in messages or ():
            if message["say"]:
                self.say(f"gateway: {message['say']}")
            else:
                self._tallies = message["tallies"]

    def gateway(self, now: float) -> dict[str, dict[str, Any]]:
        """What the gateway last said about each token, by its bot id; ``deaf`` in seconds until now."""
        return {api: {**t, "deaf": round(max(0.0, now - t["heard"]), 1)} for api, t in self._tallies.items()}

    def arm(self, until: float) -> None:
        self._until = until
        if self._running:  # between a crash and the restart, too: the reaper keeps the side-car lock as long
            self._send(do="arm", until=until)
            self._tell_front(do="arm", until=until)

    def drain(self, until: float, reason: Reason) -> None:
        self._stopping = True
        if self._waiting():
            if self._was_stopped and reason is Reason.STOPPED:
                self.exit_code = 0  # by the same stop as we are
            return
        self._asked = self.stop_signal if reason is Reason.STOPPED else signal.SIGTERM
        # With a process in front of it the bot is signalled by that, when it has nothing in hand any more.
        self._tell_front(do="drain", until=until, number=int(self._asked))
        self._send(do="signal", number=0 if self._front is not None else int(self._asked), drain=True)

    def kill(self, reason: Reason) -> None:
        self._stopping = True
        if not self._waiting():
            self._send(do="kill")

    def restart(self, hung: bool) -> None:
        if not hung:
            # Most bots that crashed live when they are started anew, and until then nobody works. One that cannot
            # live spins only once.
            if self._running and self._retry is not None and self._crashes == 1:
                self._retry.cancel()
                if self._was_stopped:  # we are about to be, too: a bot that is started now would be stopped at once
                    self._retry = self._loop.call_later(reaper.MOMENT, self._spawn)
                else:
                    self._spawn()
        elif self._running and self._retry is None:
            self._restarting = True
            self._send(do="kill")  # it counts as a crash, and is started again as after one

    def danger(self, on: bool) -> None:
        signals = self.command.danger[:1] if on else self.command.danger[1:]
        for number in signals:
            self.forward(number)

    def forward(self, number: int) -> None:
        if self._running and self._retry is None:
            self._send(do="signal", number=int(number), drain=False)

    def _waiting(self) -> bool:
        """Between a crash and the restart nothing runs: a drain is over at once."""
        if self._retry is None:
            return False
        self._retry.cancel()
        self._retry = None
        self._loop.call_soon(self._ended)
        return True

    def close(self) -> None:
        """Nothing of the work outlives this."""
        for timer in (self._retry, self._sparing, self._fork_later):
            if timer is not None:
                timer.cancel()
        if self.pulse is not None:
            self.pulse.end()
        if self._burying is not None:
            self._burying.cancel()
        elif self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
        self._word()
        self._wake_reaper()
        self._sock.close()  # the reaper ends when it reads the end of file
        self._drop_front()
        if self._reaper:
            try:
                os.waitpid(self._reaper, 0)
            except ChildProcessError:
                pass

    # What the reaper says ----------------------------------------------------------------------------------------

    def _wake_reaper(self) -> None:
        """Somebody may have stopped it while no fence was armed that would end it. (Where one is, it dies of that.)"""
        if self._sock.fileno() >= 0:
            try:
                os.kill(self._reaper, signal.SIGCONT)
            except ProcessLookupError:
                pass

    def _send(self, fds: dict[str, int] | None = None, **message: object) -> None:
        fds = fds or {}
        if message["do"] in ("start", "open", "drop"):
            self._wake_reaper()
        try:
            self._sock.setblocking(True)
            reaper.send(self._sock, {**message, "fds": list(fds)}, tuple(fds.values()))
            self._sock.setblocking(False)
        except OSError:
            self._loop.call_soon(self._reaper_died, self._sock)

    def _heard(self) -> None:
        messages = self._inbox.receive()
        if messages is None:
            self._reaper_died(self._sock)
            return
        for message in messages:
            if message["say"] != "ready":
                self._word()
            match message["say"]:
                case "started":
                    self.pid = message["pid"]
                    if self._gated:
                        self.say(f"warming up: started {self.command.argv[0]} (pid {self.pid})")
                    else:
                        self._at_work(f"started {self.command.argv[0]} (pid {self.pid})")
                case "ready":
                    self._arrived()
                case "opened":
                    self._gated = False
                    # Not before: until now no fence was armed, and its requests could have outlived a pause.
                    self._tell_front(do="term", term=self.term, nonce=self._nonce, until=self._until)
                    if self.gate is not None:
                        self.gate.open(self.term)
                    self._at_work(f"opened the gate to {self.command.argv[0]} (pid {self.pid})")
                case "failed":
                    self.say(f"cannot start {self.command.argv[0]}: {message['error']}")
                    self._stopping = self._stopping or not message["again"]
                case "gone":
                    self._guarded = self._guarded and message["guarded"]
                    self._gone(message["status"])
                case "dropped":
                    self._finished()

    def _at_work(self, what: str) -> None:
        self.say(f"active: term {self.term}, {what}")
        if self.pulse is not None:
            self.pulse.begin(self.term)

    def _arrived(self) -> None:
        """It has come to its gate: from here on a handover takes no start of a program."""
        if self._warm and not self._ready:
            self._ready = True
            self.say(f"ready: {self.command.argv[0]} waits at its gate")
            self.tell(Ready(True))

    def _gone(self, status: int) -> None:
        self.pid = 0
        if self.pulse is not None:
            self.pulse.end()
        if self._running:
            self._work_gone(status)
        elif self._warm:
            self._warm_gone(status)

    def _warm_gone(self, status: int) -> None:
        """It never worked, so nobody is disturbed by it: try again for as long as a crash budget goes."""
        self._warm = self._ready = False
        self.tell(Ready(False))
        self.exit_code = status if status >= 0 else 128 - status
        wait = self._back_off(f"ended before its gate ({_how(status)})", final=self._stopping)
        if wait is None or status == BAD_CONFIGURATION:
            self.exit_code = self.exit_code or 1
            self._loop.call_soon(self.give_up)
        else:
            self._retry = self._loop.call_later(wait, self._warm_up)

    def _back_off(self, what: str, final: bool = False) -> float | None:
        """Seconds until the next start, or None: it has crashed too often in a row."""
        if clock.now() - self._began > QUICK_DEATH:
            self._crashes = 0
        self._crashes += 1
        if final or self._crashes > self.command.max_crashes:
            self.say(f"the bot {what}, {self._crashes} times in a row: giving up")
            return None
        wait: float = min(self.command.back_off * 2 ** (self._crashes - 1), LONGEST_BACK_OFF)
        when = "" if self._crashes == 1 else f" in {wait:g} s"  # the first one mostly at once, see :meth:`restart`
        self.say(f"the bot {what}: restart {self._crashes} of {self.command.max_crashes}{when}")
        return wait

    def _work_gone(self, status: int) -> None:
        self._word()
        self.exit_code = 0 if self._asked and status == -self._asked else (status if status >= 0 else 128 - status)
        if status in (0, BAD_CONFIGURATION) or self._stopping:
            self._ended()
            return
        wait = self._back_off("was ended" if self._restarting else f"crashed ({_how(status)})")
        self._was_stopped = not self._restarting and status in _STOPPED
        self._restarting = False
        if wait is None:
            self._ended()
            return
        self._retry = self._loop.call_later(wait, self._spawn)
        self.tell(Crashed(self.term))

    def _ended(self) -> None:
        """Nothing runs any more. The side-car lock must be free before anybody reads "released"."""
        self._stopping = True  # should the reaper be killed just now, that is no reason to start the bot again
        self._word()
        if self._guarded and self._sock.fileno() >= 0:
            self._send(do="drop")
        else:
            self._finished()

    def _finished(self) -> None:
        self._guarded = False
        if self._running:
            self._running = False
            # Not at once: at a handover the next bot starts just now, and wants the processor.
            self._sparing = self._loop.call_later(AFTER_A_TERM, self._spare_again)
            self.tell(WorkEnded(self.term))

    def _reaper_died(self, sock: socket.socket) -> None:
        """Killed from outside, or by its fence. The bot died with it; what had daemonised is ours now."""
        if sock is not self._sock or sock.fileno() < 0:
            return  # noticed twice: the one that is there now lives
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._bury(0.002)

    def _bury(self, pause: float) -> None:
        """Until nothing of the work is left; what is frozen dies when it is thawed, and no sooner."""
        tree.kill_below(os.getpid(), spared=self._strangers)
        _, left = tree.reap()
        if left and self._may_be_the_bots():
            self._burying = self._loop.call_later(pause, self._bury, min(2 * pause, 0.1))
            return
        self._burying = None
        self.say("the reaper was killed; the bot died with it")
        self._guarded = False  # the kernel dropped it
        if clock.now() < self._forked_at + FORK_AGAIN:  # it cannot live: lest we do nothing else
            self._fork_later = self._loop.call_later(FORK_AGAIN, self._try_again)
        else:
            self._try_again()
        if self._warm or (
            self._running and self._retry is None
        ):  # else nothing ran, and the restart is on its way already
            self._gone(-signal.SIGKILL)

    def _may_be_the_bots(self) -> bool:
        """Whether a child of ours is none of those that we had before, as the kernel has them, whatever /proc hides."""
        those = tree.Children(os.getpid())
        found = those()  # none, though there are some: it does not tell
        those.close()
        return not found or any(self._strangers.get(child) != tree.started(child) for child in found)

    def _try_again(self) -> None:
        self._fork_later = None
        if self._sock.fileno() < 0:
            try:
                self._fork_anew()
            except OSError as e:
                self.say(f"the reaper cannot be forked: {e.strerror}; trying again")
                self._fork_later = self._loop.call_later(FORK_AGAIN, self._try_again)

    def _fork_anew(self) -> None:
        """Raises OSError if no process is to be had."""
        if self._fork_later is not None:
            self._fork_later.cancel()
            self._fork_later = None
        self._reaper, self._sock = reaper.fork()
        self._unowned = self._running
        self._forked_at = clock.now()
        self._inbox = reaper.Inbox(self._sock)
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._heard)
        self.proof = proof.make((os.getpid(), self._reaper))
        self._spare()


_STOPPED = {sign for n in (signal.SIGTERM, signal.SIGINT) for sign in (-n, 128 + n)}


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"
