"""One world: a simulator with users, deployments of the trading bot, and what the witness saw."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from botlease import clock
from botlease.telegram.command import TEXTS
from botlease.telegram.simulator import Simulator
from demo import seed

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "3"  # this version dies at its start
USERS = 3
EVERY = 0.6  # seconds between two messages of one user
SETTLE = 14.0  # a handover is over by then: the bot's own stop takes about 3 s, the plain design's heartbeat 5 s


@dataclass(frozen=True, slots=True)
class Result:
    handovers: int
    overlap_ms: float
    conflicts: int
    lost: int
    twice: int
    lost_at_kill: int
    twice_at_kill: int
    messages: int
    gaps_ms: tuple[float, ...]

    @property
    def gap_ms_median(self) -> float:
        return median(self.gaps_ms) if self.gaps_ms else 0.0

    @property
    def clean(self) -> bool:
        return not (self.overlap_ms or self.conflicts or self.lost or self.twice)


@dataclass
class Deployment:
    version: str
    process: asyncio.subprocess.Process
    instance_id: str = ""


@dataclass
class World:
    """Common to both designs. ``say`` gets each line for the live view."""

    name: str
    folder: Path
    url: str
    bot_id: int
    say: Callable[[str, str], None]
    deployments: list[Deployment] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    killed_at: float | None = None
    replies: list[float] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    inbox = False  # what is confirmed may still be handed out again

    async def open(self) -> None:
        self.simulator = await Simulator.start(seed=self.bot_id)
        self.simulator.on_reply = lambda message: self.replies.append(clock.now())

    @property
    def witness(self) -> Path:
        return self.folder / f"witness-{self.bot_id}.txt"

    def log(self, text: str) -> None:
        self.say(self.name, text)

    def environment(self, version: str) -> dict[str, str]:
        dropped = ("BOTLEASE_", "RAILWAY_", "TELEGRAM_", "BOT_", "PRICE_", "HOSTNAME")
        env = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and k != "DATABASE_URL"}
        if version == BROKEN:
            env["DEMO_BROKEN"] = "1"
        return env | {
            "TELEGRAM_BOT_TOKEN": f"{self.bot_id}:AA-a-token-of-the-demo",
            "TELEGRAM_API_URL": self.simulator.url,
            "BOT_VERSION": version,
            "BOTLEASE_DATABASE_URL": self.url,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        }

    def bot_command(self) -> list[str]:
        return [sys.executable, "-m", "demo.bot", str(self.witness)]

    def command(self, version: str) -> list[str]:
        raise NotImplementedError

    async def move(self, version: str) -> None:
        """The operator's statements: an instance of this version is to be active."""
        raise NotImplementedError

    async def deploy(self, version: str) -> Deployment:
        log = (self.folder / f"{self.bot_id}-{len(self.deployments)}.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            *self.command(version),
            env=self.environment(version),
            cwd=ROOT,
            stdout=log,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        deployment = Deployment(version, process)
        self.deployments.append(deployment)
        self._tasks.append(asyncio.ensure_future(self._listen(deployment, log)))
        return deployment

    async def _listen(self, deployment: Deployment, log: object) -> None:
        stream = deployment.process.stderr
        assert stream is not None
        with contextlib.closing(log):  # type: ignore[type-var]
            async for line in stream:
                text = line.decode(errors="replace").rstrip()
                log.write(line)  # type: ignore[attr-defined]
                if text.startswith("botlease: "):
                    self.log(f"  version {deployment.version}: {text.removeprefix('botlease: ')}")

    def chat(self) -> None:
        rng = random.Random(7)
        for _ in range(USERS):
            self.simulator.user(self.bot_id).chatter(TEXTS, EVERY, rng)

    def hush(self) -> None:
        for chat in self.simulator.chats:
            chat.hush()

    def event(self, text: str) -> None:
        self.events.append(clock.now())
        self.log(text)

    async def restarts(self, deployment: Deployment, pause: float) -> Deployment:
        """The platform: what has ended is started again after a pause. The same one if it goes on living."""
        await asyncio.sleep(pause)
        if deployment.process.returncode is None:
            return deployment
        self.log(f"the platform restarts version {deployment.version}")
        return await self.deploy(deployment.version)

    async def reply(self, limit: float) -> None:
        """Until the bot answers somebody."""
        count = len(self.replies)
        async with asyncio.timeout(limit):
            while len(self.replies) == count:
                await asyncio.sleep(0.02)

    def kill(self, deployment: Deployment) -> None:
        self.event(f"kill -9 of version {deployment.version}")
        self.killed_at = clock.now()
        self.kill_it(deployment)

    def kill_it(self, deployment: Deployment) -> None:
        deployment.process.kill()

    async def close(self) -> None:
        for d in self.deployments:
            if d.process.returncode is None:
                d.process.send_signal(signal.SIGTERM)
        for d in self.deployments:
            try:
                await asyncio.wait_for(d.process.wait(), 15)
            except TimeoutError:
                d.process.kill()
                await d.process.wait()
        # A bot that outlived its manager would keep the pipe open, and the demo waiting.
        _, waiting = await asyncio.wait(self._tasks, timeout=2)
        for task in waiting:
            task.cancel()
        await self.simulator.stop()

    # What came of it -----------------------------------------------------------------------------------------

    def spans(self) -> list[tuple[int, int, float, float]]:
        """(pid, term, first, last) of each bot process at work."""
        seen: dict[tuple[int, int], tuple[float, float]] = {}
        if self.witness.exists():
            for line in self.witness.read_text().rpartition("\n")[0].splitlines():
                pid, term, at = line.split()
                key, when = (int(pid), int(term)), float(at)
                first, _ = seen.get(key, (when, when))
                seen[key] = (first, when)
        return sorted(((pid, term, a, b) for (pid, term), (a, b) in seen.items()), key=lambda s: s[2])

    def overlap(self) -> float:
        """Milliseconds in which two bots were at work, added up."""
        spans = self.spans()
        total = 0.0
        for i, (_, _, _, end) in enumerate(spans):
            for _, _, begin, last in spans[i + 1 :]:
                total += max(0.0, min(end, last) - begin)
        return total * 1000

    def gaps(self) -> list[float]:
        """For each handover the longest silence towards the users, in ms."""
        out = []
        for at, following in itertools.pairwise([*self.events, float("inf")]):
            # one that begins in this event's time, however long it lasts
            end = min(at + SETTLE, following - 1)
            steps = [b - a for a, b in itertools.pairwise(self.replies) if at - 1 <= a < end]
            out.append(max(steps, default=SETTLE) * 1000)
        return out

    def result(self) -> Result:
        report = self.simulator.report(self.bot_id)
        messages = self.simulator.messages[self.bot_id]
        at_kill = twice_at_kill = 0
        if self.killed_at is not None:
            at_kill = sum(
                m.confirmed_at is not None and m.confirmed_at <= self.killed_at + 0.01 and not m.replies
                for m in messages
                if m.sent_at > self.killed_at - 5
            )
            # Answered, and killed before its next poll could confirm that: the server hands it out again.
            twice_at_kill = sum(
                len(m.replies) > 1
                and self.killed_at - 1 < m.replies[0][0] <= self.killed_at + 0.05
                and (self.inbox or m.confirmed_at is None or m.confirmed_at > self.killed_at)
                for m in messages
            )
        return Result(
            handovers=len(self.spans()) - 1,
            overlap_ms=round(self.overlap(), 1),
            conflicts=report.conflicts,
            lost=report.lost - at_kill,
            twice=report.twice - twice_at_kill,
            lost_at_kill=at_kill,
            twice_at_kill=twice_at_kill,
            messages=report.messages,
            gaps_ms=tuple(round(g) for g in self.gaps()),
        )


class Ours(World):
    inbox = True

    def command(self, version: str) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "instance_manager.py"), "--pass-database", "--deployment", version),
            # short, for the demo; and the old ones stay for the operator's move
            *("--probation", "3", "--when-superseded", "stay"),
            *("--gateway", "--bot-api", self.simulator.url),
            *("--", *self.bot_command()),
        ]

    async def move(self, version: str) -> None:
        """The operator's statements, exactly as the seed gives them, on a connection of his own."""
        mine = f"bot = '{self.bot_id}' AND deployment = '{version}' AND ended_at IS NULL"
        rows = await seed.execute(self.url, f"SELECT instance_id FROM bot_instances WHERE {mine}")
        instance_id = rows[0][0]
        self.event(f"operator's SQL: {instance_id} (version {version}) is to be active")
        everybody = f"UPDATE bot_instances SET is_active = FALSE WHERE bot = '{self.bot_id}'"
        if self.url.startswith("sqlite"):
            everybody = "UPDATE bot_instances SET is_active = FALSE"  # nobody else's database
        await seed.execute(
            self.url, everybody, f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{instance_id}'"
        )


