"""Which update is handed to whom, and when it counts as done. No I/O, no clock.

One desk for each token. Updates come in when they are stored, go out to whoever polls, and leave when they are done:

* *by offset*: the next poll asks for what comes after them, as the Bot API's own rule says. That is true of frameworks
  that poll again only when they have handled a batch (grammY, Telegraf, node-telegram-bot-api 2);
* *by acknowledgement*, from a hook in the program, where the next poll comes at once (python-telegram-bot, aiogram,
  pyTelegramBotAPI). There an offset only says that the batch has arrived.

An update goes to one poll of a process. It goes out again only if its answer did not arrive: the connection broke
under it, or the same lone poller asks for it once more. Several pollers in one program are told by polls that are open
side by side; from then on an offset finishes only the very batch that it follows: of the others' it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from botlease.stores.inbox import Update

TRIES: Final = 5
"""Processes that may die while they have an update in hand; after that it is set aside. One that kills the bot each
time would otherwise keep it from working for a day."""
SIDE_BY_SIDE: Final = 0.1
"""Seconds for which two polls must be open at once to be those of two pollers: a poller that hangs up and asks anew may
be seen twice for a moment."""


@dataclass(eq=False)
class Poll:
    """One getUpdates of the program that is being served."""

    offset: int
    limit: int
    since: float
    acknowledges: bool = False  # "done" comes from a hook
    batch: tuple[int, ...] = ()


@dataclass(slots=True)
class _Given:
    update: Update
    acknowledges: bool
    batch: tuple[int, ...]
    arrived: bool = False  # a later offset has been asked for: the program has it


@dataclass
class Desk:
    waiting: dict[int, Update] = field(default_factory=dict)
    given: dict[int, _Given] = field(default_factory=dict)
    open: list[Poll] = field(default_factory=list)
    newest: int = -1  # the id that came last
    shut: bool = False
    several: bool = False
    _first: bool = True

    def knows(self, update_id: int) -> bool:
        return update_id in self.waiting or update_id in self.given

    def receive(self, updates: list[Update]) -> None:
        """Take in what was stored, and is not known here."""
        self.waiting |= {u.update_id: u for u in updates}
        if updates:
            self.newest = max(self.newest, updates[-1].update_id) if self._first else updates[-1].update_id

    @property
    def size(self) -> int:
        return len(self.waiting) + len(self.given)

    @property
    def idle(self) -> bool:
        """Nothing is in the program's hands."""
        return not self.given

    @property
    def wanted(self) -> int:
        """How many that come now would go out at once."""
        if self.shut or self.waiting or not self.open or self.open[0].batch:
            return 0
        return self.open[0].limit

    # Polls ---------------------------------------------------------------------------------------------------

    def enter(self, poll: Poll) -> list[int]:
        """A poll has come in. Returns the updates that are done by it."""
        done = self._passed(poll)
        if not self.several and not self._beside(poll):
            self._ask_again(poll)
        self._first = False
        self.open.append(poll)
        return done

    def _beside(self, poll: Poll) -> bool:
        return any(poll.since - other.since >= SIDE_BY_SIDE for other in self.open)

    def _passed(self, poll: Poll) -> list[int]:
        offset = poll.offset
        if offset <= 0 or (self.newest >= 0 and offset > self.newest + 11):
            return []  # the Bot API, too, takes an offset far beyond its queue for none
        done = []
        for i, given in list(self.given.items()):
            if i < offset and (not self.several or offset == given.batch[-1] + 1):
                given.arrived = True
                if not given.acknowledges:
                    done.append(i)
                    del self.given[i]
        if self._first and not poll.acknowledges:
            # A program that remembers its offset by itself: what is below it was handled by the process before.
            early = [i for i in self.waiting if i < offset]
            for i in early:
                del self.waiting[i]
            done += early
        return done

    def _ask_again(self, poll: Poll) -> None:
        """The lone poller asks for something it was given: the answer did not arrive."""
        back = [i for i, given in self.given.items() if i >= poll.offset and not given.arrived]
        self._put_back(back)

    def _put_back(self, ids: list[int]) -> None:
        if ids:
            self.waiting = {i: self.given.pop(i).update for i in ids} | self.waiting

    def offers(self, poll: Poll) -> bool:
        return bool(self._for(poll))

    def _for(self, poll: Poll) -> list[int]:
        if self.shut:
            return []
        any_id = poll.acknowledges or self.several or (self.newest >= 0 and poll.offset > self.newest + 11)
        return [i for i in self.waiting if any_id or i >= poll.offset]

    def take(self, poll: Poll) -> list[Update]:
        """What this poll is to be answered with; empty: nothing yet."""
        ids = self._for(poll)[: poll.limit]
        updates = [self.waiting.pop(i) for i in ids]
        poll.batch = tuple(ids)
        for u in updates:
            self.given[u.update_id] = _Given(u, poll.acknowledges, poll.batch)
        return updates

    def leave(self, poll: Poll, now: float, *, arrived: bool) -> None:
        """The poll has been answered, or nobody is left to be answered (``arrived`` False: what it got goes back)."""
        if poll in self.open:
            self.open.remove(poll)
        if not arrived:
            self._put_back([i for i in poll.batch if i in self.given and self.given[i].batch == poll.batch])
        elif any(now - other.since >= SIDE_BY_SIDE <= now - poll.since for other in self.open):
            self.several = True

    def acknowledge(self, ids: list[int]) -> list[int]:
        """The program has handled these. Returns those that are done by it."""
        return [i for i in ids if self.given.pop(i, None) is not None]

    def let_go(self, count: int) -> list[int]:
        """The oldest in the program's hands are not waited for any longer: a hook that never acknowledges must not
        keep a bot deaf."""
        ids = list(self.given)[:count]
        for i in ids:
            del self.given[i]
        return ids
