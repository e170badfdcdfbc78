"""Where a fault happens, and whom it is for; how one is made known."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg
from cgroups import has_cgroups
from netns import has_netns, is_the_root

from botlease import clock
from soak.agreement import Harm
from soak.deployments import Deployment, Host, World
from soak.oracle import Oracle

Fault = Callable[["Scene"], Awaitable[bool | None]]
"""False where there was nothing to do it to: it does not count."""
KINDS: dict[str, tuple[Fault, Callable[[World], bool]]] = {}
LEASHED_WITHIN = 1.0
"""Seconds from the start of a bot to the second renewal at a ttl of 1.5, for which 0.6 are enough."""
NOT_DONE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The database did not do it. The last two are no PostgresError: a connection that another fault ends under a query."""


def postgres(w: World) -> bool:
    return w.store == "postgres"


def sqlite(w: World) -> bool:
    return w.store == "sqlite"


def cgroups(w: World) -> bool:
    return has_cgroups()


def netns(w: World) -> bool:
    return postgres(w) and has_netns()


def fault(*needs: Callable[[World], bool]) -> Callable[[Fault], Fault]:
    def add(function: Fault) -> Fault:
        KINDS[function.__name__] = (function, lambda w: all(n(w) for n in needs))
        return function

    return add


def possible(w: World) -> list[str]:
    return [name for name, (_, can) in KINDS.items() if can(w)]


@dataclass
class Scene:
    """The world, and whom this fault is for."""

    world: World
    oracle: Oracle
    rng: random.Random

    def whom(self, can: Callable[[Deployment], bool] = lambda d: True) -> Deployment:
        """Mostly the one at work; of those that can."""
        self.oracle.read()
        living = [d for d in self.world.deployments if d.tree()] or self.world.deployments
        living = [d for d in living if can(d)] or living
        working = [d for d in living if not d.retired and self.works(d)]
        return self.rng.choice(working if working and self.rng.random() < 0.7 else living)

    def works(self, d: Deployment) -> bool:
        """By the term that it says it works in: the name of whoever works is in the logs of those that wait, too, and
        two of three faults for the holder were done to one of them."""
        latest = max(self.oracle.works.values(), key=lambda w: w.last, default=None)
        with contextlib.suppress(OSError):
            return latest is not None and f"active: term {latest.term}," in d.log.read_text()
        return False

    def unleashed(self, d: Deployment) -> bool:
        """The kernel does not hold all of it: what has just daemonised is seen with the next renewal, and whoever has
        another user is beyond the signals of a user namespace's root."""
        begun = True  # the bot, a moment ago: that would be the last that its log says
        with contextlib.suppress(OSError):
            begun = clock.wall() - d.log.stat().st_mtime < LEASHED_WITHIN
        t = d.traits
        return d.escapes and (t.spawns > 0 or (t.daemon and begun) or (t.user and not is_the_root()))

    def host(self) -> Host:
        return self.whom().host

    @property
    def while_(self) -> float:
        """How long: from a hiccup to three ttl."""
        return self.rng.choice((0.3, 0.8, 1.1, 1.5, 2.0, 3.0)) * self.world.ttl

    async def wait(self) -> None:
        await asyncio.sleep(self.while_)

    def harms(self, kind: str) -> None:
        """What follows leaves this in the database (:class:`soak.agreement.Harm`)."""
        self.oracle.read()
        self.world.harms.append(Harm(kind, self.oracle.highest))

    async def sql(self, *statements: str) -> list[tuple[object, ...]] | None:
        """As an operator, past everything. The rows of the last one; None where the database did not do it."""
        rows: list[tuple[object, ...]] | None = None
        if self.world.primary is None:

            def run() -> list[tuple[object, ...]]:
                out: list[tuple[object, ...]] = []
                db = sqlite3.connect(f"file:{self.world.file}?mode=rw", uri=True, timeout=2, isolation_level=None)
                try:
                    for s in statements:
                        out = db.execute(s).fetchall()
                finally:
                    db.close()
                return out

            with contextlib.suppress(sqlite3.Error):
                rows = await asyncio.to_thread(run)
            return rows
        with contextlib.suppress(*NOT_DONE):
            c = await asyncpg.connect(self.world.direct, timeout=3, command_timeout=3)
            try:
                done = [await c.fetch(s) for s in statements]
                rows = [tuple(r) for r in done[-1]]
            finally:
                await c.close(timeout=2)
        return rows

    async def live_instances(self) -> list[str]:
        rows = await self.sql("SELECT instance_id FROM bot_instances WHERE ended_at IS NULL")
        return sorted(str(r[0]) for r in rows or [])