class Plain(World):
    async def open(self) -> None:
        await super().open()
        self.table = f"demo_seed_{self.bot_id}"
        await seed.execute(self.url, seed.create(self.table))

    def environment(self, version: str) -> dict[str, str]:
        # Its ledger has no terms to check: the plain design has none. A ledger of its own keeps it apart.
        return super().environment(version) | {"BOTLEASE_DATABASE_URL": f"sqlite:///{self.folder}/plain.db"}

    def command(self, version: str) -> list[str]:
        me = f"v{version}-{len(self.deployments)}"
        return [sys.executable, "-m", "demo.seed", self.url, self.table, me, *self.bot_command()]

    def kill_it(self, deployment: Deployment) -> None:
        """Manager and bot together, as when a container is killed: it has nothing that would end the bot."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(deployment.process.pid, signal.SIGKILL)

    async def deploy(self, version: str) -> Deployment:
        deployment = await super().deploy(version)
        deployment.instance_id = f"v{version}-{len(self.deployments) - 1}"
        return deployment

    async def move(self, version: str) -> None:
        living = [d for d in self.deployments if d.version == version and d.process.returncode is None]
        self.event(f"operator's SQL: {living[0].instance_id} is to be active")
        await seed.execute(
            self.url,
            f"UPDATE {self.table} SET is_active = FALSE",
            f"UPDATE {self.table} SET is_active = TRUE WHERE instance_id = '{living[0].instance_id}'",
        )

    async def close(self) -> None:
        await super().close()
        for deployment in self.deployments:
            self.kill_it(deployment)
        with contextlib.suppress(Exception):
            await seed.execute(self.url, f"DROP TABLE {self.table}")
