"""Work as a coroutine of this very process, under the same fence.

Cancelling is all that can be done to a coroutine. If it does not end in time the kernel ends the whole
process: that is what the fence is for. Processes which the coroutine starts are its own affair: use
``botlease run`` where there are any.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from botlease import clock
from botlease.model import Event, Reason, WorkEnded
from botlease.work import proof
from botlease.work.fence import Fence

LAST_WORDS = 0.2
"""Seconds a coroutine has to end after it was told that its term is over, before the kernel ends the process."""


class Share:
    """What one of many bots that run under one hold has of it."""

    def __init__(self, body: BodyWork) -> None:
        self._body = body
        self.on_arm: Callable[[float], None] | None = None
        self.settle: Callable[[float], Awaitable[None]] | None = None

    @property
    def until(self) -> float:
        return self._body.until

    @property
    def nonce(self) -> str:
        return self._body.nonce

    @property
    def in_danger(self) -> bool:
        return self._body.in_danger


class BodyWork:
    def __init__(
        self,
        begin: Callable[[int], None],
        cancel: Callable[[Reason], None],
        warn: Callable[[bool], object] | None = None,
    ) -> None:
        self.begin = begin
        self.cancel = cancel
        self.warn = warn
        self.in_danger = False
        self.nonce = ""
        self.on_arm: Callable[[float], None] | None = None
        self.settle: Callable[[float], Awaitable[None]] | None = None
        """Before a drain cancels the coroutine, this may bring what it has in hand to an end; at most until then."""
        self._settling: asyncio.Task[None] | None = None
        self.tell: Callable[[Event], None] = lambda event: None
        self.proof = proof.make((os.getpid(),))
        self.until = 0.0
        self.term = 0
        self.fence = Fence()
        self._running = False
        self._guard = -1
        self._loop = asyncio.get_running_loop()

    def prepare(self) -> None:
        """A program waits for its own turn: there is nothing to warm up."""

    def start(self, term: int, nonce: str, until: float, guard_fd: int | None) -> None:
        self.term, self.nonce, self.until, self._running = term, nonce, until, True
        self._guard = -1 if guard_fd is None else guard_fd
        self.fence.arm(until)
        self.in_danger = False
        self.begin(term)

    def arm(self, until: float) -> None:
        self.until = until
        if self._running:
            self.fence.arm(until)
        if self.on_arm is not None:
            self.on_arm(until)

    def drain(self, until: float, reason: Reason) -> None:
        if not self._running:
            return
        if self.settle is None:
            self.cancel(reason)
        else:
            self._settling = self._loop.create_task(self._cancel_when_settled(self.settle(until), reason))

    async def _cancel_when_settled(self, settled: Awaitable[None], reason: Reason) -> None:
        try:
            await settled
        finally:
            if self._running:
                self.cancel(reason)

    def kill(self, reason: Reason) -> None:
        if self._running:
            self.arm(min(self.until, clock.now() + LAST_WORDS))
            self.cancel(reason)

    def restart(self, hung: bool) -> None:
        """Never asked for: a coroutine reports no health."""

    def danger(self, on: bool) -> None:
        self.in_danger = on
        if self._running and self.warn is not None:
            # The user's code: an error of its own must not end the renewals.
            self._loop.call_soon(self.warn, on)

    def ended(self, *, done: bool = False) -> None:
        """Called by the coroutine's owner when nothing of it runs any more. ``done``: it returned by itself."""
        if not self._running:
            return
        self._running = False
        self.until = 0.0
        self.fence.disarm()
        if self._guard >= 0:
            os.close(self._guard)
        self.tell(WorkEnded(self.term, done))

    def close(self) -> None:
        self.ended()
        self.fence.close()
