"""Which slot of a fleet runs which bot, and what one member does about it next. Pure.

Rendezvous hashing (Thaler and Ravishankar, 1996; also "highest random weight"): of all slots the one with the highest
hash of (slot, bot) has the bot. When a slot comes, only the bots that it has from now on move; when one goes, only
its own do; nobody needs to know where the others are. Slots are numbers and not processes, so a process that is
started again finds its bots where they were.

Nothing here is needed for safety: two members that disagree about a placement both ask, and the store grants one
(:mod:`botlease.stores.postgresfleet`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from botlease.model import LEAVING


def weight(bot: str, slot: int) -> int:
    return int.from_bytes(blake2b(f"{slot}/{bot}".encode(), digest_size=8).digest())


def place(bot: str, slots: Sequence[int]) -> int:
    """The slot that should run this bot. At least one slot is needed."""
    return max(slots, key=lambda slot: (weight(bot, slot), slot))


class Seen(Protocol):
    """A bot of the fleet as it was read."""

    @property
    def bot(self) -> str: ...
    @property
    def slot(self) -> int: ...
    @property
    def paused(self) -> bool: ...
    @property
    def term(self) -> int: ...
    @property
    def ours(self) -> bool: ...


@dataclass
class Plan:
    take: list[tuple[str, int, int]] = field(default_factory=list)
    """(bot, its term and slot as they were seen): to be run here."""
    stop: dict[str, int] = field(default_factory=dict)
    """Bots to be stopped here, and the slot each is given to."""
    lost: list[str] = field(default_factory=list)
    """Bots whose row says that somebody else has them: to be stopped, and nothing is given."""
    give: list[tuple[str, int, int]] = field(default_factory=list)
    """(bot, term, to): held by us, but not running (the answer to a take was lost), and not to be run here."""
    move: list[tuple[str, int, int]] = field(default_factory=list)
    """(bot, from, to): of our slot, not running, and for another one."""
    clear: list[str] = field(default_factory=list)
    """Bots that are to leave the fleet and do not run here."""


def plan(
    mine: int, slots: Sequence[int], rows: Iterable[Seen], running: Mapping[str, int], *, room: int, calm: bool
) -> Plan:
    """What the member in slot ``mine`` does next. ``slots``: the open ones, ours among them. ``running``: bot and term
    of what runs here. ``room``: how many more bots may be on the move from here at once. ``calm``: no slot has just
    come (while a fleet starts they come one by one, and each would move what the one before has just begun)."""
    p = Plan()
    left = dict(running)
    for row in rows:
        term = left.pop(row.bot, None)
        if term is not None and (term != row.term or not row.ours):
            p.lost.append(row.bot)  # also one that was deleted and added again, under the same number
        elif term is not None:
            if row.paused or row.slot != mine:
                p.stop[row.bot] = mine  # whoever has changed its slot by hand has the last word
            elif calm and room > 0 and (to := place(row.bot, slots)) != mine:
                p.stop[row.bot] = to
                room -= 1
        elif row.slot == LEAVING and not row.ours:
            p.clear.append(row.bot)
        else:
            to = place(row.bot, slots) if row.slot != LEAVING else mine
            if row.ours and (row.paused or row.slot == LEAVING or to != mine):
                p.give.append((row.bot, row.term, to))
            elif row.paused:
                continue
            elif row.slot == mine and to != mine:
                if calm:
                    p.move.append((row.bot, mine, to))
            elif to == mine and (row.slot == mine or calm):
                p.take.append((row.bot, row.term, row.slot))
    p.lost += left  # their rows are another slot's by now, or gone
    return p


class SlotSeen(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def held(self) -> bool: ...
    @property
    def generation(self) -> int: ...
    @property
    def yields(self) -> bool: ...
    @property
    def assigned(self) -> str | None: ...
    @property
    def ended(self) -> bool: ...


def choose(slots: Sequence[SlotSeen], generation: int, who: str, *, newer: bool = True) -> int | None:
    """The slot that a process of this generation applies for, or None: wait.

    First that of an older deployment (``newer``: if that is allowed), so that its bots change hands once and move
    nowhere else. Then one that was left. Then a new one, unless a newer deployment works here already: it may not want
    more. (Without ``newer`` each process is a deployment of its own, and their order says nothing.) Where all were
    deactivated by hand that is the operator's will: apply for one of them, wait to be promoted.
    """

    def mine(numbers: list[int]) -> int:
        return max(numbers, key=lambda n: (weight(who, n), n))  # processes that start together choose differently

    held = [s for s in slots if s.held]
    # By the order of the fleet, and by that of the slot, which is its lease's: there an older one may have come last.
    older = [s.number for s in held if s.generation < generation and s.yields]
    if older and newer:
        return mine(older)
    free = [s.number for s in slots if not s.held and s.assigned is not None and s.ended]
    if free:
        return mine(free)
    if newer and any(s.generation > generation for s in held):
        return None
    deactivated = [s.number for s in slots if s.assigned is None]
    if deactivated and all(s.assigned is None or s.ended for s in slots):
        return mine(deactivated)
    top = max((s.number for s in slots), default=0)
    return mine([top + 1, top + 2, top + 3, top + 4])
