"""The one clock of validity: monotonic, and counting while the machine is suspended.

``CLOCK_MONOTONIC`` stands still in a suspend, so a holder that wakes after an hour would still
believe an old lease. ``CLOCK_BOOTTIME`` does not. Where it does not exist the plain monotonic
clock is used and ``kernel_counts_suspend`` is False.
"""

from __future__ import annotations

import time

kernel_counts_suspend = hasattr(time, "CLOCK_BOOTTIME")
_CLOCK = time.CLOCK_BOOTTIME if kernel_counts_suspend else time.CLOCK_MONOTONIC


def now() -> float:
    """Seconds since boot, suspended time included."""
    return time.clock_gettime(_CLOCK)


def wall() -> float:
    """Unix time, for display and journals only. Nothing decides by it."""
    return time.time()  # noqa: TID251


def iso(unix: float) -> str:
    """UTC with milliseconds, the form in which SQLite rows hold times and people read them."""
    whole, part = divmod(int(unix * 1000), 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(whole))}.{part:03d}"
