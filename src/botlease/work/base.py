"""What the keeper asks of the work of a term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from botlease.model import Event, Reason


class Work(Protocol):
    """Started once per term."""

    tell: Callable[[Event], None]
    """Takes what it has to say: ``WorkEnded`` when, and only when, nothing of the term's work runs any more; also
    ``Ready``, ``Crashed``, ``Healthy`` and ``Unhealthy``, where it can."""
    proof: str
    """Written into the lease: by it another instance of this host can tell that the work is dead."""

    def prepare(self) -> None:
        """Start up to the gate, where that was asked for: nothing of it may act before :meth:`start`."""

    def start(self, term: int, nonce: str, until: float, guard_fd: int | None) -> None:
        """Begin, unless ``until`` (the fence, on :func:`botlease.clock.now`) has passed."""

    def arm(self, until: float) -> None:
        """Move the fence: a renewal was confirmed."""

    def drain(self, until: float, reason: Reason) -> None:
        """Ask the work to finish."""

    def kill(self, reason: Reason) -> None: ...

    def restart(self, hung: bool) -> None:
        """Begin again within the term. ``hung``: it makes no progress, and is ended first."""

    def danger(self, on: bool) -> None:
        """The end of trust comes nearer, or not any more."""

    def close(self) -> None: ...
