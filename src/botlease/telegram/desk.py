"""Which update is handed to whom, and when it counts as done. No I/O, no clock.

One desk for each token. Updates come in when they are stored, go out to whoever polls, and leave when they are done:

* *by offset*: the next poll asks for what comes after them, as the Bot API's own rule says. That is true of frameworks
  that poll again only when they have handled a batch (grammY, Telegraf, node-telegram-bot-api 2);
* *by acknowledgement*, from a hook in the program, where the next poll comes at once (python-telegram-bot, aiogram,
  pyTelegramBotAPI). There an offset only says that the batch has arrived. No more than :data:`IN_HAND` are in such a
  program's hands at a time: the rest waits here, where a kill does not reach it.

An offset finishes only of the very batch into which it points. There may be several pollers in one program, and of what
another one has in hand it says nothing. An update goes to one of them. It goes out again only if its answer did not
arrive: the connection broke under it, or its own connection asks for it once more, or that is closed and another asks
the same again. (A second poller that has never received anything asks as one that lost its first answer does: where
neither keeps its connection open it can be given the other's first batch.)

What was in hand when two processes ended may be what ends them: it goes out alone, so that it takes nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from botlease.stores.inbox import Update

TRIES: Final = 5
"""Processes that may die while they have an update in hand; after that it is set aside. One that kills the bot each
time would otherwise keep it from working for a day."""
SUSPECT: Final = 2
"""Processes that ended with it in hand, and others with it. From then on it is handed out alone: five deaths of a bot
that had two hundred in hand, of whatever cause, would otherwise throw all of them away."""
IN_HAND: Final = 200
"""Two full batches: enough for a program that handles many at once."""


@dataclass(eq=False)
class Poll:
    """One getUpdates of the program that is being served."""

    offset: int
    limit: int
    acknowledges: bool = False  # "done" comes from a hook
    connection: object = None
    closed: Callable[[], bool] = lambda: False  # whether that connection is closed
    batch: tuple[int, ...] = ()


@dataclass(slots=True)
class _Given:
    update: Update
    poll: Poll
    arrived: bool = False  # a later offset has been asked for: the program has it


@dataclass
class Desk:
    waiting: dict[int, Update] = field(default_factory=dict)
    given: dict[int, _Given] = field(default_factory=dict)
    open: list[Poll] = field(default_factory=list)
    shut: bool = False

    def knows(self, update_id: int) -> bool:
        return update_id in self.waiting or update_id in self.given

    def receive(self, updates: list[Update]) -> None:
        """Take in what was stored, and is not known here."""
        self.waiting |= {u.update_id: u for u in updates}

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
        return self._room(self.open[0])

    # Polls ---------------------------------------------------------------------------------------------------

    def enter(self, poll: Poll) -> list[int]:
        """A poll has come in. Returns the updates that are done by it."""
        done = []
        back = []
        for i, given in list(self.given.items()):
            if i < poll.offset and given.poll.batch[0] < poll.offset <= given.poll.batch[-1] + 1:
                given.arrived = True
                if not given.poll.acknowledges:
                    done.append(i)
                    del self.given[i]
            elif not given.arrived and i >= poll.offset and _asks_again(given.poll, poll):
                same = given.poll.connection is not None and given.poll.connection is poll.connection
                if same or given.poll.closed():
                    back.append(i)
        self._put_back(back)
        self.open.append(poll)
        return done

    def _put_back(self, ids: list[int]) -> None:
        if ids:
            self.waiting = {i: self.given.pop(i).update for i in ids} | self.waiting

    @property
    def crowded(self) -> bool:
        return len(self.given) >= IN_HAND

    @property
    def full(self) -> bool:
        """No more is handed out until something is done."""
        return self.crowded or any(g.update.tries >= SUSPECT for g in self.given.values())

    def relent(self) -> None:
        """What kills the bot would have done so by now; and what waits for something slow has waited long enough."""
        for given in self.given.values():
            given.update = _unsuspected(given.update)
        first = next(iter(self.waiting), None)
        if first is not None and self.given:
            self.waiting[first] = _unsuspected(self.waiting[first])

    def _room(self, poll: Poll) -> int:
        if self.full:
            return 0
        first = next(iter(self.waiting.values()), None)
        if first is not None and first.tries >= SUSPECT:
            return 0 if self.given else 1
        return min(poll.limit, max(0, IN_HAND - len(self.given))) if poll.acknowledges else poll.limit

    def offers(self, poll: Poll) -> bool:
        return bool(self.waiting) and not self.shut and self._room(poll) > 0

    def take(self, poll: Poll) -> list[Update]:
        """What this poll is to be answered with; empty: nothing yet."""
        if not self.offers(poll):
            return []
        ids: list[int] = []
        for i, update in self.waiting.items():
            if len(ids) == self._room(poll) or (ids and update.tries >= SUSPECT):
                break
            ids.append(i)
        ids.sort()  # as the Bot API gives them, and as offsets are read; a wall clock may have been set back
        updates = [self.waiting.pop(i) for i in ids]
        poll.batch = tuple(ids)
        for u in updates:
            self.given[u.update_id] = _Given(u, poll)
        return updates

    def leave(self, poll: Poll, *, arrived: bool) -> None:
        """The poll has been answered, or nobody is left to be answered (``arrived`` False: what it got goes back)."""
        self.open.remove(poll)
        if not arrived:
            self._put_back([i for i in poll.batch if i in self.given and self.given[i].poll is poll])

    def acknowledge(self, ids: list[int]) -> list[int]:
        """The program has handled these. Returns those that are done by it."""
        return [i for i in ids if (self.given.pop(i, None) or self.waiting.pop(i, None)) is not None]

    def let_go(self) -> list[int]:
        """What is in the program's hands is not waited for any longer: a hook that never acknowledges must not keep a
        bot deaf."""
        ids = list(self.given)
        self.given.clear()
        return ids


def _unsuspected(update: Update) -> Update:
    return replace(update, tries=min(update.tries, SUSPECT - 1))


def _asks_again(before: Poll, poll: Poll) -> bool:
    """For what that one was answered with: from its own offset or a lower one; or for the rest of its batch."""
    return poll.offset <= before.offset or before.batch[0] < poll.offset <= before.batch[-1]
