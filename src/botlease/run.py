"""``botlease run``: supervise a command as the work of one instance."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Coroutine, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from botlease import __version__, clock, status
from botlease.core import Candidate, Phase
from botlease.keeper import Keeper
from botlease.model import TRIES, Probation, Reason
from botlease.settings import Settings
from botlease.stderr import Lines
from botlease.stores import Registration, Store, StoreError, StoreRefused, open_store, unanswered
from botlease.text import safe
from botlease.value import value
from botlease.work import tree
from botlease.work.child import ChildWork, Command, Front

if TYPE_CHECKING:
    from botlease.web.health import Snapshot  # its HTTP parser is loaded only where a port is asked for
    from botlease.work.pulse import Rule

AFTER_A_RELEASE = 0.05
"""Seconds that a supervisor which had the lease and was told to stop waits before it tidies up. On one host its
successor starts the bot just now, and closing connections, reaping and ending take 3 to 7 ms of both processors
(measured: 1 to 3 ms of a handover of 20, in which nobody works)."""
FORWARDED = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class Exit(IntEnum):
    """Exit codes of our own, from sysexits.h where it has one. Otherwise the bot's own code is passed through
    (128 + n when signal n killed it; 0 when it ended by the very stop signal it was sent)."""

    OK = 0
    USAGE = 2  # click's: an unknown option, a missing command
    UNAVAILABLE = 69  # the database cannot be reached
    FAILED = 70  # the bot made no progress, or ended within its probation although with exit code 0
    REFUSED = 75  # another instance is running; try again later, or use --take-over or --standby
    CONFIG = 78  # settings or a database that cannot work
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127


@value
class Options:
    argv: tuple[str, ...]
    pass_database: bool = False
    max_crashes: int = 5
    wait_database: float = 0.0
    health_port: int | None = None
    health_host: str | None = "127.0.0.1"
    warm: bool = False
    ahead: bool = True
    """The interpreter of a Python bot is started while it stands by."""
    healthy_if: Rule | None = None
    danger: tuple[int, ...] = ()
    gateway: str | None = None
    """The address of the Bot API, where it is to be served to the bot."""
    delete_webhook: bool = False


_lines: Lines | None = None


def say(text: str) -> None:
    """One line of ours on standard error; the bot's own output is inherited and never passes through us."""
    global _lines
    _lines = _lines or Lines()
    _lines.write(safe(text))


def has_terminal() -> bool:
    """Whether a SIGHUP says that it was closed; without one it is the bot's, for which it may mean "read your
    configuration again"."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def child_environment(env: Mapping[str, str], database: str, pass_database: bool) -> dict[str, str]:
    """The bot gets everything but the lease's own database: what it does not have it cannot leak."""
    # nor what an outer supervisor said to us about a term and a gate of its own
    ours = ("BOTLEASE_DATABASE_URL", "BOTLEASE_TERM", "BOTLEASE_GATE_FD", "BOTLEASE_GATE_URL", "BOTLEASE_API_URL")
    out = {k: v for k, v in env.items() if k not in ours}
    if pass_database:
        out["BOTLEASE_DATABASE_URL"] = database
    return out


