"""What a part of the soak found: printed as it goes, and in one line of figures."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass
class Report:
    """One part. ``failures`` is what broke, each with the command that shows it again."""

    part: str
    figures: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _said: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def progress(self, text: str, *, now: bool = False) -> None:
        """Often at a terminal, every half a minute in a log; ``now`` for what comes seldom."""
        moment = time.monotonic()
        if now or moment - self._said >= (1.0 if sys.stderr.isatty() else 30.0):
            self._said = moment
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"  {self.part}: {text}, {self.seconds:.0f} s", end=end, file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"  {self.part}: FAILED: {text}", file=sys.stderr, flush=True)

    def enough(self, least: int, figure: str) -> None:
        """A run that did next to nothing finds nothing either."""
        if int(self.figures[figure].replace(",", "")) < least:
            self.fail(f"{figure}: {self.figures[figure]} are too few: at least {least:,}")

    def close(self) -> None:
        self.figures["took"] = f"{self.seconds:.0f} s"
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        print(f"{self.part}: {'FAILED' if self.failures else 'ok'}: {figures}", flush=True)
        for text in self.failures[:5]:  # once more: a log shows its end, and much may have been printed since
            print(f"{self.part}: found: {text[:500]}", flush=True)
