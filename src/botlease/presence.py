"""Who of ours is on this machine: each instance leaves a note with boot id, pid and start time, for the local check.

A note that fits no living process says nothing, whoever has its pid by now. Nothing safe depends on these notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from botlease import procfs

_KINDS = {"host": str, "pid": int, "start": str, "bot": str, "instance_id": str, "stop_grace": int | float}


@dataclass(frozen=True, slots=True)
class Note:
    host: str
    pid: int
    start: str
    bot: str
    instance_id: str
    stop_grace: float = 10.0  # what a note of version 0.2.0 does not tell
    """Seconds that its work may take to stop."""

    @property
    def fits(self) -> bool:
        """The very process that wrote it lives, and is ours."""
        living = self.host == procfs.host() and procfs.start_time(self.pid) == self.start
        return living and procfs.owner(self.pid) == os.geteuid()


def folders(env: Mapping[str, str]) -> list[Path]:
    """Where notes may be, the best place first. A service and a shell of one user need not agree on the first."""
    out = []
    runtime = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if Path(runtime).is_dir():
        out.append(Path(runtime) / "botlease")
    state = env.get("XDG_STATE_HOME") or (f"{env['HOME']}/.local/state" if env.get("HOME") else "")
    if state:
        out.append(Path(state) / "botlease" / "run")
    return out


def _ours(folder: Path) -> bool:
    """A folder that is not a link, belongs to us, and nobody else may write to."""
    try:
        about = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def private_folder(folder: Path) -> None:
    """Make it, and what is missing above it, for us alone, whatever the umask. Raises OSError."""
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            with contextlib.suppress(FileExistsError):
                part.mkdir(mode=0o700)
                part.chmod(0o700)  # the mode of mkdir is only what the umask leaves of it


@contextlib.contextmanager
def announced(bot: str, instance_id: str, stop_grace: float, env: Mapping[str, str]) -> Iterator[Path | None]:
    """Leave a note while the block runs. None where no note can be left: that is no reason not to run."""
    start = procfs.start_time(os.getpid()) or ""
    path = _write(Note(procfs.host(), os.getpid(), start, bot, instance_id, stop_grace), env)
    try:
        yield path
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()


def _write(note: Note, env: Mapping[str, str]) -> Path | None:
    for folder in folders(env):
        with contextlib.suppress(OSError):
            private_folder(folder)
            if not _ours(folder):
                continue
            path = folder / f"{note.instance_id}.json"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.fchmod(fd, 0o600)
            with os.fdopen(fd, "w") as f:
                json.dump(asdict(note), f)
            return path
    return None


def notes(env: Mapping[str, str]) -> list[Note]:
    """The notes that fit. Those that do not are cleared away."""
    out = []
    for folder in folders(env):
        if not _ours(folder):
            continue
        for path in folder.glob("*.json"):
            note = _read(path)
            if note is not None and note.fits:
                out.append(note)
            elif note is not None and note.host == procfs.host():  # not that of another container with the same home
                with contextlib.suppress(OSError):
                    path.unlink()
    return out


def _read(path: Path) -> Note | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(fd) as f:
            values = json.loads(f.read(10_000))
        note = Note(**{k: values[k] for k in Note.__slots__ if k in values})  # a newer one may tell more
        if not all(isinstance(getattr(note, k), kind) for k, kind in _KINDS.items()):
            return None
        return note if 0 <= note.stop_grace <= 86400 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
