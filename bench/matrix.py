"""``scripts/matrix``: released frameworks, unmodified but for the base URL, through every way in which a bot moves.

6 frameworks x 6 events x 3 loads x 3 ways in which the server may decide a conflict, each with and without the gateway.
Every cell is two real deployments (supervisors, bots) on one simulated Bot API, with a user who writes meanwhile:

* 409: conflicts that a connected client received, from the event on;
* lost: messages that nobody ever answered;
* twice: messages that were answered twice.

It prints the table of docs/gateway.md; ``--write`` puts it there. Exit code 1 if a cell with the gateway breaks the
promise: no 409 and nothing lost anywhere, nothing twice on a planned handover, and after a kill at most what was in
hand, each counted by ``botlease status``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from botlease import clock
from botlease.telegram.botapi import Profile
from botlease.telegram.simulator import Simulator
from botlease.work.tree import descendants

ROOT = Path(__file__).resolve().parent.parent
BOTS = ROOT / "tests" / "bots"
FRAMEWORKS = {
    "python-telegram-bot": [sys.executable, str(BOTS / "bot_ptb.py")],
    "aiogram": [sys.executable, str(BOTS / "bot_aiogram.py")],
    "pyTelegramBotAPI": [sys.executable, str(BOTS / "bot_telebot.py")],
    "grammY": ["node", str(BOTS / "node" / "bot_grammy.mjs")],
    "Telegraf": ["node", str(BOTS / "node" / "bot_telegraf.mjs")],
    "node-telegram-bot-api": ["node", str(BOTS / "node" / "bot_ntba.mjs")],
}
EVENTS = {
    "planned deploy": "planned",
    "SIGTERM": "term",
    "SIGINT + 5 s": "int5",
    "SIGTERM to all": "group",
    "SIGKILL": "kill",
    "SIGSTOP 3 ttl": "stop",
}
LOADS = {"idle": (0.0, 0.1), "light": (1.0, 0.5), "busy": (0.25, 0.2)}  # seconds between two messages, seconds of work
GENTLE = ("planned", "term", "int5")  # the bot is asked to stop, and by us
TTL = 4.0


@dataclass(frozen=True)
class Cell:
    framework: str
    event: str
    load: str
    profile: str
    gateway: bool


@dataclass(frozen=True)
class Outcome:
    messages: int
    conflicts: int
    lost: int
    twice: int
    repeated: int  # as `botlease status` has it
    seconds: float  # the longest wait of a user

    def broken(self, cell: Cell) -> str:
        """How it breaks the gateway's promise; empty: it does not."""
        if self.conflicts or self.lost:
            return f"409={self.conflicts} lost={self.lost}"
        if self.twice > (0 if EVENTS[cell.event] in GENTLE else self.repeated):
            return f"twice={self.twice}, of which {self.repeated} were counted"
        return ""


