"""The servers that peers need: one node each, on a free port of 127.0.0.1, at default durability. Stopped by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from servers import free_port


class Missing(Exception):
    """The server is not on this machine; the message says what would bring it."""


class Service:
    """A process with a folder of its own."""

    name = ""
    package = ""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"bench-{self.name}-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def version(self) -> str:
        raise NotImplementedError

    def start(self) -> None:
        command = self.command()
        if shutil.which(command[0]) is None:
            self.stop()  # the folder
            raise Missing(f"{command[0]} is not installed (Debian: {self.package})")
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        end = time.monotonic() + 30
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                log_text = (self.folder / "log").read_text(errors="replace")[-400:]
                self.stop()
                raise Missing(f"{self.name} does not start: {log_text}")
            time.sleep(0.05)

    def answers(self) -> bool:
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _says(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


class Etcd(Service):
    name, package = "etcd", "etcd-server, etcd-client"

    def command(self) -> list[str]:
        here, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{free_port()}"
        return [
            *("etcd", "--data-dir", "data", "--listen-client-urls", here, "--advertise-client-urls", here),
            *(
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"default={peer}",
            ),
        ]

    def version(self) -> str:
        return _says("etcd", "--version").split()[2]

    def answers(self) -> bool:
        done = subprocess.run(
            ["etcdctl", "--endpoints", f"127.0.0.1:{self.port}", "endpoint", "health"],
            env=os.environ | {"ETCDCTL_API": "3"},
            capture_output=True,
        )
        return done.returncode == 0


class Redis(Service):
    name, package = "redis", "redis-server"

    def command(self) -> list[str]:
        return [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--protected-mode",
            "no",
            "--dir",
            str(self.folder),
        ]

    def version(self) -> str:
        return _says("redis-server", "--version").split("v=")[1].split()[0]


class ZooKeeper(Service):
    name, package = "zookeeper", "zookeeper, default-jre-headless"

    def command(self) -> list[str]:
        (self.folder / "zoo.cfg").write_text(
            f"tickTime=2000\ndataDir={self.folder}/data\nclientPort={self.port}\nclientPortAddress=127.0.0.1\n"
            "admin.enableServer=false\n"
        )
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        return ["java", "-Xmx256m", "-cp", "/usr/share/java/*:/etc/zookeeper/conf", main, str(self.folder / "zoo.cfg")]

    def version(self) -> str:
        jars = sorted(Path("/usr/share/java").glob("zookeeper-[0-9]*.jar"))
        return jars[-1].stem.removeprefix("zookeeper-") if jars else "?"


class Consul(Service):
    name, package = "consul", "none in Debian 12, nor a package of it in PyPI or npm"

    def command(self) -> list[str]:
        return [
            *("consul", "agent", "-dev", "-client", "127.0.0.1", "-http-port", str(self.port), "-dns-port", "-1"),
            *("-grpc-port", "-1", "-serf-lan-port", str(free_port()), "-server-port", str(free_port())),
        ]

    def version(self) -> str:
        return _says("consul", "version").split()[1]
