"""The way in: ``botlease`` and ``python -m botlease``.

``run`` forks its reaper here, before the command line is even parsed: whatever is loaded before the fork is
memory of both processes. If the command line turns out wrong, the reaper ends with us.
"""

from __future__ import annotations

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

_reaper: tuple[int, socket.socket] | None = None


def fork_reaper() -> None:
    """Fork it now, for :func:`take_reaper` to find: the earlier, the smaller."""
    global _reaper
    from botlease.stderr import open_standard_descriptors
    from botlease.work import reaper

    open_standard_descriptors()
    _reaper = reaper.fork()


def take_reaper() -> tuple[int, socket.socket]:
    """The reaper forked at the start, or a new one."""
    global _reaper
    from botlease.work import reaper

    taken, _reaper = _reaper, None
    return taken or reaper.fork()


def main(prog_name: str | None = None) -> None:
    if sys.argv[1:2] == ["run"]:
        # Nothing of what is loaded is garbage, and to look for some took 7 to 10 ms of a start of 115 (measured, old
        # and new in turn). The supervisor collects again as soon as it has loaded what it needs.
        gc.disable()
        fork_reaper()
    from botlease.cli import main as commands
    from botlease.console import invoke

    invoke(commands, prog_name or "botlease")


if __name__ == "__main__":
    # One module, not two: this file runs as __main__, and the command line asks it for the reaper.
    from botlease.__main__ import main as enter

    enter()
