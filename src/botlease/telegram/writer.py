"""Writing down what happens to a token's updates: changes come together, and one transaction writes them all.

Whoever needs something to be durable waits for :meth:`Writer.save`. A write that failed is tried again with whatever
has come meanwhile; its outcome may be unknown, and doing it twice does no harm (a count may be too high).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from botlease import clock
from botlease.stores import StoreError
from botlease.stores.inbox import Begun, Changes, Inbox
from botlease.telegram.term import Term
from botlease.telegram.upstream import Fenced

ATTEMPT: Final = 5.0
"""Seconds for one call of the inbox. Nothing of the lease waits for it."""


class Writer:
    """``state`` fills in what is true at the moment of writing."""

    def __init__(
        self, api: str, term: Term, inbox: Inbox, say: Callable[[str], None], state: Callable[[Changes], None]
    ) -> None:
        self.changes = Changes()
        self.saved_at = -1e9
        self._api, self._term, self._inbox, self._say, self._state = api, term, inbox, say, state
        self._lock = asyncio.Lock()
        self._written = self._wanted = 0
        self._failed = False
        self._soon: asyncio.Task[None] | None = None

    async def begin(self) -> Begun:
        """Take over for this term. Raises :class:`Fenced` if a later one has begun."""
        pause = 0.2
        holding = self._term.holding
        assert holding is not None
        while True:
            if self._term.over:
                raise Fenced
            try:
                begun = await self._inbox.begin(holding, self._api, ATTEMPT)
            except StoreError as e:
                self._complain(f"the inbox cannot be read: {e}")
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
                continue
            self._failed = False
            if begun is None:
                self._say("a later term of this bot has begun with the inbox: nothing passes here any more")
                self._term.end()
                raise Fenced
            return begun

    async def save(self) -> None:
        """Until everything that was in :attr:`changes` is durable. Raises :class:`Fenced`."""
        self._wanted += 1
        wanted, pause = self._wanted, 0.1
        while self._written < wanted:
            async with self._lock:
                if self._written >= wanted:
                    return
                if await self._write():
                    return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    async def _write(self) -> bool:
        holding = self._term.holding
        if holding is None or self._term.over:
            raise Fenced
        changes, self.changes = self.changes, Changes()
        self._state(changes)
        upto = self._wanted
        try:
            ours = await self._inbox.save(holding, self._api, changes, ATTEMPT)
        except StoreError as e:
            self._merge(changes)
            self._complain(f"the inbox cannot be written: {e}; nothing is confirmed to the Bot API until it is")
            return False
        except BaseException:
            self._merge(changes)
            raise
        if not ours:
            # A later term has begun. Or the inbox was deleted under us: then it can be begun anew.
            self._merge(changes)
            await self.begin()
            return False
        self._failed = False
        self._written, self.saved_at = upto, clock.now()
        return True

    def _complain(self, text: str) -> None:
        if not self._failed:
            self._say(text)
        self._failed = True

    def _merge(self, failed: Changes) -> None:
        later = self.changes
        self.changes = replace(
            later,
            received=failed.received + later.received,
            given=failed.given + later.given,
            returned=failed.returned + later.returned,
            done=failed.done + later.done,
            allowed=later.allowed if later.allowed is not None else failed.allowed,
            polled=failed.polled or later.polled,
            conflicts=failed.conflicts + later.conflicts,
            repeated=failed.repeated + later.repeated,
            set_aside=failed.set_aside + later.set_aside,
        )

    def save_soon(self) -> None:
        """What is done need not be durable before anything else happens."""
        if self._soon is None or self._soon.done():
            self._soon = asyncio.ensure_future(self.flush())

    async def flush(self) -> None:
        """Until what is done is durable, or never will be."""
        with contextlib.suppress(Fenced):
            while True:
                async with self._lock:
                    pass  # one that is under way
                if not self.changes.done:
                    return
                await self.save()

    def cancel(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