class Run:
    """One cell: a user, and two deployments."""

    def __init__(self, cell: Cell, simulator: Simulator, bot_id: int, folder: Path) -> None:
        self.cell, self.simulator, self.bot_id, self.folder = cell, simulator, bot_id, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.every, self.work = LOADS[cell.load]
        self.database = f"sqlite:///{folder}/lease.db"

    def deploy(self, key: str) -> subprocess.Popen[bytes]:
        ours = {
            k: v for k, v in os.environ.items() if not k.startswith(("BOTLEASE_", "RAILWAY_", "TELEGRAM_", "DATABASE_"))
        }
        ours |= {
            "BOTLEASE_DATABASE_URL": self.database,
            "TELEGRAM_BOT_TOKEN": f"{self.bot_id}:AA-a-token-of-the-matrix-{self.bot_id}",
            "TELEGRAM_API_URL": self.simulator.url,
            "WORK": str(self.work),
            "PYTHONPATH": str(ROOT / "src"),
            "XDG_RUNTIME_DIR": str(self.folder),
        }
        front = ["--gateway", "--bot-api", self.simulator.url] if self.cell.gateway else []
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        options = ["--ttl", str(TTL), "--probation", "1", "--when-superseded", "stay", "--deployment", key, "--standby"]
        if key == "v2":
            options.remove("--standby")
        command = [sys.executable, "-m", "botlease", "run", *options, *front, "--", *FRAMEWORKS[self.cell.framework]]
        with log:
            process = subprocess.Popen(
                command,
                env=ours,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    async def answered(self, limit: float = 60.0) -> None:
        """Somebody writes, and gets an answer."""
        message = self.user.say("are you there?")
        async with asyncio.timeout(limit):
            while not message.replies:
                await asyncio.sleep(0.02)

    async def run(self) -> Outcome:
        self.user = self.simulator.user(self.bot_id)
        kind = EVENTS[self.cell.event]
        try:
            old = self.deploy("v1")
            await self.answered()
            if kind != "planned":
                self.deploy("v1")  # equal: it stands by
                await asyncio.sleep(1.0)
            if self.every:
                self.user.chatter(["hello"], self.every, random.Random(self.bot_id))
                await asyncio.sleep(2.0)
                await self.in_the_middle()
            bot = self.simulator.bot(self.bot_id)
            before = bot.counters.conflicts_live
            await self.happen(kind, old)
            await self.taken_over()
            await self.answered()
            await asyncio.sleep(2.0 if self.every else 0.5)
            self.user.hush()
            await self.settled()
            messages = self.simulator.messages[self.bot_id]
            return Outcome(
                messages=len(messages),
                conflicts=bot.counters.conflicts_live - before,
                lost=sum(not m.replies for m in messages),
                twice=sum(len(m.replies) > 1 for m in messages),
                repeated=self.repeated(),
                seconds=round(max(m.replies[0][0] - m.sent_at for m in messages if m.replies), 2),
            )
        finally:
            self.user.hush()
            await asyncio.to_thread(self.end)

    async def in_the_middle(self) -> None:
        """Until the bot has something in hand: it was delivered, and is not answered."""
        messages = self.simulator.messages[self.bot_id]
        async with asyncio.timeout(20):
            while not any(m.delivered and not m.replies for m in messages):
                await asyncio.sleep(0.005)

    async def happen(self, kind: str, old: subprocess.Popen[bytes]) -> None:
        tree = [old.pid, *descendants(old.pid)]
        if kind == "planned":
            self.deploy("v2")
        elif kind == "term":
            old.send_signal(signal.SIGTERM)
        elif kind == "int5":
            old.send_signal(signal.SIGINT)
            asyncio.get_running_loop().call_later(5.0, self.kill_all, old)
        elif kind in ("group", "kill"):
            send(tree, signal.SIGTERM if kind == "group" else signal.SIGKILL)
        elif kind == "stop":
            send(tree, signal.SIGSTOP)
            await asyncio.sleep(3 * TTL)
            send([p for p in tree if alive(p)], signal.SIGCONT)

    def kill_all(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            send([process.pid, *descendants(process.pid)], signal.SIGKILL)

    async def taken_over(self) -> None:
        """The one that follows holds the lease. (Its bot may take seconds to start.)"""
        with contextlib.closing(sqlite3.connect(self.folder / "lease.db")) as db:
            async with asyncio.timeout(60):
                while not db.execute("SELECT 1 FROM bot_terms WHERE term > 1").fetchone():
                    await asyncio.sleep(0.05)

    async def settled(self) -> None:
        """Until everything is answered, or nothing has happened for a while."""
        messages = self.simulator.messages[self.bot_id]
        quiet_since, count = clock.now(), -1
        while not all(m.replies for m in messages) and clock.now() - quiet_since < 7.0:
            await asyncio.sleep(0.05)
            replies = sum(len(m.replies) for m in messages)
            if replies != count:
                quiet_since, count = clock.now(), replies
        await asyncio.sleep(1.0)  # for a second answer

    def repeated(self) -> int:
        if not self.cell.gateway:
            return 0
        environment = {**os.environ, "BOTLEASE_DATABASE_URL": self.database, "PYTHONPATH": str(ROOT / "src")}
        environment.pop("DATABASE_URL", None)
        said = subprocess.run(
            [sys.executable, "-m", "botlease", "status", "--json"], env=environment, capture_output=True, check=True
        )
        return sum(g["repeated"] for line in said.stdout.splitlines() for g in json.loads(line)["gateway"])

    def end(self) -> None:
        for process in self.processes:
            for pid in [process.pid, *descendants(process.pid)]:
                send([pid], signal.SIGCONT)
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(12)
            except subprocess.TimeoutExpired:
                self.kill_all(process)
                process.wait()


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    sides = [True] if args.gateway_only else [True, False]
    for framework, event, load, profile in itertools.product(FRAMEWORKS, EVENTS, LOADS, Profile):
        for gateway in sides:
            cell = Cell(framework, event, load, str(profile), gateway)
            text = f"{framework} / {event} / {load} / {profile} / {'gateway' if gateway else 'plain'}"
            if not args.only or re.search(args.only, text):
                yield cell


async def run_all(chosen: list[Cell], jobs: int, verbose: bool) -> dict[Cell, Outcome | str]:
    simulators = {str(p): await Simulator.start(profile=p) for p in Profile}
    numbers = itertools.count(100_001)
    results: dict[Cell, Outcome | str] = {}
    gate = asyncio.Semaphore(jobs)
    began = clock.now()

    async def one(cell: Cell) -> None:
        async with gate:
            bot_id = next(numbers)
            folder = Path(tempfile.mkdtemp(prefix=f"botlease-matrix-{bot_id}-"))
            try:
                results[cell] = await Run(cell, simulators[cell.profile], bot_id, folder).run()
            except (TimeoutError, AssertionError, subprocess.SubprocessError) as e:
                results[cell] = f"{type(e).__name__}: {e}"
            outcome = results[cell]
            broken = outcome if isinstance(outcome, str) else outcome.broken(cell) if cell.gateway else ""
            if verbose or broken:
                print(f"{'BROKEN ' if broken else ''}{cell}: {outcome} {broken} {folder if broken else ''}", flush=True)
            elif len(results) % 20 == 0:
                print(f"{len(results)} of {len(chosen)} cells after {clock.now() - began:.0f} s", flush=True)
            if not broken:
                shutil.rmtree(folder, ignore_errors=True)

    try:
        await asyncio.gather(*(one(cell) for cell in chosen))
    finally:
        for simulator in simulators.values():
            await simulator.stop()
    return results


def table(results: dict[Cell, Outcome | str]) -> str:
    """Sums over loads and profiles; side by side, plain first."""
    lines = [
        "| framework | event | messages | 409 | lost | twice | | 409 | lost | twice | of them counted |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| | | | *without* | *without* | *without* | | **with** | **with** | **with** | **with** |",
    ]
    for framework, event in itertools.product(FRAMEWORKS, EVENTS):
        sums = {}
        for gateway in (False, True):
            found = [
                r
                for c, r in results.items()
                if (c.framework, c.event, c.gateway) == (framework, event, gateway) and isinstance(r, Outcome)
            ]
            sums[gateway] = [
                sum(getattr(r, f) for r in found) for f in ("messages", "conflicts", "lost", "twice", "repeated")
            ]
            if not found:
                sums[gateway] = ["-"] * 5  # type: ignore[list-item]
        plain, ours = sums[False], sums[True]
        lines.append(
            f"| {framework} | {event} | {plain[0]} + {ours[0]} | {plain[1]} | {plain[2]} | {plain[3]} | "
            f"| {ours[1]} | {ours[2]} | {ours[3]} | {ours[4]} |"
        )
    return "\n".join(lines)


BEGIN, END = "<!-- matrix: made by scripts/matrix --write -->", "<!-- end of matrix -->"


def write(text: str, summary: str) -> None:
    page = ROOT / "docs" / "gateway.md"
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{summary}\n\n{text}\n\n{END}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/matrix", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="REGEX", help='cells like "aiogram / SIGKILL / busy / source / gateway"')
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 2), help="cells at once")
    parser.add_argument("--gateway-only", action="store_true", help="leave out the side without the gateway")
    parser.add_argument("--write", action="store_true", help="put the table into docs/gateway.md")
    parser.add_argument("--json", metavar="FILE", help="every cell, for looking closer")
    parser.add_argument("--verbose", action="store_true", help="print each cell")
    args = parser.parse_args()
    chosen = list(cells(args))
    if not chosen:
        parser.error("no such cell")
    print(f"{len(chosen)} cells, {args.jobs} at once", flush=True)
    began = clock.now()
    results = asyncio.run(run_all(chosen, args.jobs, args.verbose))
    broken = {
        c: r if isinstance(r, str) else r.broken(c)
        for c, r in results.items()
        if c.gateway and (isinstance(r, str) or r.broken(c))
    }
    total: list[Any] = [r for c, r in results.items() if c.gateway and isinstance(r, Outcome)]
    summary = (
        f"{len(results)} cells in {clock.now() - began:.0f} s. "
        f"With the gateway: {sum(r.messages for r in total)} messages, "
        f"409={sum(r.conflicts for r in total)} lost={sum(r.lost for r in total)} "
        f"twice={sum(r.twice for r in total)}, cells that break the promise: {len(broken)}."
    )
    text = table(results)
    print(text, summary, sep="\n\n")
    if args.json:
        rows = [asdict(c) | (asdict(r) if isinstance(r, Outcome) else {"error": r}) for c, r in results.items()]
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if args.write:
        write(text, summary)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
