"""The term, as the gateway sees it: what may leave, and until when."""

from __future__ import annotations

import asyncio

from botlease import clock
from botlease.stores.inbox import Holding


class Bell:
    """Rings for everybody who listens at that moment. Take :meth:`heard` before looking, and no ring is missed."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring(self) -> None:
        rung, self._next = self._next, asyncio.get_running_loop().create_future()
        rung.set_result(None)

    def heard(self) -> asyncio.Future[None]:
        """Shared: it must not be cancelled."""
        return self._next


class Term:
    """What the gateway may do, and until when. Shared by everything in it."""

    def __init__(self) -> None:
        self.holding: Holding | None = None
        self.until = 0.0
        self.over = False
        self.begun = asyncio.Event()
        self.changed = Bell()

    def begin(self, holding: Holding, until: float) -> None:
        self.holding, self.until = holding, until
        self.begun.set()
        self.arm(until)

    def arm(self, until: float) -> None:
        self.until = until
        self.changed.ring()

    def end(self) -> None:
        self.over = True
        self.changed.ring()

    @property
    def remaining(self) -> float:
        return 0.0 if self.over or self.holding is None else max(0.0, self.until - clock.now())

    def may(self) -> bool:
        """Whether a request may leave. Before the term only what reads does; the gateway sees to that."""
        return not self.over and (self.holding is None or clock.now() < self.until)
