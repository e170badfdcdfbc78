"""The trading bot of this repository, with a witness: a thread that stamps a file every few milliseconds.

argv: the witness file. A stamp is "pid term boottime"; two processes that stamp at the same time are an overlap.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from trading_bot.__main__ import main


def stamp(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    term = os.environ.get("BOTLEASE_TERM", "0")
    while True:
        os.write(fd, f"{os.getpid()} {term} {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\n".encode())
        time.sleep(0.005)


def broken() -> None:
    """What a deployment that nobody tried out does: it starts, and dies before it has said a word."""
    time.sleep(0.3)
    print("demo: ImportError: cannot import name 'Strategy' from 'trading_bot'", file=sys.stderr)
    os._exit(1)


threading.Thread(target=stamp, args=(sys.argv[1],), daemon=True).start()
if "DEMO_BROKEN" in os.environ:
    broken()
sys.exit(main())