class Supervisor:
    def __init__(self, settings: Settings, options: Options, reaper: tuple[int, socket.socket]) -> None:
        self.settings = settings
        self.options = options
        self.reaper = reaper
        self.keeper: Keeper | None = None
        self.work: ChildWork | None = None
        self.stopping = asyncio.Event()
        self.began = clock.now()
        self.idle = False
        self.quarantined = False

    async def run(self) -> int:
        s, o = self.settings, self.options
        self._handle_signals()
        server = None
        if o.health_port is not None:
            from botlease.web.health import serve

            try:
                server = await serve(self.snapshot, o.health_port, host=o.health_host, window=s.platform.health_window)
            except (OSError, UnicodeError) as e:  # a host name that cannot be one
                why = getattr(e, "strerror", None) or "no such address"
                say(f"cannot listen on port {o.health_port}: {why}: choose another --health-port")
                return Exit.CONFIG
        try:
            if s.barred:
                # Ended with an error it would be restarted for ever; healthy and idle it harms nobody.
                say(f"refused to become active: {s.barred}; idle until it is stopped")
                _all_is_loaded()
                await self.stopping.wait()
                return Exit.OK
            from botlease.presence import announced

            with announced(s.bot, s.instance_id, s.timing.stop_grace, os.environ):
                return await self._with_work()
        finally:
            if server is not None:
                server.close()

    async def _with_work(self) -> int:
        """What is to run is told to the reaper first: while the store is loaded and opened, it is started ahead."""
        s, o = self.settings, self.options
        with contextlib.ExitStack() as stack:
            gate, front, pulse = None, None, None
            if o.warm:
                from botlease.web.gate import GateServer

                gate = GateServer()
                try:
                    await gate.listen()
                except OSError as e:
                    say(f"cannot listen on 127.0.0.1 for the gate: {e.strerror}")
                    return Exit.UNAVAILABLE
                stack.callback(gate.close)
            if o.gateway is not None:
                try:
                    front = Front(o.gateway, s.database, o.delete_webhook, _loopback())
                except OSError as e:
                    say(f"cannot listen on 127.0.0.1 for the gateway: {e.strerror}")
                    return Exit.UNAVAILABLE
                stack.callback(front.listen.close)
            if o.healthy_if is not None:
                from botlease.work.pulse import Pulse

                pulse = Pulse(o.healthy_if)
                stack.callback(pulse.rest)
            command = Command(
                o.argv,
                child_environment(os.environ, s.database, o.pass_database),
                s.bot,
                s.instance_id,
                max_crashes=o.max_crashes,
                warm=o.warm,
                ahead=o.ahead,
                front=front,
                danger=o.danger,
            )
            self.work = ChildWork(command, *self.reaper, say, pulse=pulse, gate=gate)
            return await self._with_store(self.work)

    async def _with_store(self, work: ChildWork) -> int:
        try:
            store = open_store(self.settings.database)
        except StoreRefused as e:
            work.close()
            say(str(e))
            return Exit.CONFIG
        _all_is_loaded()
        try:
            code = await self._open(store)
            return code if code is not None else await self._keep(store, work)
        finally:
            work.close()  # first: whatever has happened, the bot does not outlive who decides
            await store.aclose()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        for number in FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is under nohup
            loop.add_signal_handler(signal.SIGHUP, self._stop if has_terminal() else self._forward, signal.SIGHUP)
        # Stopped by Ctrl-Z we could not renew, and the bot would be fenced for a slip of the finger.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        # As PID 1 of a container every orphan is ours to bury.
        loop.add_signal_handler(signal.SIGCHLD, tree.reap)

    def _stop(self, number: signal.Signals) -> None:
        if not self.stopping.is_set():
            say(f"{number.name}: stopping")
        self.stopping.set()
        if self.work is not None:
            self.work.stop_signal = number
            if self.keeper is not None and self.keeper.state.phase not in (Phase.WORKING, Phase.DRAINING):
                self.work.exit_code = 0  # how an earlier term ended is no matter of this stop
        if self.keeper is not None:
            self.keeper.stop()

    def _forward(self, number: signal.Signals) -> None:
        if self.work is not None:
            self.work.forward(number)

    async def _open(self, store: Store) -> int | None:
        """Connect, trying for as long as we were told to. An exit code if it cannot be."""
        give_up = clock.now() + self.options.wait_database
        pause = 0.25
        told = False
        while not self.stopping.is_set():
            try:
                await self._unless_stopped(store.open(max(5.0, self.settings.timing.attempt)))
            except StoreRefused as e:
                say(str(e))
                return Exit.CONFIG
            except StoreError as e:
                why = unanswered(e, store.url)
                if clock.now() + pause > give_up:
                    say(why)
                    return Exit.UNAVAILABLE
                if not told:
                    say(f"{why}; trying for {self.options.wait_database:g} s")
                    told = True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), pause)
                pause = min(pause * 2, 4.0)
            else:
                if not self.stopping.is_set():
                    return None
        return Exit.OK

    async def _unless_stopped(self, opening: Coroutine[Any, Any, None]) -> None:
        """A stop does not wait for a server that does not answer, and what comes of the attempt then is no error."""
        asked = asyncio.ensure_future(opening)
        told = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait({asked, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if self.stopping.is_set():
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        else:
            await asked

    async def _keep(self, store: Store, work: ChildWork) -> int:
        s = self.settings
        host = s.host or socket.gethostname()
        me = Registration(s.instance_id, s.bot, s.deployment, host, os.getpid(), __version__, s.timing.ttl)
        candidate = Candidate(s.instance_id, s.mode, self.options.warm, work.pulse is not None, s.leaves)
        self.keeper = Keeper(store, me, candidate, s.timing, work, say)
        work.give_up = lambda: self.keeper.stop(Reason.FAILED) if self.keeper is not None else None
        if self.stopping.is_set():
            self.keeper.stop()
        reason = await self.keeper.run()
        if reason is Reason.STOPPED and self.keeper.state.was_active:
            await asyncio.sleep(AFTER_A_RELEASE)
        if reason is Reason.REFUSED:
            say(await _first(store, s))
            return Exit.REFUSED
        if reason is Reason.COPIED:
            say("somebody else writes under its name (a copy, of a machine restored from a snapshot?): ending")
            return Exit.REFUSED
        if reason is Reason.SUPERSEDED:
            say("the newer deployment has passed its probation: ending")
            return Exit.OK
        if reason in (Reason.FAILED, Reason.UNHEALTHY) and work.exit_code == 0:
            return Exit.FAILED
        return work.exit_code

    def snapshot(self) -> Snapshot:
        from botlease.web.health import Snapshot

        k = self.keeper
        now = clock.now()
        if k is None:
            barred = bool(self.settings.barred)
            word = "barred" if barred else "booting"
            return Snapshot(word, barred, False, 0.0, self.stopping.is_set(), bot=self.settings.bot)
        state = k.state
        if state.view is not None and state.view.lease is not None:  # between two reads there is none
            self.idle = state.view.paused and state.view.lease.holder is None
            self.quarantined = state.view.failures >= TRIES
        # Where the old one lives until we say that we are well, it lives until the probation is over: also while the
        # lease is vacant already, while it is ours and the work has not begun, and while what failed is being stopped.
        # A gate that opens for a moment in between has the old one stopped, who may be needed again.
        waits = (not state.was_active and not self.idle) or state.probation is Probation.ON
        # The database is judged by the attempts that fail, not by how long ago it was asked: a standby asks rarely.
        ready = state.phase is not Phase.JOINING and state.failures < 3
        if self.quarantined and state.phase is Phase.STANDBY:
            ready = False  # no question of the lease: a deployment that failed twice must not replace the old one
        return Snapshot(
            phase=state.label,
            ready=ready,
            leading=state.phase is Phase.WORKING,
            waiting_for=max(0.001, now - self.began) if waits else 0.0,
            stopping=self.stopping.is_set(),
            term=state.term.number if state.term else None,
            bot=self.settings.bot,
            gateway=self.work.gateway(now) if self.work is not None and state.phase is Phase.WORKING else {},
        )


def _all_is_loaded() -> None:
    """Collect garbage from here on (:mod:`botlease.__main__` has put it off). What there is stays for good: no
    collection goes through it, and cools the caches."""
    gc.freeze()
    gc.enable()


def _loopback() -> socket.socket:
    listening = socket.socket()
    try:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening


async def _first(store: Store, s: Settings) -> str:
    """Name the one that runs, and how to end it."""
    cure = "or start this one with --take-over or --standby"
    try:
        bots = status.by_bot(await store.overview(3.0))
    except StoreError:
        return f"another instance of {s.bot} is running: stop it, {cure}"
    for bot in bots:
        if bot["bot"] != s.bot:
            continue
        holder = bot["lease"]["holder"]
        for i in bot["instances"]:
            if i["instance_id"] == holder or (holder is None and i["is_active"]):
                here = i["host"] == socket.gethostname()
                end = f"end it with `kill {i['pid']}`" if here else f"end it on {i['host']} (pid {i['pid']})"
                return (
                    f"refused: {s.bot} is already running: {i['instance_id']}, pid {i['pid']} on {i['host']}, "
                    f"started {str(i['started_at'])[:19]} UTC: {end}, {cure}"
                )
    return f"refused: another instance of {s.bot} was running a moment ago: try again, {cure}"


def supervise(settings: Settings, options: Options, reaper: tuple[int, socket.socket]) -> int:
    """Run until the end. Returns the exit code."""

    async def main() -> int:
        return await Supervisor(settings, options, reaper).run()

    try:
        return asyncio.run(main())
    finally:
        pid, sock = reaper
        sock.close()  # the reaper ends when it reads the end of file
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
