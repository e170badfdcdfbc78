"""Control groups, to do to some processes what a container platform can."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
KINDS = ("freezer", "cpu", "memory")


class Cgroup:
    """One deployment's own: to freeze it, to starve it, to take its memory away. Both versions of cgroups."""

    def __init__(self, name: str) -> None:
        self.paths: dict[str, Path] = {}
        for kind in KINDS:
            old, new = CGROUPS / kind, CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
            if old.is_dir():
                self.paths[kind] = old / name
            elif kind == "freezer" or kind in (new / "cgroup.subtree_control").read_text().split():
                self.paths[kind] = new / name
        for path in {*self.paths.values()}:
            path.mkdir(exist_ok=True)

    def _write(self, kind: str, file: str, value: object) -> bool:
        """Whether the kernel took it; not if the group is gone."""
        with contextlib.suppress(OSError):
            (self.paths[kind] / file).write_text(str(value))
            return True
        return False

    def has(self, kind: str) -> bool:
        return kind in self.paths

    def files(self) -> list[str]:
        return sorted({str(p / "cgroup.procs") for p in self.paths.values()})

    def _is_old(self, kind: str) -> bool:
        return self.paths[kind].parent.name == kind

    def freeze(self, frozen: bool) -> bool:
        if self._is_old("freezer"):
            return self._write("freezer", "freezer.state", "FROZEN" if frozen else "THAWED")
        return self._write("freezer", "cgroup.freeze", int(frozen))

    def starve(self, part: float | None) -> bool:
        """At most this part of a core."""
        period = 100_000
        if self._is_old("cpu"):
            self._write("cpu", "cpu.cfs_period_us", period)
            return self._write("cpu", "cpu.cfs_quota_us", -1 if part is None else int(part * period))
        return self._write("cpu", "cpu.max", f"{'max' if part is None else int(part * period)} {period}")

    def used(self) -> int:
        file = "memory.usage_in_bytes" if self._is_old("memory") else "memory.current"
        return int((self.paths["memory"] / file).read_text())

    def limit(self, size: int | None) -> None:
        if self._is_old("memory"):
            self._write("memory", "memory.limit_in_bytes", -1 if size is None else size)
        else:
            self._write("memory", "memory.max", "max" if size is None else size)

    def killed(self) -> int:
        """How many processes the kernel has killed in it for want of memory."""
        file = "memory.oom_control" if self._is_old("memory") else "memory.events"
        with contextlib.suppress(OSError):
            for line in (self.paths["memory"] / file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def remove(self) -> None:
        """When its last process is gone, which the kernel says a moment late; it is killed."""
        self.freeze(False)
        for file in self.files():
            with contextlib.suppress(OSError):
                for pid in Path(file).read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
        for path in {*self.paths.values()}:
            for _ in range(100):
                try:
                    path.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


@functools.cache
def has_cgroups() -> bool:
    try:
        probe = Cgroup(f"botlease-{os.getpid()}-probe")
    except OSError:
        return False
    probe.remove()
    return os.geteuid() == 0 and bool(probe.paths)
