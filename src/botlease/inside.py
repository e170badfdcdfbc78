"""Inside a Python program: ``async with botlease.active(...)`` and ``@botlease.exclusive(...)``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from botlease import __version__, clock, presence, settings
from botlease.core import Candidate
from botlease.keeper import Keeper, log
from botlease.model import Mode, Reason
from botlease.settings import Settings
from botlease.stores import Registration, Store, open_store
from botlease.text import safe
from botlease.work.body import BodyWork, Share

P = ParamSpec("P")
T = TypeVar("T")


class LeaseLost(Exception):
    """The term is over: another instance may act from now on."""


class Term:
    """One unbroken hold of the lease."""

    def __init__(self, number: int, bot: str, instance_id: str, work: BodyWork | Share, database: str = "") -> None:
        self.number = number
        """The fencing token: it only ever rises. Write it beside what you write, and refuse lower ones."""
        self.bot = bot
        self.instance_id = instance_id
        self.database = database
        """The URL of the lease's database, which may hold a password."""
        self.work = work
        """For the parts of botlease that serve this term."""
        self._over = False
        self._pid = os.getpid()

    @property
    def remaining(self) -> float:
        """Seconds for which the term can be trusted if no further renewal succeeds; 0 when it is over, and in every
        process that this one forks: nobody renews there, and no fence of the kernel ends it."""
        if self._over or os.getpid() != self._pid:
            return 0.0
        return max(0.0, self.work.until - clock.now())

    @property
    def in_danger(self) -> bool:
        """True while renewals fail and the end of trust comes nearer: open nothing new, finish what is open."""
        return self.remaining <= 0 or self.work.in_danger

    def check(self) -> None:
        """Raise :class:`LeaseLost` if the term is over. Synchronous and cheap (no I/O): call it before each
        action that must not be done twice. It cannot recall an action that is already on its way."""
        if self.remaining <= 0:
            raise LeaseLost(f"term {self.number} of {self.bot} is over")


def _registration(s: Settings, bot: str, instance_id: str) -> Registration:
    host = s.host or socket.gethostname()
    return Registration(instance_id, bot, s.deployment, host, os.getpid(), __version__, s.timing.ttl)


def _say(text: str) -> None:
    log.info("%s", safe(text))  # a row must not write lines of its own into a program's log


class Session:
    """Settings, store and keeper of an in-process instance."""

    def __init__(self, name: str | None, options: dict[str, Any]) -> None:
        self.warn: Callable[[bool], object] | None = options.pop("on_danger", None)
        self.settings = settings.make(os.environ, name=name, pid=os.getpid(), **options)
        if self.settings.barred:
            raise settings.ConfigurationError(f"refused to become active: {self.settings.barred}")
        self.store: Store = open_store(self.settings.database)

    def announced(self) -> contextlib.AbstractContextManager[object]:
        s = self.settings
        return presence.announced(s.bot, s.instance_id, s.timing.stop_grace, os.environ)

    async def open(self, work: BodyWork) -> Keeper:
        s = self.settings
        try:
            await self.store.open(max(5.0, s.timing.attempt))
            return self.keeper(work, s.bot, s.instance_id)
        except BaseException:  # whoever tries until it is there would leave a kernel timer, and a thread, each time
            work.close()
            await self.store.aclose()
            raise

    @property
    def mode(self) -> Mode:
        """A program waits for its turn; only a start at the command line is refused when another one runs."""
        return Mode.WAIT if self.settings.mode is Mode.REFUSE else self.settings.mode

    def keeper(self, work: BodyWork, bot: str, instance_id: str) -> Keeper:
        s = self.settings
        me = Candidate(instance_id, self.mode, leaves=s.leaves)
        return Keeper(self.store, _registration(s, bot, instance_id), me, s.timing, work, say=_say)


_stops: list[Callable[[], None]] = []
"""Whom a stop signal of this process concerns: several instances may live in one program."""
_former: dict[int, Any] = {}


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT stop every instance of this program; the former handlers come back with the last one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    if not _stops:
        for number in (signal.SIGTERM, signal.SIGINT):
            _former[number] = signal.getsignal(number)
            loop.add_signal_handler(number, _stop_all)
    _stops.append(stop)
    try:
        yield
    finally:
        _stops.remove(stop)
        if not _stops:
            for which, handler in _former.items():
                loop.remove_signal_handler(which)
                signal.signal(which, signal.SIG_DFL if handler is None else handler)


def _stop_all() -> None:
    for stop in list(_stops):
        stop()


def _forked() -> None:
    """In a child that the program forked (the workers of ``multiprocessing`` are some). Up to Python 3.11 its signals
    would go down the pipe to the parent's loop: whoever terminates a worker would stop the instance, and the worker
    would not hear it."""
    if _stops:
        signal.set_wakeup_fd(-1)
        for number, handler in _former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _stops.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


async def outlast(*tasks: asyncio.Future[Any]) -> bool:
    """Wait until they are done, whoever cancels the waiting: what they end must not go on behind our back. Returns
    whether somebody did."""
    cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


