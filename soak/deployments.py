"""Whole deployments on this machine, for the nemesis: hosts, supervisors that their platform starts again, a database.

Where this user may, each host is a network namespace with one link to its own proxy, and every deployment is in cgroups
of its own. Otherwise a host is its proxy alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cgroups import CGROUPS, Cgroup, has_cgroups
from harness import BOTLEASE, clean_env
from netns import Netns, free_subnet, has_netns, has_pid_namespaces, is_left, sweep_namespaces
from proxy import Proxy
from servers import Postgres, forget_clocks, libfaketime, set_clock

from botlease.work.tree import descendants
from soak import ROOT
from soak.agreement import Harm
from soak.oracle import now

TESTS = ROOT / "tests"
GRACE = 0.5
"""Seconds, ``--stop-grace``."""
WORLDS = ("postgres", "sqlite", "postgres-clocks")
"""The database, and whether libfaketime is under it and under some supervisors."""


def is_root() -> bool:
    return os.geteuid() == 0


def sweep() -> None:
    """Take away what worlds left behind that were killed: the addresses of an old one would be those of a new one."""
    if has_netns():
        sweep_namespaces()
    if has_cgroups():
        for name in {path.parent.name for path in CGROUPS.glob("*/botlease-*/cgroup.procs")}:
            if is_left(name):
                Cgroup(name).remove()


class Host:
    """A machine: its way to the database can be cut in every way."""

    def __init__(self, number: int, subnet: int, database: int | None) -> None:
        self.number = number
        self.netns = Netns(number, subnet) if database and has_netns() else None
        self.proxy: Proxy | None = None
        self.database = database

    async def open(self) -> None:
        if self.netns is not None:
            self.netns.open()
        if self.database:
            proxy = Proxy(self.database, self.netns.here if self.netns is not None else "127.0.0.1")
            self.proxy = await proxy.__aenter__()

    def url(self) -> str:
        assert self.proxy is not None
        return f"postgresql://postgres@{self.proxy.host}:{self.proxy.port}/postgres"

    def iptables(self, *rule: str) -> None:
        assert self.netns is not None
        self.netns.iptables(*rule)

    async def close(self) -> None:
        if self.proxy is not None:
            await self.proxy.__aexit__()
        if self.netns is not None:
            self.netns.close()


@dataclass
class Traits:
    """What is odd about a deployment."""

    daemon: bool = False
    deaf: bool = False
    slow: float = 0.0
    spawns: float = 0.0
    warm: bool = False
    own_pids: bool = False
    inside: bool = False
    broken: float = 0.0
    user: bool = False
    rate: float = 1.0
    fake_time: bool = False

    @classmethod
    def draw(cls, rng: random.Random, *, fake_time: bool, own_pids: bool) -> Traits:
        kind = rng.choice(["plain", "daemon", "deaf", "slow", "spawns", "warm", "inside", "user", "plain"])
        made = cls(rate=rng.choice([1.0, 1.0, 0.9955, 1.0045]))
        if kind == "slow":
            made.slow = rng.uniform(0.05, 0.4)
        elif kind == "spawns":
            made.spawns = 0.5
        elif kind == "user":
            made.user = is_root()
        elif kind != "plain":
            setattr(made, kind, True)
        if made.rate == 1.0 and fake_time:
            made.fake_time = rng.random() < 0.5
        made.own_pids = own_pids and has_pid_namespaces() and rng.random() < 0.3
        return made


@dataclass
class Deployment:
    """One container of one deployment: started again by its platform whenever it ends, until it is retired."""

    world: World
    host: Host
    key: str
    traits: Traits
    number: int
    process: subprocess.Popen[bytes] | None = None
    retired: bool = False
    suspended: bool = False  # the platform waits
    starts: int = 0
    cgroup: Cgroup | None = None
    keeper: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        odd = [k for k, v in vars(self.traits).items() if v != getattr(Traits, k)]
        return f"{self.key}@{self.host.number}({' '.join(odd)})"

    @property
    def escapes(self) -> bool:
        """Something of it has no death signal, and its successor may be where it cannot kill it: with supervisor and
        reaper stopped before they have seen it, it would work on (docs/reliability.md, assumption 5)."""
        t = self.traits
        return self.world.several_hosts and (t.user or t.daemon or t.spawns > 0)

    @property
    def clock(self) -> Path:
        return self.world.folder / f"clock-{self.number}"

    @property
    def log(self) -> Path:
        return self.world.folder / f"log-{self.number}-{self.key}.txt"

    def _command(self) -> list[str]:
        w, t = self.world, self.traits
        command: list[str] = []
        if self.cgroup is not None:
            # inside before anything of it is forked
            script = "".join(f"echo $$ >{f} || exit 99; " for f in self.cgroup.files()) + 'exec "$@"'
            command += ["sh", "-c", script, "sh"]
        if self.host.netns is not None:
            command += self.host.netns.inside()
        if t.own_pids:
            command += ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if t.inside:
            return [*command, sys.executable, str(TESTS / "inside_witness.py"), str(w.witness), str(w.ttl), self.key]
        command += [*BOTLEASE, "run", "--ttl", str(w.ttl), "--stop-grace", str(GRACE), "--deployment", self.key]
        command += ["--probation", "2", "--max-crashes", "1", "--wait-database", "3", "--lock-delay", str(w.lock_delay)]
        if t.warm:
            command.append("--warm")
        bot = [sys.executable, "-S", str(TESTS / "witness.py"), str(w.witness), "--who", "1"]
        if t.daemon:
            bot += ["--daemon", "1"]
        if t.deaf:
            bot += ["--deaf", "1"]
        if t.slow:
            bot += ["--slow", str(t.slow)]
        if t.spawns:
            bot += ["--spawn", str(t.spawns)]
        if t.warm:
            bot += ["--gate", "fd"]
        if t.user:
            bot += ["--user", "65534"]
        if t.broken:
            bot += ["--for", str(t.broken), "--exit", "1"]
        if t.fake_time:
            bot = ["env", "-u", "LD_PRELOAD", *bot]
        return [*command, "--", *bot]

    def start(self) -> None:
        w, t = self.world, self.traits
        env = {"BOTLEASE_DATABASE_URL": w.url or self.host.url(), "XDG_RUNTIME_DIR": str(w.folder)}
        env |= {"PYTHONPATH": str(ROOT / "soak" / "site"), "SOAK_RATE": str(t.rate), "SOAK_PLANT": w.plant}
        if t.fake_time and w.library is not None:
            self.clock.write_text("+0")
            env |= {"LD_PRELOAD": str(w.library), "FAKETIME_TIMESTAMP_FILE": str(self.clock), "FAKETIME_NO_CACHE": "1"}
            env["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"
        with self.log.open("a") as out:
            out.write(f"--- start {self.starts} at {now():.3f}\n")
            out.flush()
            self.process = subprocess.Popen(
                self._command(), env=clean_env(**env), stdout=out, stderr=out, start_new_session=True
            )
        w.started.append(self.process.pid)
        self.starts += 1

    async def run(self) -> None:
        """The platform."""
        rng = random.Random(f"{self.world.seed}-{self.number}")
        while not self.retired:
            if self.process is None or self.process.poll() is not None:
                if self.process is not None:
                    self.world.tell(f"{self} ended with {self.process.returncode}")
                    await asyncio.sleep(rng.uniform(0.05, 0.4))
                if not self.retired and not self.suspended:
                    self.start()
            await asyncio.sleep(0.05)

    def begin(self) -> None:
        self.keeper = asyncio.create_task(self.run())

    def tree(self) -> list[int]:
        """Supervisor, reaper, bot, and what is below; without the wrappers around."""
        if self.process is None or self.process.poll() is not None:
            return []
        pids = [self.process.pid, *descendants(self.process.pid)]
        return pids[1:] if self.traits.own_pids else pids

    def part(self, name: str) -> list[int]:
        pids = self.tree()
        if self.traits.inside:
            return pids
        return {"supervisor": pids[:1], "reaper": pids[1:2], "bot": pids[2:], "everything": pids}[name]

    def send(self, name: str, number: int) -> bool:
        """Whether there was anybody."""
        sent = False
        for pid in self.part(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent = True
        return sent

    async def retire(self, number: int = signal.SIGTERM, limit: float = 8.0) -> None:
        """The platform ends it for good."""
        self.retired = True
        self.send("supervisor", number)
        end = now() + limit
        while self.process is not None and self.process.poll() is None:
            if now() > end:
                self.end()
            await asyncio.sleep(0.02)
        if self.keeper is not None:
            self.keeper.cancel()
        # What is left of it, if anything, stays in its cgroup: it must be seen to do no work.
        if self in self.world.deployments:
            self.world.deployments.remove(self)

    def end(self) -> None:
        """Of what is left, nothing."""
        self.retired = True
        if self.cgroup is not None:
            self.cgroup.freeze(False)
        for pid in reversed([*self.tree(), *([self.process.pid] if self.process else [])]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


@dataclass
class World:
    """One bot, its database, and everything that runs it."""

    seed: int
    store: str
    folder: Path
    ttl: float = 1.5
    fake_time: bool = False
    plant: str = ""
    lock_delay: float = field(init=False)
    rng: random.Random = field(init=False)
    hosts: list[Host] = field(default_factory=list)
    deployments: list[Deployment] = field(default_factory=list)
    cgroups: list[Cgroup] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    primary: Postgres | None = None
    servers: list[Postgres] = field(default_factory=list)
    """All that are to be stopped at the end."""
    closed: bool = False
    library: Path | None = None
    subnet: socket.socket | None = None
    count: int = 0
    started: list[int] = field(default_factory=list)
    """Every process of the platforms, in the order in which it started them."""
    harms: list[Harm] = field(default_factory=list)
    """What faults left in the database that ``verify`` may name."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        # a lock-delay hides whoever is late by less; without it the margin is that of the kill budget alone
        self.lock_delay = self.seed % 2
        self.folder.chmod(0o755)
        self.library = libfaketime() if self.fake_time else None
        self.fake_time = self.library is not None

    @property
    def several_hosts(self) -> bool:
        """Some deployments have a pid namespace of their own: a successor elsewhere cannot see what is left of them. Of
        the worlds on PostgreSQL every other one; in the rest whatever has no death signal is stopped and frozen too."""
        return self.store == "postgres" and self.seed // len(WORLDS) % 2 == 0

    @property
    def witness(self) -> Path:
        return self.folder / "witness.txt"

    @property
    def file(self) -> Path:
        return self.folder / "data" / "lease.db"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.file}" if self.store == "sqlite" else ""

    @property
    def direct(self) -> str:
        return self.url if self.primary is None else self.primary.url()

    def tell(self, text: str) -> None:
        self.story.append(f"{now():.3f} {text}")

    def new_replica(self) -> Postgres:
        """In a thread, whose world may be closed meanwhile."""
        assert self.primary is not None
        server = Postgres(copy_of=self.primary, fake_time=self._clock())
        self.servers.append(server)
        if self.closed:
            server.stop()
        return server.start()

    def _clock(self) -> tuple[Path, Path] | None:
        if self.library is None:
            return None
        clock = self.folder / "clock-database"
        if not clock.exists():
            clock.write_text("+0")
            clock.chmod(0o644)
        return self.library, clock

    def step_clock(self, seconds: float, rate: float = 1.0) -> None:
        """The database's. What it is ahead stays, what it drifts ends with the next step."""
        set_clock(self.folder / "clock-database", seconds, rate)

    async def open(self, hosts: int) -> None:
        if self.store == "postgres":
            self.primary = Postgres(fake_time=self._clock())
            self.servers.append(self.primary)
            self.primary.start()
        else:
            self.file.parent.mkdir(mode=0o700)
        subnet, self.subnet = free_subnet()
        for number in range(hosts):
            self.hosts.append(Host(number, subnet, None if self.primary is None else self.primary.port))
            await self.hosts[-1].open()
        for host in self.hosts:
            self.deploy(host, "v0")

    def deploy(self, host: Host, key: str, **odd: object) -> Deployment:
        traits = Traits.draw(self.rng, fake_time=self.fake_time, own_pids=self.several_hosts)
        for name, value in odd.items():
            setattr(traits, name, value)
        new = Deployment(self, host, key, traits, self.count)
        if has_cgroups():
            new.cgroup = Cgroup(f"botlease-{os.getpid()}-{self.count}")
            self.cgroups.append(new.cgroup)
        self.count += 1
        self.deployments.append(new)
        self.tell(f"deploy {new}")
        new.begin()
        return new

    def point_at(self, server: Postgres) -> None:
        self.primary = server
        for host in self.hosts:
            assert host.proxy is not None
            host.proxy.target = server.port
            host.proxy.reset()

    async def close(self) -> None:
        for d in [*self.deployments]:
            d.retired = True
            if d.keeper is not None:
                d.keeper.cancel()
            d.end()
        for cgroup in self.cgroups:
            cgroup.remove()
        for host in self.hosts:
            await host.close()
        if self.subnet is not None:
            self.subnet.close()
        self.closed = True
        for server in [*self.servers]:
            if server.process is not None:
                server.signal(signal.SIGCONT)
            server.stop()
        forget_clocks(self.started)
