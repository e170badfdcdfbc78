"""Namespaces, for root: of the network (hosts of their own on this machine, each with one link to it), and others."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path


@functools.cache
def has_netns() -> bool:
    """Root may make network namespaces; in a container that is not a given."""
    name = f"botlease-{os.getpid()}-probe"
    link = link_of(os.getpid(), "p")
    tries = (
        f"ip netns add {name}",
        f"ip link add {link} type veth peer name {link}p netns {name}",
        f"ip netns exec {name} iptables -S",
    )
    try:
        return os.geteuid() == 0 and all(subprocess.run(t.split(), capture_output=True).returncode == 0 for t in tries)
    except OSError:
        return False
    finally:
        if os.geteuid() == 0 and shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@functools.cache
def has_pid_namespaces() -> bool:
    try:
        tried = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    except OSError:
        return False
    return os.geteuid() == 0 and tried.returncode == 0


def is_the_root() -> bool:
    """Of the machine, and not of a user namespace."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]


def free_subnet() -> tuple[int, socket.socket]:
    """The second byte of addresses that nobody else on this machine has, for as long as the socket is open: two with
    the same get each other's packets. The kernel gives an abstract name to one only, until that dies."""
    taken = socket.socket(socket.AF_UNIX)
    for subnet in range(64, 192):
        with contextlib.suppress(OSError):
            taken.bind(f"\0botlease-nemesis-{subnet}")
            while has_netns() and loopback("-D", subnet):  # of one that was killed, and had this subnet before
                pass
            return subnet, taken
    raise RuntimeError("128 worlds are open already")


def loopback(what: str, subnet: int) -> bool:
    """Add (``-A``) or delete (``-D``) the rule that what comes from there for this machine is for its 127.0.0.1."""
    rule = ("PREROUTING", "-s", f"10.{subnet}.0.0/16", "-p", "tcp", "-j", "DNAT", "--to-destination", "127.0.0.1")
    return subprocess.run(["iptables", "-w", "-t", "nat", what, *rule], capture_output=True).returncode == 0


def is_left(name: str) -> bool:
    """Named by a process that is dead: its namespace, or its cgroup, was left behind."""
    pid = name.removeprefix("botlease-").partition("-")[0]
    return name.startswith("botlease-") and pid.isdigit() and not Path(f"/proc/{pid}").exists()


def sweep_namespaces() -> None:
    """Take away those that were left behind: the addresses of an old one would be those of a new one. What runs in one
    keeps it, without its name."""
    there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in {line.split()[0] for line in there.splitlines()}:
        if is_left(name):
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _delete(name)


def _delete(name: str) -> None:
    """The link by itself: with sockets of the dead in it the namespace is gone only when the kernel gives them up."""
    _, pid, number = name.split("-")
    subprocess.run(["ip", "link", "del", link_of(int(pid), number)], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def link_of(pid: int, number: str | int) -> str:
    """At most 15 characters."""
    return f"bl{pid % 100000}-{number}"


class Netns:
    """``here`` is the address of this machine as the namespace sees it."""

    def __init__(self, number: int, subnet: int) -> None:
        self.name = f"botlease-{os.getpid()}-{number}"
        self.link = link_of(os.getpid(), number)
        net = f"10.{subnet}.{number}"
        self.here, self.there = f"{net}.1", f"{net}.2"

    def open(self) -> None:
        peer = self.link + "p"
        for line in (
            f"netns add {self.name}",
            f"link add {self.link} type veth peer name {peer} netns {self.name}",
            f"addr add {self.here}/30 dev {self.link}",
            f"link set {self.link} up",
            f"-n {self.name} addr add {self.there}/30 dev {peer}",
            f"-n {self.name} link set {peer} up",
            f"-n {self.name} link set lo up",
        ):
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def inside(self) -> tuple[str, ...]:
        """What a command that is to run there begins with."""
        return ("ip", "netns", "exec", self.name)

    def iptables(self, *rule: str) -> None:
        subprocess.run([*self.inside(), "iptables", *rule], check=True, capture_output=True)

    def vanish(self) -> None:
        """The link is down: no packet comes or goes, nobody is told."""
        subprocess.run(["ip", "link", "set", self.link, "down"], check=True, capture_output=True)

    def close(self) -> None:
        _delete(self.name)