class active:
    """Hold the lease for the body of an ``async with``: one term.

    Entering waits until this instance is assigned and holds the lease. When the term ends early (a newer
    deployment, the operator, no database) the body is cancelled, and :class:`LeaseLost` is raised at its end.

    Args:
        name: the bot; by default ``$BOTLEASE_NAME``, else the digits of its Telegram token, else ``bot``: name it
            where several bots share a database.
        database: a URL; by default ``BOTLEASE_DATABASE_URL``, ``DATABASE_URL``, or SQLite in the user's state folder.
        ttl, stop_grace, lock_delay, probation: seconds. deployment: the key of the release. take_over, standby: as the
            flags.
        on_danger: called from the event loop with True when renewals fail and the end of trust comes nearer ("open no
            new orders"), and with False when they succeed again.

    Raises:
        ConfigurationError: settings that cannot work, or an environment that BOTLEASE_ENVIRONMENT does not allow (wait
            there, or end with 0, as your platform needs it). StoreError: the database cannot be used.
    """

    def __init__(self, name: str | None = None, **options: Any) -> None:
        self._session = Session(name, options)
        self._task: asyncio.Task[Any] | None = None
        self._why: Reason | None = None
        self._cancelling = 0
        self._exit = contextlib.ExitStack()

    async def __aenter__(self) -> Term:
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._work = BodyWork(begun.set_result, self._cancel, self._session.warn)
        self._keeper = await self._session.open(self._work)
        self._running = asyncio.ensure_future(self._keeper.run())
        self._running.add_done_callback(self._keeper_ended)
        self._exit.enter_context(stop_signals(self._keeper.stop))
        self._exit.enter_context(self._session.announced())
        try:
            both: set[asyncio.Future[Any]] = {self._running, begun}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not begun.done():
                raise LeaseLost(f"stopped before its turn came: {self._running.result()}")
        except BaseException as e:
            await self._finish()
            if self._cancelled_by_us(e):  # its turn came, and was over before the body began
                raise LeaseLost(f"the term of {self._session.settings.bot} ended: {self._why}") from e
            raise
        s = self._session.settings
        self.term = Term(begun.result(), s.bot, s.instance_id, self._work, s.database)
        return self.term

    def _cancel(self, reason: Reason) -> None:
        if self._why is None and self._task is not None:
            self._why = reason
            self._task.cancel()

    def _keeper_ended(self, running: asyncio.Future[Reason]) -> None:
        """A bug of ours ended it. Nobody renews any more: better to cancel the body than to wait for the fence."""
        if not running.cancelled() and running.exception() is not None:
            self._cancel(Reason.LOST)

    async def _finish(self, *, done: bool = False) -> None:
        self._work.ended(done=done)
        if not self._running.done():
            self._keeper.stop()
        cancelled = await outlast(self._running)
        # Not before: to remove the note may take as long as the disk is busy, and somebody waits for the lease.
        self._exit.close()
        self._work.close()
        await self._session.store.aclose()
        if not self._running.cancelled():
            self._running.result()  # a bug of ours is told
        if cancelled and self._why is None:  # not by us
            raise asyncio.CancelledError

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.term._over = True
        if os.getpid() != self.term._pid:
            return  # a fork leaves the body: what is given back here is the parent's
        await self._finish(done=e is None)
        if self._cancelled_by_us(e):
            raise LeaseLost(f"term {self.term.number} of {self.term.bot} ended: {self._why}") from e

    def _cancelled_by_us(self, e: BaseException | None) -> bool:
        """Like asyncio.timeout: our own cancellation becomes our own exception, a user's stays what it is."""
        ours = self._why is not None and self._task is not None and self._task.uncancel() <= self._cancelling
        return ours and isinstance(e, asyncio.CancelledError)


def exclusive(
    name: str | None = None, **options: Any
) -> Callable[[Callable[[Term], Awaitable[T]]], Callable[[], Awaitable[T | None]]]:
    """Run a coroutine whenever this instance holds the lease: standby, run, drain, standby, until it returns
    or a stop signal arrives. The function gets the :class:`Term`; the options are those of :class:`active`.

    Returns the function's result, or None after a stop signal. Raises :class:`LeaseLost` if a copy of this process (a
    machine restored from a snapshot) renews under its name.
    """

    def wrap(function: Callable[[Term], Awaitable[T]]) -> Callable[[], Awaitable[T | None]]:
        @functools.wraps(function)
        async def run() -> T | None:
            session = Session(name, dict(options))
            loop = asyncio.get_running_loop()
            task: asyncio.Task[T] | None = None
            outcome: list[T] = []
            error: list[BaseException] = []
            term: Term | None = None

            def begin(number: int) -> None:
                nonlocal task, term
                s = session.settings
                term = Term(number, s.bot, s.instance_id, work, s.database)
                task = loop.create_task(call(term))
                task.add_done_callback(over)

            async def call(t: Term) -> T:
                return await function(t)

            def over(done: asyncio.Task[T]) -> None:
                assert term is not None
                term._over = True
                if done.cancelled():
                    pass
                elif done.exception() is not None:
                    error.append(done.exception() or RuntimeError())
                else:
                    outcome.append(done.result())
                work.ended(done=bool(outcome))

            def cancel(reason: Reason) -> None:
                if task is not None:
                    task.cancel()

            work = BodyWork(begin, cancel, session.warn)
            keeper = await session.open(work)
            running = asyncio.ensure_future(keeper.run())
            try:
                with stop_signals(keeper.stop), session.announced():
                    await asyncio.shield(running)
            finally:
                if task is not None and not task.done():
                    task.cancel()
                    await outlast(task)
                if not running.done():  # we were cancelled: the lease is given back all the same
                    keeper.stop()
                    await outlast(running)
                work.close()
                await session.store.aclose()
            if error:
                raise error[0]
            if running.result() is Reason.COPIED:
                raise LeaseLost(f"a copy of this process holds the lease of {session.settings.bot}: start it again")
            return outcome[0] if outcome else None

        return run

    return wrap
