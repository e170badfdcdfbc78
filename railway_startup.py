"""What the Procfile starts: the trading bot as one instance among all deployments.

Reads DATABASE_URL, RAILWAY_DEPLOYMENT_ID (and the like of other platforms), PORT and the bot's token. Answers
/health, /livez, /readyz and /leader on PORT at once; a standby is healthy.
"""

import os
import signal

# First of all: as PID 1 of a container Python would ignore SIGTERM until it has a handler. Nothing has been
# started yet, so that ending is all there is to do. The supervisor puts its own handlers in place later.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.signal(signal.SIGINT, lambda *_: os._exit(0))

import sys  # noqa: E402

from instance_manager import run_bot  # noqa: E402


def main() -> int:
    port = os.environ.get("PORT", "").strip()
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        print(f"railway_startup: PORT is {port!r}, which is not a port number", file=sys.stderr)
        return 78
    return run_bot(health_port=int(port) if port else None, health_host=None)


if __name__ == "__main__":
    sys.exit(main())
