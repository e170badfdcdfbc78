"""Runs the bot only while this instance should: registers it, keeps it alive in the database, starts and stops the bot.

The seed's instance manager, thin over the package:
``python instance_manager.py [options of botlease run] [-- command]``;
without a command it runs the trading bot of this repository.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # first of all: as PID 1 Python would ignore SIGTERM until it has a handler
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
# A deployed checkout is not installed: the package is found beside this file, by the bot, too.
sys.path.insert(0, str(ROOT / "src"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

BOT = (sys.executable, "-m", "trading_bot")


def run_bot(command: tuple[str, ...] = BOT, **options: Any) -> int:
    """Supervise the bot. The options are those of ``botlease.start.start``. Returns the exit code."""
    from botlease.work.reaper import fork_early

    fork_early()
    from botlease.start import start

    # The ledger of the trading bot is in the lease's database: it is passed on.
    return start(command, pass_database=True, **options)


if __name__ == "__main__":
    from botlease.work.reaper import fork_early

    fork_early()
    from botlease.cli import run
    from botlease.console import invoke
    from botlease.exits import leave
    from botlease.start import start

    def begin(command: tuple[str, ...], pass_database: bool, **options: Any) -> None:
        leave(start(command or BOT, pass_database=True, **options))

    run.callback = begin
    invoke(run, "instance_manager.py")
