"""What the keeper asks of the work of a term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from botlease.model import Reason


class Work(Protocol):
    """Started once per term; calls ``on_ended(term)`` when, and only when, nothing of it runs any more."""

    on_ended: Callable[[int], None]
    proof: str
    """Written into the lease: by it another instance of this host can tell that the work is dead."""

    def start(self, term: int, until: float, guard_fd: int | None) -> None:
        """Begin, unless ``until`` (the fence, on :func:`botlease.clock.now`) has passed."""

    def arm(self, until: float) -> None:
        """Move the fence: a renewal was confirmed."""

    def drain(self, until: float, reason: Reason) -> None:
        """Ask the work to finish."""

    def kill(self, reason: Reason) -> None: ...

    def close(self) -> None: ...
