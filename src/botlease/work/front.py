"""The process in front of the bot, where there is a gateway: it serves the Bot API on loopback, and starts the bot.

    supervisor -- reaper -- front -- bot

It is a part of the work: the fence of the reaper kills it at the end of trust, and with it every request that has not
left. In the supervisor, which no timer kills, a request could be on its way through a pause of an hour; and a busy bot
would keep renewals waiting. It is forked from the reaper without an exec, and starts the bot before it loads anything:
the bot does not start later for it.

It stands between the bot and its stop signal: first the bot is handed nothing more and finishes what it has, then it is
told to stop. So a framework that dies at once, or forgets what it is working on, has nothing to lose.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from botlease import clock
from botlease.title import retitle
from botlease.work import tree

TYPE_CHECKING = False  # forked before typing is loaded, as the reaper is
if TYPE_CHECKING:
    from typing import Any

    from botlease.telegram.gateway import Gateway

FORWARDED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM)
UNANNOUNCED = 6.0
"""Seconds for a drain, where a signal came to this process from elsewhere."""


def become(
    argv: list[str], env: dict[str, str], config: dict[str, Any], problem: int, gate: int, keep: set[int]
) -> int:
    """What the reaper's child does instead of exec. ``problem``: where to write why the bot cannot be started. Returns
    the exit code, negative for a signal."""
    tree.prctl(tree.PR_SET_NAME, b"botlease-front")
    retitle("botlease-front")
    tree.keep_only(*keep)  # nothing of the reaper's may live on in here: not the side-car lock, not its sockets
    # The reaper's forks die of it, as programs do. Here a client that goes away in the middle of an answer, or a server
    # in the middle of a question, would end the bot: it is an error of that one connection.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # Until there are handlers for them; a signal of the first moments must not end us.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGTERM, signal.SIGINT))
    _turn_away(config["listen"])
    pid = _start(argv, env, problem, gate)
    os.close(problem)
    if gate >= 0:
        os.close(gate)
    import asyncio

    async def main() -> None:
        # Not by the end of the loop: that would wait for a name that is still being looked up.
        end_as(await _Front(pid, config).run())

    asyncio.run(main())
    return 70


def _turn_away(listen: int) -> None:
    """The socket is the supervisor's, and the kernel takes connections and requests in while nobody serves there. What
    is there now is of a bot that is dead: in this term it must not be sent."""
    listening = socket.socket(fileno=listen)
    try:
        listening.setblocking(False)
        while True:
            listening.accept()[0].close()
    except OSError:  # none is left
        pass
    finally:
        listening.detach()


def _start(argv: list[str], env: dict[str, str], problem: int, gate: int) -> int:
    me = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        tree.prctl(tree.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != me:
            os._exit(70)
        if gate >= 0:
            os.set_inheritable(gate, True)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()  # a group of its own: signals reach it through us
        tree.may_leave_a_core()
        os.execvpe(argv[0], argv, env)  # noqa: S606 - the user's command, as given
    except OSError as e:
        os.write(problem, (e.strerror or "cannot be started").encode())
    finally:
        os._exit(127)


def end_as(status: int) -> None:
    """End the way the bot did, so that the reaper sees what became of it."""
    if status >= 0:
        os._exit(status)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its core is written already, ours says nothing
    with contextlib.suppress(OSError, ValueError):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)


class _Front:
    def __init__(self, pid: int, config: dict[str, Any]) -> None:
        self.pid = pid
        self.config = config
        self.control = socket.socket(fileno=config["control"])
        self.status: int | None = None
        self.until = 0.0
        self.asked = False
        self.hurry = True

    async def run(self) -> int:
        import asyncio

        from botlease.stores.inbox import open_inbox
        from botlease.telegram.gateway import Gateway
        from botlease.work.reaper import Inbox

        loop = self.loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.messages = Inbox(self.control)
        self.gateway: Gateway = Gateway(
            self.config["upstream"],
            open_inbox(self.config["database"]),
            lambda text: self.tell(say=text),
            delete_webhook=self.config["delete_webhook"],
        )
        for number in FORWARDED:
            loop.add_signal_handler(number, self.forward, number)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signalled, number)
        loop.add_signal_handler(signal.SIGCHLD, self.look)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.control.setblocking(False)
        loop.add_reader(self.control, self.hear)
        self.look()
        await self.gateway.listen(socket.socket(fileno=self.config["listen"]))
        reporting = loop.create_task(self.report())
        await self.ended.wait()
        reporting.cancel()
        assert self.status is not None
        with contextlib.suppress(TimeoutError):
            if self.asked:
                async with asyncio.timeout(max(0.5, self.until - clock.now())):
                    # not 128 + n: so end wrappers whose program was killed
                    await self.gateway.finish(clean=self.status == 0)
            else:  # the bot is about to be started again: it need not wait for the last poll
                async with asyncio.timeout(2.0):
                    await self.gateway.flush()
        self.tally()
        await self.gateway.close()
        return self.status

    # The bot -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 70 << 8
        if pid and self.status is None:
            self.status = os.waitstatus_to_exitcode(status)
            self.ended.set()

    def forward(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def signalled(self, number: int) -> None:
        """A stop signal from elsewhere: from a platform that signals everything in the container, the bot included. It
        is not signalled a second time (many take that for "at once") before it has had its time."""
        self.gateway.signalled()
        self.begin_to_stop(number, clock.now() + UNANNOUNCED, hurry=False)

    def begin_to_stop(self, number: int, until: float, *, hurry: bool) -> None:
        self.until = max(self.until, until)
        self.hurry = self.hurry and hurry
        if not self.asked:
            self.asked = True
            self.draining = self.loop.create_task(self.drain(number))

    async def drain(self, number: int) -> None:
        import asyncio

        from botlease.work.reaper import MOMENT

        began, hurry = clock.now(), self.hurry
        await self.gateway.drain(self.until, hurry=hurry)
        if hurry:
            await asyncio.sleep(began + MOMENT - clock.now())
            if not self.hurry:  # it came meanwhile
                await self.gateway.drain(self.until, hurry=False)
        self.forward(number)

    # The supervisor ------------------------------------------------------------------------------------------------

    def hear(self) -> None:
        from botlease.stores.inbox import Holding

        messages = self.messages.receive()
        if messages is None:
            self.loop.remove_reader(self.control)  # the supervisor is gone: the reaper is about to kill us
            return
        for message in messages:
            match message["do"]:
                case "term":
                    holding = Holding(self.config["bot"], message["term"], message["nonce"])
                    self.gateway.begin(holding, message["until"])
                case "arm":
                    self.gateway.arm(message["until"])
                case "drain":
                    self.begin_to_stop(message["number"], message["until"], hurry=True)

    def tell(self, **message: Any) -> None:
        from botlease.work.reaper import send

        with contextlib.suppress(OSError):  # full, or nobody is there: it is only for people
            send(self.control, message)

    def tally(self) -> None:
        now = clock.now()
        tallies = {
            api: {
                "heard": now - t.deaf,
                "waiting": t.waiting,
                "in_hand": t.in_hand,
                "repeated": t.repeated,
                "set_aside": t.set_aside,
                "conflicts": t.conflicts,
                "webhook": t.webhook,
            }
            for api, t in self.gateway.report().items()
        }
        self.tell(say="", tallies=tallies)

    async def report(self) -> None:
        import asyncio

        while True:
            await asyncio.sleep(2.0)
            self.tally()
