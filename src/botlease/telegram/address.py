"""Where the gateway is, for the hooks: as they are told, or as this very task has begun it, or as the supervisor says.

Several bots in one program each have a gateway of their own. The environment is one for all of them: a bot would be
pointed at another one's, and polled within a term that is not its own.
"""

from __future__ import annotations

import os
from contextvars import ContextVar

served: ContextVar[str] = ContextVar("served", default="")
"""By a gateway in this program, in this task and those that it starts."""
serving: list[str] = []
"""All that are served in this program. A thread has no task that it was begun by."""


def address(url: str | None) -> str:
    """Empty without a gateway. Raises RuntimeError where there are several in this program, and none is this task's:
    the bot would go past all of them, and poll outside of any term."""
    found = url or served.get() or os.environ.get("BOTLEASE_API_URL", "")
    if found or not serving:
        return found
    if len(serving) > 1:
        raise RuntimeError("several gateways are served in this program: pass url= as botlease.gateway gave it")
    return serving[0]
