"""What the Bot API server does with one bot's updates, as its published source says.

Facts and line numbers: tdlib/telegram-bot-api 10.0, ``Client.cpp``, and td's ``TQueue.cpp``. The newest long
poll wins and the *older* one gets the 409; a poll conflicts only while it is held; an abandoned poll is not
noticed; confirmation is by offset alone and at once.

No network here: :mod:`.simulator` puts HTTP in front.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from botlease.telegram.arguments import integer

OTHER = "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running"
BY_WEBHOOK = "Conflict: terminated by setWebhook request"
WEBHOOK_ACTIVE = (
    "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
)
DEFAULT_EXCLUDES = frozenset({"chat_member", "message_reaction", "message_reaction_count"})


class Profile(StrEnum):
    """How conflicts are decided. The source's way, and two harsher ones that users report."""

    SOURCE = "source"
    H1 = "h1"  # a held or abandoned poll makes the newer request fail until its time-out has ended
    H2 = "h2"  # both fail


class ApiError(Exception):
    def __init__(self, code: int, description: str, parameters: dict[str, Any] | None = None) -> None:
        super().__init__(description)
        self.code, self.description, self.parameters = code, description, parameters


@dataclass(eq=False)
class Poll:
    """One getUpdates that is held."""

    offset: int
    limit: int
    deadline: float
    alive: Callable[[], bool]
    answer: asyncio.Future[list[dict[str, Any]]]
    woken: bool = False


@dataclass
class Counters:
    conflicts_live: int = 0  # 409s that a client received
    conflicts_dead: int = 0  # 409s into a closed connection: harmless


