"""At most one copy of your bot works at any time, across every deployment.

.. code-block:: python

    async with botlease.active("mybot") as term:
        await run_my_bot(fence=term.number)

The command line (``botlease run -- python bot.py``) needs no change in the bot. See the README.
"""

from __future__ import annotations

TYPE_CHECKING = False  # known to type checkers by its name; typing itself is not worth its memory this early
__version__ = "0.2.0"
__all__ = [
    "ConfigurationError",
    "Fleet",
    "LeaseLost",
    "NotSupervised",
    "StoreError",
    "Term",
    "active",
    "exclusive",
    "gate",
    "gateway",
    "wait_at_gate",
]

if TYPE_CHECKING:
    from typing import Any

    from botlease.fleet import Fleet
    from botlease.gating import NotSupervised, gate, wait_at_gate
    from botlease.inside import LeaseLost, Term, active, exclusive
    from botlease.inside_gateway import gateway
    from botlease.settings import ConfigurationError
    from botlease.stores import StoreError


def __getattr__(name: str) -> Any:
    # Imported when first used: the command line must fork its reaper before asyncio and a driver are loaded.
    import importlib

    if name == "StoreError":
        return importlib.import_module("botlease.stores").StoreError
    if name == "ConfigurationError":
        return importlib.import_module("botlease.settings").ConfigurationError
    if name == "Fleet":
        return importlib.import_module("botlease.fleet").Fleet
    if name == "gateway":
        return importlib.import_module("botlease.inside_gateway").gateway
    if name in ("NotSupervised", "gate", "wait_at_gate"):
        return getattr(importlib.import_module("botlease.gating"), name)
    if name in __all__:
        module = importlib.import_module("botlease.inside")
        globals().update({n: getattr(module, n) for n in ("LeaseLost", "Term", "active", "exclusive")})
        return globals()[name]
    raise AttributeError(f"module 'botlease' has no attribute {name!r}")
