"""Hosts that can vanish: network namespaces that reach the servers on this machine's loopback. For root."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError

from netns import Netns, free_subnet, has_netns, loopback, sweep_namespaces

MISSING = "no network namespaces"


class Hosts:
    """A connection from one of them ends at the server itself, and nothing in between answers for a host that is
    gone."""

    def __init__(self) -> None:
        self.missing = "" if has_netns() else f"{MISSING}: needs root, ip and iptables"
        """Why there are none."""
        self._free = [*range(256)]
        self._lock = threading.Lock()

    def __enter__(self) -> Hosts:
        if not self.missing:
            sweep_namespaces()
            self._subnet, self._taken = free_subnet()
            try:
                if not loopback("-A", self._subnet):
                    self.missing = f"{MISSING}: iptables has no table nat"
                with self.host():
                    pass
            except (OSError, CalledProcessError) as e:
                self.missing = f"{MISSING}: {e}"
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_taken"):
            loopback("-D", self._subnet)
            self._taken.close()

    @contextlib.contextmanager
    def host(self) -> Iterator[Netns]:
        with self._lock:
            number = self._free.pop(0)
        host = Netns(number, self._subnet)
        try:
            host.open()
            # else what comes over the link for 127.0.0.1 is thrown away
            Path(f"/proc/sys/net/ipv4/conf/{host.link}/route_localnet").write_text("1")
            yield host
        finally:
            host.close()
            with self._lock:
                self._free.append(number)
