"""How the program ends early: one line that says what is wrong, and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

CONFIG, UNAVAILABLE = 78, 69


def fail(text: str, code: int) -> NoReturn:
    from botlease.text import safe

    # A URL or a token in the place of something else, a row, a server's answer: any of them may be quoted in it.
    if sys.stderr is not None:  # it was closed when we were started; None would have print() take standard output
        print(f"botlease: {safe(text)}", file=sys.stderr, flush=True)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End at once. What Python tidies up at its end takes 20 to 30 ms of processor time (measured), in the very moment
    in which the next bot starts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)
