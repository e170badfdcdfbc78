"""Is the trading bot already running on this machine? ``python check_bot_running.py [--force-kill] [--json]``

Exit code 0: no (or no more); 1: yes; 78: it cannot be told here (no /proc). The same as ``botlease check``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from botlease.commands import check
from botlease.console import invoke

if __name__ == "__main__":
    invoke(check, "check_bot_running.py")
