"""The reaper: a small process between supervisor and bot that owns the bot's whole process tree.

    supervisor (database, decisions) -- reaper (fence, sub-reaper) -- bot -- whatever the bot starts

(With a gateway there is a :mod:`.front` between reaper and bot.) It is forked early, before anything heavy is imported,
and does four things only: start the bot, pass signals on, kill everything below it, say when nothing is left. It kills
everything when

* the supervisor says so, or is gone (end of file on the socket), whatever killed it;
* the end of trust comes near, whether or not the supervisor is scheduled: it does not need to be asked.

A warm start comes before the term: the bot runs up to its gate, one end of a socket pair, and waits there. The other
end is here, so that the fence is armed before the gate opens, and a gate is never opened after the end of trust.

A cold start is half begun before the term as well: a *spare*, a fork of the reaper that has set itself up, knows what
it is to become, and waits for the word. It runs nothing of the user's before that; a Python bot's interpreter is loaded
(:mod:`.ahead`), and nothing of the bot. A planned handover, in which nobody works, is shorter by that.

If the reaper itself is stopped or stuck, its own kernel timer kills it at the end of trust, and the bot dies
with it (``PR_SET_PDEATHSIG``, and :mod:`.leash` for its whole process group and for what had daemonised). What was not
seen in time falls to the supervisor, a sub-reaper as well.
"""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import select
import struct

from botlease import clock
from botlease.title import retitle
from botlease.work import tree
from botlease.work.fence import Fence
from botlease.work.leash import Leash

TYPE_CHECKING = False  # the reaper is forked before typing is loaded: half a megabyte for each process
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any, NoReturn
else:  # nor what Python puts around these two, enumerations of all names above all: half a megabyte
    import _signal as signal
    import _socket as socket

HEAD = struct.Struct("!I")
FD = struct.Struct("i")
ROOM = socket.CMSG_SPACE(4 * FD.size)
"""For the descriptors that come along with a message: four at the most."""
EX_OSERR = 71
"""Of sysexits.h: the system has no process, descriptor or memory for it just now."""
EARLY = 0.25
"""Seconds before the end of trust at which the reaper begins to kill by itself; bounded by a tenth of what is
left when the fence is armed. The kernel's timer stands at the end of trust."""

MOMENT = 0.05
"""Seconds by which one stop signal may come later than another, or than the supervisor's word: a platform that signals
everything in the container reaches one process after the other."""
LEFT_BEHIND = 0.5
"""Seconds that what a bot has left behind may take to end by itself before it is told to."""
UNSEEN = 1.0
"""Seconds that an orphaned reaper stays for children that no /proc shows it: they are ended by its own end."""

_PASSED_BY = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
)


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    data = marshal.dumps(message)
    packet = HEAD.pack(len(data)) + data
    if fds:
        besides = b"".join(map(FD.pack, fds))
        sent = sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, besides)])
        packet = packet[sent:]
    if packet:
        sock.sendall(packet)


class Inbox:
    """Cuts the byte stream into messages and collects the descriptors that came along."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.fds: list[int] = []

    def receive(self) -> list[dict[str, Any]] | None:
        """None at the end of the stream."""
        try:
            data, besides, _, _ = self.sock.recvmsg(8192, ROOM)  # what is longer comes in pieces
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        for _, _, raw in besides:  # nothing but descriptors is ever sent along
            for (fd,) in FD.iter_unpack(raw):
                os.set_inheritable(fd, False)
                self.fds.append(fd)
        if not data:
            return None
        self.data += data
        out = []
        while len(self.data) >= HEAD.size:
            (size,) = HEAD.unpack_from(self.data)
            if len(self.data) < HEAD.size + size:
                break
            out.append(marshal.loads(self.data[HEAD.size : HEAD.size + size]))  # noqa: S302 - our own other half
            self.data = self.data[HEAD.size + size :]
        return out


def _pipe() -> tuple[int, int]:
    return os.pipe()  # not inheritable, as everything Python opens


def fork() -> tuple[int, socket.socket]:
    """Fork the reaper. Call it from the main thread, before threads and heavy imports."""
    tree.leave_no_core()
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            # Nothing of the supervisor's may live on in here: not its database socket, not its side-car lock.
            tree.keep_only(its.fileno())
            _Reaper(its).run()
        except Exception as e:  # no kernel timer is to be had, no descriptor: else nobody would know why
            os.write(2, f"botlease: the reaper cannot go on: {e or type(e).__name__}\n".encode())
        finally:
            os._exit(70)
    its.close()
    return pid, ours


_early: tuple[int, socket.socket] | None = None


def fork_early() -> None:
    """Fork it now, for :func:`take` to find: the earlier, the smaller. Standard descriptors that are closed are opened
    before, lest a database's socket becomes one."""
    global _early
    from botlease.stderr import open_standard_descriptors

    open_standard_descriptors()
    _early = fork()


