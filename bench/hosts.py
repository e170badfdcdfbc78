"""Hosts that can vanish: network namespaces that reach the servers on this machine's loopback. For root."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from netns import Netns, free_subnet, has_netns, sweep_namespaces

MISSING = "needs network namespaces: root, ip and iptables"


class Hosts:
    """A connection from one of them ends at the server itself, and nothing in between answers for a host that is
    gone."""

    def __init__(self) -> None:
        self.there = has_netns()
        self._free = [*range(256)]
        self._lock = threading.Lock()

    def __enter__(self) -> Hosts:
        if self.there:
            self.subnet, self._taken = free_subnet()
            sweep_namespaces()
            while self._rule("-D"):  # of one that was killed, and had this subnet before us
                pass
            self.there = self._rule("-A")
        return self

    def __exit__(self, *_: object) -> None:
        if self.there:
            self._rule("-D")
            self._taken.close()

    def _rule(self, what: str) -> bool:
        to = ("-j", "DNAT", "--to-destination", "127.0.0.1")
        rule = ["iptables", "-t", "nat", what, "PREROUTING", "-s", f"10.{self.subnet}.0.0/16", "-p", "tcp", *to]
        return subprocess.run(rule, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def host(self) -> Iterator[Netns]:
        with self._lock:
            number = self._free.pop(0)
        host = Netns(number, self.subnet)
        try:
            host.open()
            # else what comes over the link for 127.0.0.1 is thrown away
            Path(f"/proc/sys/net/ipv4/conf/{host.link}/route_localnet").write_text("1")
            yield host
        finally:
            host.close()
            with self._lock:
                self._free.append(number)
