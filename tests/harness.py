"""Real deployments on this machine: real supervisors, real bots, and what their witness says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BOTLEASE = (sys.executable, "-m", "botlease")
WITNESS = str(Path(__file__).parent / "witness.py")


def until(what: Callable[[], object], limit: float = 15.0) -> object:
    """Wait for a condition, looking often. Fails after ``limit`` seconds: a bound, not a timing."""
    end = time.monotonic() + limit
    while True:
        result = what()
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit} s: {what}")
        time.sleep(0.005)


def clean_env(**more: str) -> dict[str, str]:
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("BOTLEASE_", "DATABASE_URL", "RAILWAY_", "HOSTNAME"))
    }
    return env | more


@dataclass
class Run:
    process: subprocess.Popen[str]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text()

    def says(self, what: str, limit: float = 15.0) -> None:
        until(lambda: what in self.text() or None, limit)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, limit: float = 20.0) -> int:
        return self.process.wait(limit)

    def children(self) -> list[int]:
        from botlease.work.tree import descendants

        return descendants(self.pid)


@dataclass
class World:
    folder: Path
    url: str
    runs: list[Run] = field(default_factory=list)

    @property
    def witness(self) -> Path:
        return self.folder / "witness.txt"

    def run(
        self,
        *options: str,
        bot: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        ttl: str = "1.5",
        wrap: tuple[str, ...] = (),
    ) -> Run:
        """``botlease run`` of the witness (or of ``bot``) with the fastest timings."""
        log = self.folder / f"log{len(self.runs)}.txt"
        command = bot or (sys.executable, "-S", WITNESS, str(self.witness))
        with log.open("w") as out:
            process = subprocess.Popen(
                [*wrap, *BOTLEASE, "run", "--ttl", ttl, *options, "--", *command],
                env=clean_env(**{"BOTLEASE_DATABASE_URL": self.url} | (env or {})),
                stdout=out,
                stderr=out,
                text=True,
                start_new_session=True,
            )
        run = Run(process, log)
        self.runs.append(run)
        return run

    def stamps(self) -> dict[tuple[int, int], tuple[float, float]]:
        """(pid, term) -> first and last moment at work."""
        spans: dict[tuple[int, int], tuple[float, float]] = {}
        if self.witness.exists():
            # whole lines only: a write across the border of a page can be seen half done
            for line in self.witness.read_text().rpartition("\n")[0].splitlines():
                pid, term, at = line.split()
                key, when = (int(pid), int(term)), float(at)
                spans[key] = (min(spans.get(key, (when, 0))[0], when), max(spans.get(key, (0, when))[1], when))
        return spans

    def sql(self, statement: str) -> None:
        """As an operator does it."""
        if self.url.startswith("sqlite"):
            with contextlib.closing(sqlite3.connect(self.url.removeprefix("sqlite:///"))) as db, db:
                db.execute(statement)
            return

        async def run() -> None:
            import asyncpg

            connection = await asyncpg.connect(self.url)
            await connection.execute(statement)
            await connection.close()

        asyncio.run(run())

    def freeze(self, *pids: int) -> None:
        """SIGSTOP, but not in the middle of a transaction: on SQLite that keeps everybody out until it goes on.

        Who waits for this lock holds none of his own.
        """
        with contextlib.ExitStack() as stack:
            if self.url.startswith("sqlite"):
                db = sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=10)
                stack.enter_context(contextlib.closing(db))
                db.execute("BEGIN EXCLUSIVE")
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

    def bot(self, **options: object) -> tuple[str, ...]:
        """The witness with options: ``bot(exit=1, start=0.5)``."""
        words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value))]
        return (sys.executable, "-S", WITNESS, str(self.witness), *words)

    def terms(self) -> list[int]:
        return sorted({term for _, term in self.stamps()})

    def terms_rise(self) -> bool:
        """No work began under a term below that of one before it."""
        in_order = [term for (_, term), _ in sorted(self.stamps().items(), key=lambda item: item[1])]
        return in_order == sorted(in_order)

    def gap(self, term: int) -> float:
        """Seconds between the last moment at work before this term and its first one."""
        spans = self.stamps()
        first = min(a for (_, t), (a, _) in spans.items() if t == term)
        return first - max(b for (_, t), (_, b) in spans.items() if t < term)

    def works(self, n: int = 1, limit: float = 15.0) -> None:
        until(lambda: len(self.stamps()) >= n, limit)

    def overlap(self) -> float:
        """Seconds for which two different processes were at work."""
        spans = sorted(self.stamps().items(), key=lambda kv: kv[1])
        worst = 0.0
        for i, (a, (_, end)) in enumerate(spans):
            for b, (begin, last) in spans[i + 1 :]:
                if a[0] != b[0]:
                    worst = max(worst, min(end, last) - begin)
        return max(0.0, worst)

    def close(self) -> None:
        for run in self.runs:
            if run.process.poll() is None:
                for pid in [run.pid, *run.children()]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                run.signal(signal.SIGTERM)
        for run in self.runs:
            try:
                run.wait(8)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.wait()


def world(folder: Path, url: str) -> Iterator[World]:
    w = World(folder, url)
    try:
        yield w
    finally:
        w.close()


def marked(instance_mark: bytes) -> list[int]:
    """Living processes that carry this in their environment."""
    out = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if state not in (b"Z", b"X") and instance_mark in (entry / "environ").read_bytes():
                    out.append(int(entry.name))
            except OSError:
                continue
    return out


@contextlib.contextmanager
def one_side_car_lock(*stores: Any) -> Iterator[None]:
    """Stores of SQLite in one process that share the side-car lock, as if the work of each term were dead when it is
    over. They change it one after the other: processes have each their own, and one that was refused would drop the
    lock of the one that was granted just then, before that had written its term there."""
    alone = threading.Lock()

    def in_turn(store: Any) -> None:
        real = store._call

        async def call(deadline: float, job: Callable[[Any], Any]) -> Any:
            def locked(file: Any) -> Any:
                with alone:
                    return job(file)

            return await real(deadline, locked)

        store._call = call

    for store in stores:
        in_turn(store)
        store._guards = stores[0]._guards
    yield
    for store in stores[1:]:
        store._guards = {}