@dataclass
class Bot:
    """All that the server keeps for one token. ``now`` and ``sleep`` are injected: tests run faster than life."""

    bot_id: int
    now: Callable[[], float]
    sleep: Callable[[float], Any]
    profile: Profile = Profile.SOURCE
    rng: random.Random = field(default_factory=random.Random)
    queue: dict[int, dict[str, Any]] = field(default_factory=dict)
    tail: int = 0  # the id the next update gets; 0: no update yet
    prev_offset: int = -1
    prev_start: float = -1e9
    next_conflict: float = -1e9
    next_set_webhook: float = -1e9
    held: Poll | None = None
    webhook_url: str = ""
    allowed: list[str] | None = None
    counters: Counters = field(default_factory=Counters)
    on_confirm: Callable[[list[int]], None] = lambda ids: None
    on_deliver: Callable[[list[int], Callable[[], bool]], None] = lambda ids, alive: None

    # getUpdates (Client.cpp 15700-15724, 16321-16404) ---------------------------------------------------------------

    async def get_updates(self, args: dict[str, Any], alive: Callable[[], bool]) -> list[dict[str, Any]]:
        if self.webhook_url:
            await self._fail(alive, WEBHOOK_ACTIVE)
        now = self.now()
        offset = integer(args.get("offset"), 0)
        limit = min(max(integer(args.get("limit"), 100), 1), 100)
        timeout = float(min(max(integer(args.get("timeout"), 0), 0), 50))
        if args.get("allowed_updates") is not None:
            self.allowed = list(args["allowed_updates"]) or None
        # The same offset again within 3 s is promoted to a long poll (15714-15719).
        if offset == self.prev_offset and timeout < 3 and now < self.prev_start + 3.0:
            timeout = 3.0
        if offset == self.prev_offset and now < self.prev_start + 0.5:
            limit = 1
        self.prev_offset, self.prev_start = offset, now
        if self.profile is not Profile.SOURCE and self.held is not None:
            if self.held.deadline <= now:
                self.held = None
            else:
                if self.profile is Profile.H2:
                    self._evict(OTHER)
                await self._fail(alive, OTHER)
        updates = self._take(offset, limit)
        if updates or not timeout:
            self.on_deliver([u["update_id"] for u in updates], alive)
            return updates
        if self.held is not None:
            self._evict(OTHER)
        poll = Poll(offset, limit, now + timeout, alive, asyncio.get_running_loop().create_future())
        self.held = poll
        return await self._hold(poll)

    def _take(self, offset: int, limit: int) -> list[dict[str, Any]]:
        if offset < 0:
            keep = sorted(self.queue)[offset:]
            for update_id in [i for i in self.queue if i not in keep]:
                del self.queue[update_id]
        head = min(self.queue, default=self.tail)
        if offset <= 0:
            offset = head
        if not self.tail or offset > self.tail + 10 or offset < head - 100_000:
            offset = head  # nothing is confirmed
        else:
            confirmed = [i for i in self.queue if i < offset]
            for update_id in confirmed:
                del self.queue[update_id]
            if confirmed:
                self.on_confirm(confirmed)
        return [self.queue[i] for i in sorted(i for i in self.queue if i >= offset)[:limit]]

    async def _hold(self, poll: Poll) -> list[dict[str, Any]]:
        while not poll.answer.done():
            left = poll.deadline - self.now()
            if left <= 0:
                if self.held is poll:
                    self.held = None
                    poll.answer.set_result(self._take(poll.offset, poll.limit))
                elif not poll.answer.done():
                    poll.answer.set_result([])
                break
            waiter = asyncio.ensure_future(self.sleep(left))
            await asyncio.wait({waiter, poll.answer}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
        try:
            updates = poll.answer.result()
        except ApiError as e:
            await self._fail(poll.alive, e.description)
            raise
        self.on_deliver([u["update_id"] for u in updates], poll.alive)
        return updates

    def _evict(self, description: str) -> None:
        """abort_long_poll: the older query fails (16225-16236)."""
        poll, self.held = self.held, None
        if poll is not None and not poll.answer.done():
            poll.answer.set_exception(ApiError(409, description))

    async def _fail(self, alive: Callable[[], bool], description: str) -> None:
        """fail_conflict (16238-16252): at most one at once, the others after 3 s."""
        now = self.now()
        if now >= self.next_conflict:
            self.next_conflict = now + 3.0
        else:
            await self.sleep(3.0)
        if alive():
            self.counters.conflicts_live += 1
        else:
            self.counters.conflicts_dead += 1
        raise ApiError(409, description)

    # Updates -----------------------------------------------------------------------------------------------------

    def push(self, kind: str, payload: dict[str, Any]) -> int | None:
        """A new update; None if its type is not wanted (decided when it is made, 16970-16978)."""
        wanted = kind in self.allowed if self.allowed is not None else kind not in DEFAULT_EXCLUDES
        if not wanted:
            return None
        if not self.tail:
            self.tail = self.rng.randint(2_000_001, 1_000_000_000)
        update_id, self.tail = self.tail, self.tail + 1
        self.queue[update_id] = {"update_id": update_id, kind: payload}
        poll = self.held
        if poll is not None and not poll.woken and not self.webhook_url:
            poll.woken = True
            asyncio.ensure_future(self._wake(poll))  # noqa: RUF006 - it ends within 2 ms
        return update_id

    async def _wake(self, poll: Poll) -> None:
        await self.sleep(0.001)  # LONG_POLL_WAIT_AFTER: what comes within a millisecond goes along
        if self.held is poll:
            self.held = None
            poll.answer.set_result(self._take(poll.offset, poll.limit))

    # Webhooks (15700 and following) --------------------------------------------------------------------------------

    async def set_webhook(self, args: dict[str, Any]) -> tuple[bool, str]:
        url = str(args.get("url") or "")
        if str(args.get("drop_pending_updates", "")).lower() in ("true", "yes", "1"):
            self.on_confirm([])
            self.queue.clear()
        if not url:
            was, self.webhook_url = self.webhook_url, ""
            return True, "Webhook was deleted" if was else "Webhook is already deleted"
        if not url.startswith("https://"):
            raise ApiError(400, "Bad Request: bad webhook: An HTTPS URL must be provided for webhook")
        if self.now() < self.next_set_webhook:
            raise ApiError(429, "Too Many Requests: retry after 1", {"retry_after": 1})
        self.next_set_webhook = self.now() + 1.0
        same, self.webhook_url = self.webhook_url == url, url
        self._evict(BY_WEBHOOK)
        return True, "Webhook is already set" if same else "Webhook was set"

    def webhook_info(self) -> dict[str, Any]:
        return {
            "url": self.webhook_url,
            "has_custom_certificate": False,
            "pending_update_count": len(self.queue),
            **({"allowed_updates": self.allowed} if self.allowed else {}),
        }
