"""Progress proof: is the bot alive inside? A process that runs says little; this asks for a sign.

Three kinds of sign: a URL that answers with 2xx or 3xx, a file that is touched, a line on standard output. The
supervisor learns the first one (a probation is not passed without) and when none has come for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from botlease import clock
from botlease.model import Event, Healthy, Unhealthy

LONGEST_LINE = 4096
"""Bytes of a line in which the pattern is looked for. Some patterns take the square of the length, and all of it the
lock of the interpreter: a bot that prints a picture in one line must not keep us from renewing."""
OFTEN = 1.0
"""Seconds between two looks, at most a fifth of ``within``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``http://...``, ``stdout:REGEX``, or the path of a file (``file:PATH`` for an odd one)."""

    kind: str  # "url", "file", "stdout"
    value: str
    within: float = 30.0
    """Seconds for which one sign counts."""

    @classmethod
    def parse(cls, text: str, within: float) -> Rule:
        """Raises ValueError with what is wrong."""
        if text.startswith(("http://", "https://")):
            cure = "use http://127.0.0.1:PORT/PATH"
            if text.startswith("https://"):
                raise ValueError(f"{text!a}: the bot runs on this machine, {cure}")
            try:
                parts = urlsplit(text)
                there = parts.hostname and parts.port != 0
            except ValueError:
                there = None
            if not there:  # asked for, it would never answer, and a bot that is well be rolled back for it
                raise ValueError(f"{text!a} is no address: {cure}")
            return cls("url", text, within)
        if "://" in text:
            raise ValueError(f"{text!a}: a URL begins with http://")
        if text.startswith("stdout:"):
            pattern = text.removeprefix("stdout:")
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(f"{pattern!a} is not a regular expression: {e}") from None
            return cls("stdout", pattern, within)
        if not text.startswith("file:") and re.match(r"[\w.-]*:\d+(/|$)", text):
            raise ValueError(f"{text!a}: a URL begins with http://, and a file with such a name with file:")
        path = text.removeprefix("file:")
        if not path or "\0" in path:
            raise ValueError(f"{text!a}: name a URL, a file, or stdout:REGEX")
        return cls("file", path, within)


class Pulse:
    """Feels one bot, from :meth:`begin` to :meth:`end`; says ``Healthy`` once and ``Unhealthy`` each time."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.tell: Callable[[Event], None] = lambda event: None
        self._last = 0.0  # when the last sign came
        self._began = 0.0
        self._touched = 0
        self._task: asyncio.Task[None] | None = None
        self._listener: threading.Thread | None = None

    def output(self) -> int:
        """Where the bot's standard output should go: a descriptor for the caller to close, or -1: as it is. Raises
        OSError or RuntimeError if there is none, or no thread, to be had."""
        if self.rule.kind != "stdout":
            return -1
        read, write = os.pipe()
        listener = threading.Thread(target=self._listen, args=(read,), name="botlease-stdout", daemon=True)
        self._listener = listener
        try:
            listener.start()
        except RuntimeError:  # out of threads
            self._listener = None
            os.close(read)
            os.close(write)
            raise
        return write

    def rest(self) -> None:
        """When the bot is gone for good: what it said last is passed on before we end as well."""
        if self._listener is not None:
            self._listener.join(0.5)  # nobody may read it, or something that was let live may have the pipe open

    def _listen(self, read: int) -> None:
        """Pass everything on. In a thread of its own: if nobody reads our output, only the bot's may wait for it."""
        wanted, thread = re.compile(self.rule.value.encode()), threading.current_thread()
        rest = b""
        with contextlib.suppress(OSError), os.fdopen(read, "rb", buffering=0) as stream:
            while data := stream.read(65_536):
                _pass_on(data)
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[-65_536:]
                # Not if another bot has begun: whoever is read slowly is heard late, and proves nothing of that one.
                if any(wanted.search(line[:LONGEST_LINE]) for line in lines) and self._listener is thread:
                    self._last = clock.now()

    def begin(self, term: int) -> None:
        self.end()
        self._began = clock.now()
        if self.rule.kind == "file":
            self._touched = self._mtime()
        self._task = asyncio.ensure_future(self._feel(term))

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _feel(self, term: int) -> None:
        told = False
        since = self._began
        while True:
            if self.rule.kind != "stdout" and await self._sign():
                self._last = clock.now()
            if self._last > since:
                since = self._last
                if not told:
                    told = True
                    self.tell(Healthy(term))
            elif clock.now() - since > self.rule.within:
                since, told = clock.now(), False
                self.tell(Unhealthy(term))
            await asyncio.sleep(min(OFTEN, self.rule.within / 5))

    def _mtime(self) -> int:
        """Nanoseconds; 0 if there is no such file."""
        try:
            return Path(self.rule.value).stat().st_mtime_ns
        except OSError:
            return 0

    async def _sign(self) -> bool:
        if self.rule.kind == "file":
            # That it was touched, and not when: a wall clock that was set back would make one touch look like new for
            # as long as the step was. As it was before the term, it is of an earlier process.
            before, self._touched = self._touched, self._mtime()
            return self._touched not in (0, before)
        from botlease.http import status_of

        try:
            return 200 <= await status_of(self.rule.value, min(2.0, self.rule.within)) < 400
        except (OSError, TimeoutError, ValueError):
            return False


def _pass_on(data: bytes) -> None:
    """Whatever becomes of it: a bot must not die, or seem to be dead, of a disk that is full for a moment. Waits where
    somebody who shares our output has made it non-blocking (node does, with standard error)."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(1, left) :]
        except BlockingIOError:
            select.select([], [1], [])
        except OSError:
            return
