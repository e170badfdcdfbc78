"""Loaded by the supervisors of the nemesis: a clock that drifts (SOAK_RATE), and a bug planted on purpose (SOAK_PLANT).
And a wall clock that is ahead by what a file says (SOAK_CLOCK): beside SQLite libfaketime, which can do that, makes a
program of several threads stand still for a second now and then.

The kernel's timers of a drifting machine drift with its clocks, so what is armed is turned back into real time.
"""

import os
import time
from pathlib import Path

_RATE = float(os.environ.get("SOAK_RATE") or 1)

if os.environ.get("SOAK_PLANT") == "long_trust":
    import botlease.model
    import botlease.work.proof

    # On one host the successor would kill it, and the bug would not show.
    botlease.work.proof.sweep = lambda *args, **options: None
    botlease.model.Timing.trust = property(lambda self: 3 * self.ttl)  # R1 broken: the holder believes for too long
    botlease.model.Timing.drain_after = property(lambda self: 2.5 * self.ttl)

if _RATE != 1:
    import botlease.clock
    import botlease.work.fence

    _begun = time.clock_gettime(time.CLOCK_BOOTTIME)
    _arm = botlease.work.fence.Fence.arm

    def _now() -> float:
        return _begun + (time.clock_gettime(time.CLOCK_BOOTTIME) - _begun) * _RATE

    def _drifting_arm(self, until: float) -> None:
        _arm(self, _begun + (until - _begun) / _RATE)

    botlease.clock.now = _now
    botlease.work.fence.Fence.arm = _drifting_arm

if os.environ.get("SOAK_CLOCK"):
    import botlease.clock

    _wall = botlease.clock.wall

    def _stepped() -> float:
        return _wall() + float(Path(os.environ["SOAK_CLOCK"]).read_text())

    botlease.clock.wall = _stepped
