"""The inbox of the Bot API gateway: what was received and is not done, and how far the Bot API has been read.

Two tables. ``bot_polls`` has one row for each token of a bot, with the fencing token: :meth:`Inbox.begin` writes the
term into it and is refused if a later term has begun, and every other call is guarded on exactly that term and nonce.
So nothing of a stale term gets in, however late it is carried out. ``bot_updates`` has one row for each update that is
not done, and for those that are done but that the Bot API may hand out once more, because no later offset has
reached it yet.

A token is told by its bot id, the digits before the colon (``api``); the token itself is in neither.

On PostgreSQL they are in the lease's own database. On SQLite they are in a file beside it: a commit there must neither
wait for a renewal nor wake every instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Protocol

KEEP_SECONDS: Final = 86_400
"""Older updates are not handed out any more: the Bot API forgets them after a day as well."""


@dataclass(frozen=True, slots=True)
class Holding:
    """For which bot, in which term."""

    bot: str
    term: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Update:
    update_id: int
    payload: str  # JSON, as the Bot API gave it
    tries: int = 0  # how many processes it has been handed to


@dataclass(frozen=True, slots=True)
class Begun:
    """What a term finds."""

    offset: int  # the first id that has not been received; 0: unknown
    allowed: str | None  # allowed_updates as last stated, JSON
    unfinished: bool  # the one before may have left a poll behind
    asked: int  # the offset of its last poll, if it has not
    updates: list[Update]  # not done, oldest first
    done: list[int]  # done, but the Bot API may not know it


@dataclass(slots=True)
class Changes:
    """What is to be written, in one transaction."""

    received: list[Update] = field(default_factory=list)
    given: list[int] = field(default_factory=list)  # handed out from now on
    returned: list[int] = field(default_factory=list)  # stored as handed out, and not handed out after all
    done: list[int] = field(default_factory=list)
    offset: int = 0  # the first id that has not been received
    confirmed: int = 0  # the Bot API has seen this offset: what is done below it can be forgotten
    asked: int = -1  # the offset of the last poll
    allowed: str | None = None
    polling: bool = True  # False: the last poll has returned, and no other one will follow
    polled: bool = False  # a getUpdates succeeded
    conflicts: int = 0  # more than before: 409s although we hold the lease
    repeated: int = 0  # more than before: updates handed out again
    set_aside: int = 0  # more than before: updates given up
    webhook: str = ""  # where a webhook is set, its host


class Inbox(Protocol):
    async def begin(self, me: Holding, api: str, deadline: float) -> Begun | None:
        """Take over for this term. None: a later term has begun. What is older than :data:`KEEP_SECONDS` is counted
        as set aside and forgotten."""

    async def save(self, me: Holding, api: str, changes: Changes, deadline: float) -> bool:
        """Write, all or nothing. False: a later term has begun, and nothing was written."""

    async def aclose(self) -> None: ...


POLL_COLUMNS: Final = (
    "bot",
    "api",
    "term",
    "next_offset",
    "polling",
    "polled_at",
    "conflicts",
    "conflict_at",
    "webhook",
    "repeated",
    "set_aside",
)


def open_inbox(url: str) -> Inbox:
    """The inbox that belongs to this database URL. Raises what :func:`botlease.stores.open_store` raises."""
    from botlease.stores import open_store

    store: Any = open_store(url)
    if url.startswith("sqlite:"):
        from botlease.stores.sqliteinbox import SqliteInbox

        return SqliteInbox(store.path)
    from botlease.stores.postgresinbox import PostgresInbox

    return PostgresInbox(store)
