"""What runs during a term, and what makes sure that it ends with it.

* :mod:`.fence`   the kernel's timer: SIGKILL at the end of trust, whoever is asleep
* :mod:`.tree`    the processes below one, killed to the last
* :mod:`.proof`   who owns the work, and proof that it is dead
* :mod:`.reaper`  the small process that owns a child's tree and outlives its supervisor
* :mod:`.child`   work as a supervised child process
* :mod:`.body`    work as a coroutine of this process
"""

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