def take() -> tuple[int, socket.socket]:
    """The reaper that was forked early, or a new one: its pid and our end of the line to it."""
    global _early
    taken, _early = _early, None
    return taken or fork()


class _Reaper:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = Inbox(sock)
        self.fence = Fence()
        self.leash = Leash()
        self.kill_at: float | None = None
        self.search_at: float | None = None
        self.child = 0
        self.group = 0  # of the bot, also when its first process has ended
        self.tell_at: float | None = None  # when those are told to stop whom the bot has left behind
        self.stop_number = 0  # what it was told to stop with; 0: by the front, or not yet
        self.status: int | None = None
        self.working = False
        self.draining = False
        self.killing = False
        self.killing_since = 0.0
        self.command: dict[str, Any] = {}  # what the bot is: argv, env, front, and how it is started ahead
        self.spare: _Spare | None = None  # never beside a bot: then "no child is left" says that nothing of it is
        self.guards: list[int] = []  # the side-car lock, kept as long as the work runs
        self.gate: socket.socket | None = None  # ours of the pair, while the bot waits at it

    def run(self) -> NoReturn:
        gc.freeze()  # what came along is the supervisor's as well: a collection would write to it, and make it ours
        gc.enable()
        os.setsid()
        tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 1)
        tree.prctl(tree.PR_SET_NAME, b"botlease-reaper")
        retitle("botlease-reaper")  # forked before the command line was read: it may hold a password
        for number in _PASSED_BY:
            signal.signal(number, signal.SIG_IGN)
        self.children = tree.Children(os.getpid())
        read, write = _pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.sock.setblocking(False)
        poll = self.poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(read, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(self._timeout())]
            if read in ready:
                os.read(read, 4096)
            if self.sock.fileno() in ready:
                messages = self.inbox.receive()
                if messages is None:
                    self._end()
                for message in messages or ():
                    self._obey(message)
            if self.gate is not None and self.gate.fileno() in ready:
                self._at_the_gate()
            if self.search_at is not None and clock.now() >= self.search_at:
                self.search_at = None
                with contextlib.suppress(OSError):  # no /proc, or out of descriptors
                    self.leash.hold_groups_of(tree.descendants(os.getpid()))
            if self.kill_at is not None and clock.now() >= self.kill_at:
                self._kill()
                if not self.working:
                    self._drop()  # between two starts of the bot, with a supervisor that sleeps
            self._look()

    def _timeout(self) -> float | None:
        if self.working and self.killing:
            # Look again soon; not so soon for ever, should something be stuck in the kernel.
            return 2.0 if clock.now() < self.killing_since + 1 else 50.0
        at = self.kill_at if self.search_at is None else self.search_at
        if self.tell_at is not None:
            at = self.tell_at if at is None else min(at, self.tell_at)
        return None if at is None else max(0.0, (at - clock.now()) * 1000) + 1

    def _tell(self, **message: Any) -> None:
        try:
            self.sock.setblocking(True)
            send(self.sock, message)
        except OSError:
            self._end()
        finally:
            self.sock.setblocking(False)

    def _obey(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "prepare":
                self.command = message
                if not self.working and self.spare is None:
                    with contextlib.suppress(OSError):  # out of processes: it is forked when it is needed
                        self.spare = self._fork(message["ahead"])
            case "start":
                self._start(message)
            case "open":
                self._open(message)
            case "arm" if self.working:
                self._arm(message["until"])
                self._hold_children()
            case "arm" if self.guards:  # between a crash and the restart only the side-car lock is kept for longer
                self._arm(message["until"])
            case "signal":
                self.draining = self.draining or message["drain"]
                self.stop_number = message["number"] if message["drain"] else self.stop_number
                if self.working and self.child:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(self.child, message["number"])
            case "kill":
                self._kill()
            case "drop":
                self._drop()
                self._tell(say="dropped")

    def _drop(self) -> None:
        """Let the side-car lock go: the term is over and nothing of its work runs."""
        for fd in self.guards:
            os.close(fd)
        self.guards.clear()
        self.kill_at = None
        if not self.working:
            self.search_at = None
            self.fence.disarm()

    def _came_along(self, message: dict[str, Any]) -> dict[str, int]:
        """The descriptors that were sent with this message, by their names."""
        names = message["fds"]
        fds, self.inbox.fds = self.inbox.fds[: len(names)], self.inbox.fds[len(names) :]
        found = dict(zip(names, fds, strict=True))
        if "guard" in found:
            self.guards.append(found["guard"])
        return found

    def _kill(self) -> None:
        if self.working and not self.killing:
            self.killing, self.killing_since = True, clock.now()

    def _arm(self, until: float) -> None:
        left = until - clock.now()
        self.kill_at = until - max(0.0, min(EARLY, left / 10))
        self.search_at = until - left / 2  # not while all is well: then the next one comes before
        self.fence.arm(until)

    def _hold_children(self) -> None:
        """Whoever has become our child since then has daemonised. (Below the front there is the bot.)"""
        found = self.children()
        if self.command["front"]:
            behind = tree.Children(self.child)
            found += behind()
            behind.close()
        if len(self.leash) != 1 or found != [self.child]:  # as mostly: and nothing is in a cache, two seconds later
            self.leash.hold_groups_of(found)

    def _start(self, message: dict[str, Any]) -> None:
        came = self._came_along(message)
        if not self.working:  # one bot at a time, whatever is asked
            self._begin(message, came)
        for name in ("stdout", "listen", "control"):
            if name in came:
                os.close(came[name])

    def _begin(self, message: dict[str, Any], came: dict[str, int]) -> None:
        self.working, self.draining, self.killing, self.status = True, False, False, None
        self.group, self.stop_number, self.tell_at = 0, 0, None
        if message["until"] is None:
            self.kill_at = None  # a warm start has no term yet, and that of an earlier one is over
        else:
            self._arm(message["until"])  # before the fork: if we are stopped right here, the kernel ends us in time
            assert self.kill_at is not None
            if clock.now() >= self.kill_at:
                self.status = 70
                self._dismiss()
                return
        theirs: socket.socket | None = None
        try:
            if message["gate"]:
                self.gate, theirs = socket.socketpair()
                self.poll.register(self.gate, select.POLLIN)
                came["gate"] = theirs.fileno()
            pid, problem = self._spawn(message, {name: fd for name, fd in came.items() if name != "guard"})
        except OSError as e:  # out of processes, descriptors or memory: it may go better in a moment
            self.status = EX_OSERR
            self._kill()
            self._tell(say="failed", error=e.strerror or "the system is out of something", again=True)
            return
        finally:
            if theirs is not None:
                theirs.close()
        if problem:
            self.status = 127 if problem == "No such file or directory" else 126
            self._tell(say="failed", error=problem, again=False)
        else:
            self.child = self.group = pid
            self._tell(say="started", pid=pid)
            self._hold_children()

    def _at_the_gate(self) -> None:
        """The bot says that it has come there; or it has closed its end, as it may once it is through."""
        assert self.gate is not None
        try:
            word = self.gate.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if word:
            self._tell(say="ready")
        else:
            self._shut()

    def _shut(self) -> None:
        if self.gate is not None:
            self.poll.unregister(self.gate)
            self.gate.close()
            self.gate = None

    def _open(self, message: dict[str, Any]) -> None:
        """The term has begun. The fence first; then the word to the bot, which it finds even if it comes later."""
        self._came_along(message)
        if not self.working:  # it died on its way here, and its supervisor is about to hear of it
            self.kill_at = None
            if self.guards:
                self._arm(message["until"])
            return
        self._arm(message["until"])
        assert self.kill_at is not None
        if clock.now() >= self.kill_at:
            return  # the loop kills it
        self._hold_children()
        if self.gate is not None:
            try:
                self.gate.sendall(f"{message['term']}\n".encode())
            except OSError:
                self._shut()
        self._tell(say="opened")

    def _spawn(self, message: dict[str, Any], fds: dict[str, int]) -> tuple[int, str]:
        """Its pid, and why it cannot be started."""
        order = {"env": message["env"], "fds": list(fds)}
        spare = self.spare or self._fork()
        self.spare = None
        try:
            spare.become(order, fds)
        except OSError:  # somebody has killed it meanwhile
            spare.close()
            self.leash.close()
            spare = self._fork()
            try:
                spare.become(order, fds)
            except OSError:
                spare.close()
                raise
        return spare.pid, spare.problem()

    def _fork(self, ahead: tuple[list[str], list[str]] | None = None) -> _Spare:
        read, write = _pipe()
        try:
            ours, its = socket.socketpair()
        except OSError:
            os.close(read)
            os.close(write)
            raise
        me = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                _wait_and_become(self.command, ahead, me, its, write)
        except OSError:
            os.close(read)
            ours.close()
            raise
        finally:
            os.close(write)
            its.close()
        self.leash.hold(pid)  # the group that it makes for itself, if it has not yet
        return _Spare(pid, ours, read)

    def _dismiss(self) -> None:
        if self.spare is not None:
            self.spare.close()  # it ends when it reads the end of file
            self.spare = None
            self.leash.close()

    def _look(self) -> None:
        """Collect the dead; kill what should not be; say when nothing is left."""
        dead, left = tree.reap()
        for pid, status in dead:
            if self.spare is not None and pid == self.spare.pid:
                self._dismiss()
            if pid == self.child:
                self.status = status
                self.child = 0
                if not self.draining:
                    self._kill()  # what it left behind is not its own master
        if not self.working:
            return
        if left and self.killing:
            tree.kill_below(os.getpid(), self.group)
        elif left and self.stop_number and self.child == 0:
            self._tell_the_rest()
        if not left and self.child == 0:
            self.working = False
            self.search_at = self.tell_at = None
            self.group = 0  # somebody else may have its number soon
            self._shut()
            late = self.kill_at is not None and clock.now() >= self.kill_at
            if late or self.draining or not self.guards:  # after a drain the term is over; else there may be a restart
                self._drop()
            if not self.guards:  # else it stays armed: stopped between a crash and the restart, we keep nobody else out
                self.fence.disarm()
            status = self.status if self.status is not None else -signal.SIGKILL
            self._tell(say="gone", status=status, guarded=bool(self.guards))
            self.leash.close()

    def _tell_the_rest(self) -> None:
        """The bot has stopped, and what it left behind in groups of their own was never told to by us: a helper that
        has daemonised would have everybody wait for all of the grace, and nobody work meanwhile. Not at once, and only
        once: the bot may have told it, and many take a second signal for "at once"."""
        try:
            os.killpg(self.group, 0)
            self.tell_at = None
        except ProcessLookupError:
            if self.tell_at is None:
                self.tell_at = clock.now() + LEFT_BEHIND
            elif clock.now() >= self.tell_at:
                number, self.stop_number, self.tell_at = self.stop_number, 0, None
                tree.kill_below(os.getpid(), number=number)
        except PermissionError:
            self.tell_at = None  # somebody is left in its own group, who was told

    def _end(self) -> NoReturn:
        """The supervisor is gone. Nothing below us may outlive it."""
        self._dismiss()
        # After a handover there is nothing, and the next bot wants the processor that a look at all processes takes.
        began = clock.now()
        while tree.reap()[1]:
            if tree.kill_below(os.getpid(), self.group):
                began = clock.now()
            elif clock.now() > began + UNSEEN:
                break
            select.select([], [], [], 0.001)
        os._exit(0)


class _Spare:
    """The reaper's side of a fork of itself that waits for the word what to become."""

    def __init__(self, pid: int, orders: socket.socket, problems: int) -> None:
        self.pid = pid
        self.orders = orders
        self.problems = problems

    def become(self, order: dict[str, Any], fds: dict[str, int]) -> None:
        """Raises OSError if it is gone."""
        os.kill(self.pid, signal.SIGCONT)  # should somebody have stopped it while it waited
        send(self.orders, order, tuple(fds.values()))

    def problem(self) -> str:
        """Waits for exec. Empty: it succeeded, or it had come before (an interpreter that was started ahead)."""
        self.orders.close()
        with open(self.problems, "rb") as pipe:  # noqa: PTH123 - a descriptor; it closes when exec succeeded
            return pipe.read().decode()

    def close(self) -> None:
        self.orders.close()
        os.close(self.problems)


def _wait_and_become(
    command: dict[str, Any],
    ahead: tuple[list[str], list[str]] | None,
    reaper: int,
    orders: socket.socket,
    problems: int,
) -> NoReturn:
    try:
        # A set-user-ID program would lose the death signal and could not be killed by us at all.
        tree.prctl(tree.PR_SET_NO_NEW_PRIVS, 1)
        tree.prctl(tree.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != reaper:  # it died between fork and prctl
            os._exit(70)
        os.setsid()  # the terminal's signals go to the supervisor, which passes them on in order
        signal.set_wakeup_fd(-1)
        for number in (*_PASSED_BY, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        # Nothing of the reaper's may live on in here while it waits: not its end of the line to the supervisor.
        tree.keep_only(orders.fileno(), problems)
        if ahead is not None:  # it waits in there
            os.set_inheritable(orders.fileno(), True)
            tree.may_leave_a_core()
            argv = [*ahead[0], str(orders.fileno()), *ahead[1]]
            os.execvpe(argv[0], argv, command["env"])  # noqa: S606 - the interpreter of the user's command
        inbox = Inbox(orders)
        messages: list[dict[str, Any]] | None = []
        while not messages:
            messages = inbox.receive()
            if messages is None:  # no bot is wanted any more
                os._exit(0)
        order = messages[0]
        env = command["env"] | order["env"]
        _become(command["argv"], env, command["front"], dict(zip(order["fds"], inbox.fds, strict=True)), problems)
    except OSError as e:
        os.write(problems, (e.strerror or "cannot be started").encode())
    finally:
        os._exit(127)


def _become(argv: list[str], env: dict[str, str], front: dict[str, Any], fds: dict[str, int], problems: int) -> None:
    if "stdout" in fds:
        os.dup2(fds["stdout"], 1)
    gate = fds.get("gate", -1)
    if gate >= 0:
        os.set_inheritable(gate, True)
        env["BOTLEASE_GATE_FD"] = str(gate)
    if front:
        _become_the_front(argv, env, front | fds, problems, gate)
    tree.may_leave_a_core()
    os.execvpe(argv[0], argv, env)  # noqa: S606 - the user's command, as given


def _become_the_front(argv: list[str], env: dict[str, str], front: dict[str, Any], problems: int, gate: int) -> None:
    from botlease.work.front import become, end_as

    status = 70
    try:
        keep = {fd for fd in (problems, gate, front["listen"], front["control"]) if fd >= 0}
        status = become(argv, env, front, problems, gate, keep)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        end_as(status)
