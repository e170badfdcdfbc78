"""What one observer knows of one lease row, and when that is evidence that nobody works under it (R3, R6, R7).

Pure. An observer feeds it each row that it has read, with the moment *after* the read on its own clock, which also
counts suspended time. Nothing here believes a time that somebody else wrote: a holder is gone because its row was seen
unchanged for longer than its trust can last, because it said so after its work had ended, or because the kernel of this
host says that it is dead.

Sources: expiry by watching for change is Kubernetes client-go's and the DynamoDB lock client's.
"""

from __future__ import annotations

from botlease.model import TERM_GAP, How, Lease, Timing
from botlease.value import replace, value


@value
class Evidence:
    key: tuple[int, int, str, str | None] | None = None
    since: float = 0.0
    """When this key was first seen."""
    term_since: float = 0.0
    """When its term was first seen."""
    doubted: bool = False
    """It was missing, went backwards, or is of another database: even "released" must be waited out."""
    floor: int = 0
    """The highest term ever seen."""
    origin: str = ""
    """The database that answered last."""
    proved: tuple[int, str] | None = None
    """The (term, nonce) whose owner the kernel of this host proved dead."""

    def saw(self, lease: Lease | None, origin: str, now: float) -> Evidence:
        """Take in one read. ``now`` is after the read completed: that is when the watching begins."""
        changed = bool(self.origin) and self.origin != origin
        if lease is None:
            return replace(self, key=None, doubted=True, origin=origin)
        e = self
        if e.key != lease.key:
            backwards = lease.term < e.floor or (
                e.key is not None and e.key[0] == lease.term and e.key[2] == lease.nonce and lease.beat < e.key[1]
            )
            doubted = backwards or changed or lease.origin != origin
            known = e.key is not None and e.key[0] == lease.term
            e = replace(e, key=lease.key, since=now, doubted=doubted, term_since=e.term_since if known else now)
        elif changed:
            e = replace(e, since=now, doubted=True)
        return replace(e, floor=max(e.floor, lease.term), origin=origin)

    def is_new(self, lease: Lease) -> bool:
        """Whether this is a hold that was not seen before."""
        return self.key != lease.key and (self.key is None or self.key[2] != lease.nonce)

    def died(self, lease: Lease) -> bool:
        return lease.holder is not None and self.proved == (lease.term, lease.nonce) and not self.doubted

    def vacancy(self, lease: Lease, timing: Timing, now: float) -> How | None:
        """Rule R3: the evidence that nobody can be working under this row, or None."""
        if lease.holder is None and not lease.proof and not self.doubted:
            return How.RELEASED  # only a release clears both: a hand clears one
        if self.died(lease):
            return How.DIED
        return How.EXPIRED if now >= self.since + timing.patience(lease.ttl) else None

    def may_be_taken_unread(self, lease: Lease) -> bool:
        """Whether a release of this very hold may be believed without another read, by an acquire that asks for it: the
        same term and nonce, a later beat, and nobody. Such a row went on from what was seen, and is no doubtful one."""
        return lease.holder is not None and self.key == lease.key and not self.doubted

    def unsettled(self, how: How, rooted: How, timing: Timing, now: float) -> bool:
        """Whether requests of a term that ran out may still be on their way: after an expiry, and also if its successor
        died so soon that it may have been within its own lock-delay. Our own clock settles that, where we saw its term
        for long enough. ``rooted``: the evidence that a row of deaths goes back to."""
        if how is not How.DIED:
            return how is How.EXPIRED
        return rooted is How.EXPIRED and now < self.term_since + timing.lock_delay * (1 + timing.rho)

    def floor_of(self, lease: Lease, origin: str, era: int) -> int:
        """What the next term must rise above. In another database than the row was written in, terms may be lost."""
        floor = max(self.floor, lease.term)
        return floor if lease.origin == origin else max(floor + TERM_GAP, era)
