"""What is compared: each system with its version, its settings and the command that runs a bot under it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from harness import BOTLEASE, clean_env

from bench import ROOT

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
HOLDER = str(ROOT / "bench" / "holder.py")
Command = Callable[[str, str, tuple[str, ...]], list[str]]
CHILD = (sys.executable, "-I", "-S", str(ROOT / "tests" / "witness.py"))
WHO = ("--who", "1")
"""The child says whose it is: in namespaces numbers of processes are given more than once."""


@dataclass
class System:
    """``command(url, key, child)`` runs the child while it has the lock of ``key``."""

    name: str
    server: str
    """Which one it needs: postgres, etcd, redis, zookeeper, consul, file."""
    ttl: float
    """Seconds after which a lease that nobody renews is over; 0: the lock is held by a session or a process."""
    settings: str
    command: Command
    scheme: str = "{server}"
    env: Callable[[str, str], dict[str, str]] = lambda url, key: {}
    group: bool = False
    """It does not pass a signal on: as a platform does, the whole group gets it."""
    package: str = ""
    ours: bool = False
    exclusive: bool = True
    """False: a second one works at once, and the first finds out."""
    bare: bool = False
    """It can be measured without a child, in-process."""
    only: tuple[str, ...] = ()
    """The jobs that it is there for; all, if empty."""
    overlaps: bool = True
    """False: it waits for half a minute or more, and its faster settings stand for it."""
    slow: bool = False
    """Its handover waits for a lease or a look of seconds: many are measured at once."""
    returns: bool = False
    """Where a second one works at once: whether the first takes over again when that is dead."""
    renewed: float = 1 / 3
    """How often, in parts of the ttl."""

    def version(self) -> str:
        if self.ours:
            import botlease

            return botlease.__version__
        if self.package and PEERS_PYTHON.exists():
            code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
            done = subprocess.run([PEERS_PYTHON, "-c", code], capture_output=True, text=True)
            return done.stdout.strip() or "?"
        program = self.command("u", "k", ("-", "-"))[0]
        said = subprocess.run(
            [program, "version" if program == "etcdctl" else "--version"], capture_output=True, text=True
        )
        return next((word for word in said.stdout.split() if word[0].isdigit()), "")


KEEPALIVE = "the server looks after 1 s for who is gone, 3 times (tcp_keepalives)"
LOOK = "-c tcp_keepalives_idle=1 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=3"

RENEWED = {"tooz": 1 / 2, "mithril": 2 / 3, "python-redis-lock": 2 / 3, "seed": 1.0, "notifelect": 1.0}
"""Where it is not a third: read in their sources."""


def _library(peer: str, ttl: float) -> Command:
    return lambda url, key, child: [str(PEERS_PYTHON), HOLDER, peer, url, key, f"{ttl:g}", *child]


def library(
    name: str,
    server: str,
    ttl: float,
    settings: str,
    package: str,
    peer: str = "",
    scheme: str = "",
    *,
    overlaps: bool = True,
) -> System:
    peer = peer or name
    return System(
        name,
        server,
        ttl,
        settings,
        _library(peer, ttl or 10),
        scheme=scheme or "{server}",
        package=package,
        bare=peer not in ("seed", "notifelect"),
        exclusive=peer not in ("seed", "notifelect"),
        overlaps=overlaps,
        returns=peer == "notifelect",
        renewed=RENEWED.get(peer, 1 / 3),
    )


def _kept_alive(system: System) -> System:
    """It differs only where a host is gone."""
    return replace(system, env=lambda url, key: {"PGOPTIONS": LOOK}, only=("elsewhere",))


def _ours(*options: str) -> Command:
    return lambda url, key, child: [*BOTLEASE, "run", "--name", key, "--deployment", "v1", *options, "--", *child]


def ours(name: str, server: str, ttl: float, settings: str, *options: str) -> System:
    return _of_ours(name, server, ttl, settings, _ours("--ttl", f"{ttl:g}", *options))


def warm(name: str, server: str) -> System:
    """The child is started before its turn, and waits at its gate."""
    run = _ours("--ttl", "10", "--warm")
    return _of_ours(
        name, server, 10, "--warm", lambda url, key, child: [*run(url, key, child), "--gate", "fd"], "handover"
    )


def plain(name: str, server: str) -> System:
    """As a bot in another language is started: no interpreter of it is loaded ahead."""
    return _of_ours(name, server, 10, "--no-ahead", _ours("--ttl", "10", "--no-ahead"), "handover")


def inside(name: str, server: str) -> System:
    """Beside the libraries: ``botlease.active`` in a program, without a child."""
    program = [sys.executable, str(ROOT / "bench" / "inside.py")]
    return _of_ours(name, server, 10, "in a program", lambda url, key, child: [*program, key, child[1]], "in-process")


def _of_ours(name: str, server: str, ttl: float, settings: str, command: Command, *only: str) -> System:
    return System(
        name,
        server,
        ttl,
        settings,
        command,
        scheme="sqlite:///{file}" if server == "file" else "{server}",
        env=lambda url, key: {"BOTLEASE_DATABASE_URL": url},
        ours=True,
        bare="in-process" in only,
        only=only,
        renewed=1 / 5,
    )


def systems() -> list[System]:
    return [
        ours("botlease, SQLite", "file", 10, "defaults"),
        ours("botlease, PostgreSQL", "postgres", 10, "defaults"),
        ours("botlease-fast, PostgreSQL", "postgres", 3, "--ttl 3"),
        plain("botlease, any program, SQLite", "file"),
        plain("botlease, any program, PostgreSQL", "postgres"),
        warm("botlease, warm, SQLite", "file"),
        warm("botlease, warm, PostgreSQL", "postgres"),
        inside("botlease.active, SQLite", "file"),
        inside("botlease.active, PostgreSQL", "postgres"),
        System("flock", "file", 0, "util-linux", lambda url, key, child: ["flock", url, *child], group=True),
        System("flock -o", "file", 0, "the child does not have it", lambda url, key, child: ["flock", "-o", url, *child], group=True),
        library("filelock", "file", 0, "defaults: polls each 50 ms", "filelock"),
        library("filelock-fast", "file", 0, "polls each 5 ms", "filelock", "filelock-fast"),
        library("pg-advisory", "postgres", 0, "psycopg 3, blocking", "psycopg"),
        replace(
            library("pg-advisory-fast", "postgres", 0, f"{KEEPALIVE}; it asks each 0.3 s, and the server ends who is silent for 1 s (idle_session_timeout)", "psycopg"),
            env=lambda url, key: {"PGOPTIONS": f"{LOOK} -c idle_session_timeout=1s"},
        ),
        library("sqlalchemy-dlock", "postgres", 0, "defaults", "sqlalchemy-dlock"),
        _kept_alive(library("sqlalchemy-dlock-fast", "postgres", 0, KEEPALIVE, "sqlalchemy-dlock", "sqlalchemy-dlock")),
        library("pals", "postgres", 0, "defaults", "pals"),
        _kept_alive(library("pals-fast", "postgres", 0, KEEPALIVE, "pals", "pals")),
        library("tooz-pg", "postgres", 0, "defaults", "tooz", "tooz"),
        _kept_alive(library("tooz-pg-fast", "postgres", 0, KEEPALIVE, "tooz", "tooz")),
        library("tooz-etcd", "etcd", 30, "defaults", "tooz", "tooz", "etcd3+http://{host}:{port}", overlaps=False),
        library("tooz-etcd-fast", "etcd", 2, "timeout 2 s", "tooz", "tooz", "etcd3+http://{host}:{port}?timeout=2"),
        library("tooz-redis", "redis", 30, "defaults", "tooz", "tooz", "redis://{host}:{port}", overlaps=False),
        library("tooz-redis-fast", "redis", 2, "timeout 2 s", "tooz", "tooz", "redis://{host}:{port}?timeout=2&lock_timeout=2"),
        library("tooz-zk", "zookeeper", 10, "defaults", "tooz", "tooz", "zookeeper://{host}:{port}", overlaps=False),
        library("tooz-zk-fast", "zookeeper", 4, "timeout 4 s, the server's least", "tooz", "tooz", "zookeeper://{host}:{port}?timeout=4"),
        library("redis-py", "redis", 10, "10 s, extended each third by us", "redis"),
        library("redis-py-fast", "redis", 2, "2 s, polls each 10 ms", "redis", "redis-py"),
        library("python-redis-lock", "redis", 10, "10 s, auto_renewal", "python-redis-lock", overlaps=False),
        library("python-redis-lock-fast", "redis", 2, "2 s, auto_renewal", "python-redis-lock", "python-redis-lock"),
        library("kazoo", "zookeeper", 10, "session 10 s", "kazoo", scheme="{host}:{port}"),
        library("kazoo-fast", "zookeeper", 4, "session 4 s, the server's least", "kazoo", "kazoo", "{host}:{port}"),
        library("dislock", "postgres", 60, "defaults; waits by our loop of 1 s", "dislock", overlaps=False),
        library("dislock-fast", "postgres", 2, "ttl 2 s, renewed each 0.5; waits by our loop of 50 ms", "dislock", "dislock"),
        library("mithril", "redis", 30, "defaults, auto_renewal", "mithril-locks", overlaps=False),
        library("mithril-fast", "redis", 2, "ttl 2 s, auto_renewal", "mithril-locks", "mithril"),
        System(
            "etcdctl lock", "etcd", 10, "defaults",
            lambda url, key, child: ["etcdctl", "--endpoints", url, "lock", key, "--", *child],
            scheme="{host}:{port}", env=lambda url, key: {"ETCDCTL_API": "3"}, group=True,
        ),
        System(
            "etcdctl lock-fast", "etcd", 2, "--ttl 2",
            lambda url, key, child: ["etcdctl", "--endpoints", url, "lock", "--ttl", "2", key, "--", *child],
            scheme="{host}:{port}", env=lambda url, key: {"ETCDCTL_API": "3"}, group=True,
        ),
        System(
            "consul lock", "consul", 15, "defaults",
            lambda url, key, child: ["consul", "lock", f"-http-addr={url}", key, *child],
            scheme="{host}:{port}",
        ),
        _single_beat("single-beat", 5, "defaults", {}),
        _single_beat("single-beat-fast", 3, "LOCK_TIME 3, INITIAL_LOCK_TIME 4, the least", {"SINGLE_BEAT_LOCK_TIME": "3", "SINGLE_BEAT_INITIAL_LOCK_TIME": "4"}),
        library("notifelect", "postgres", 25, "defaults: 20 s + 5 s", "notifelect", overlaps=False),
        library("notifelect-fast", "postgres", 1.5, "1 s + 0.5 s", "notifelect", "notifelect"),
        library("seed's plain design", "postgres", 10, "heartbeat 10 s", "psycopg", "seed"),
        library("seed-fast", "postgres", 1, "heartbeat 1 s", "psycopg", "seed"),
        replace(
            library("no lock at all", "file", 0, "the program that libraries are measured in", "psycopg", "none"),
            only=("start-up", "idle"), exclusive=False,
        ),
    ]  # fmt: skip


def _single_beat(name: str, ttl: float, settings: str, env: dict[str, str]) -> System:
    return System(
        name,
        "redis",
        ttl,
        settings,
        lambda url, key, child: [str(PEERS_PYTHON.parent / "single-beat"), *child],
        env=lambda url, key: {"SINGLE_BEAT_REDIS_SERVER": url, "SINGLE_BEAT_IDENTIFIER": key, **env},
        package="single-beat",
        slow=True,
    )


def environment(system: System, url: str, key: str) -> dict[str, str]:
    return clean_env(**system.env(url, key))


def unavailable(system: System, servers: dict[str, str]) -> str:
    """Why it cannot be measured here, or nothing. ``servers``: what is wrong with each that did not start."""
    if system.server in servers:
        return servers[system.server]
    if system.package and not (PEERS_PYTHON.parents[1] / ".installed").exists():
        return "its package could not be installed (requirements/peers.txt): what pip said stands where this run began"
    program = system.command("u", "k", ("-", "-"))[0]
    return (
        ""
        if shutil.which(program, path=f"{PEERS_PYTHON.parent}:{os.environ['PATH']}") or Path(program).exists()
        else f"{program} is not installed"
    )
