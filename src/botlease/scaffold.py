"""``botlease init``: the files a platform needs, written beside the bot. What is there already is never touched."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Final

from botlease.platforms import EVERY, named, slug

DOCKERFILE: Final = "Dockerfile"
WITH_DOCKERFILE: Final = frozenset({"fly", "kubernetes", "cloud-run", "coolify", "docker", "northflank"})
"""Those that build an image, and have no Dockerfile of their own."""

NEEDS: Final = (
    "put botlease[postgres] beside your bot in requirements.txt (from a checkout or wheel: it is not published yet)"
)
NEEDS_SYSTEM: Final = "install botlease[postgres] where the bot's Python is, so that `botlease` is in PATH"
THEN: Final[dict[str, tuple[str, ...]]] = {
    "railway": (
        "add PostgreSQL; Settings: health check path /health",
        "variables: DATABASE_URL=${{Postgres.DATABASE_URL}} BOT_TOKEN=... BOTLEASE_ENVIRONMENT=production "
        "RAILWAY_DEPLOYMENT_DRAINING_SECONDS=45",
    ),
    "heroku": (
        "heroku ps:scale web=0 worker=1",
        "heroku labs:enable runtime-dyno-metadata    so that a new release takes over at once",
        "heroku addons:create heroku-postgresql:essential-0; heroku config:set BOT_TOKEN=...",
    ),
    "render": ("render blueprint launch, or New > Blueprint in the dashboard",),
    "fly": ("fly secrets set BOT_TOKEN=... DATABASE_URL=...", "fly deploy --ha=false && fly scale count 1"),
    "kubernetes": (
        "kubectl create secret generic @APP@ --from-literal=BOT_TOKEN=... --from-literal=DATABASE_URL=...",
        "kubectl apply -f k8s.yaml",
    ),
    "cloud-run": ("sh cloud-run.sh",),
    "koyeb": ("REPOSITORY=github.com/you/@APP@ sh koyeb.sh",),
    "digitalocean": ("doctl apps create --spec .do/app.yaml",),
    "dokku": (
        "dokku ps:scale @APP@ web=0 worker=1",
        "dokku ps:set @APP@ stop-timeout-seconds 60; dokku config:set @APP@ BOTLEASE_PLATFORM_GRACE=60",
        "dokku checks:set @APP@ wait-to-retire 10    the old one has handed over long before",
    ),
    "coolify": (
        "enable the health check only with --health-port; stop grace period: 60, and BOTLEASE_PLATFORM_GRACE=60",
    ),
    "caprover": (
        'App Configs > Service Update Override: {"TaskTemplate": {"ContainerSpec": {"StopGracePeriod": 60000000000}}}',
        "App Configs > Environment: BOTLEASE_PLATFORM_GRACE=60    so that the bot may take that long to stop",
    ),
    "docker": ("docker compose up -d --build",),
    "systemd": (
        "sudo useradd --system @APP@    and your program goes to /opt/@APP@",
        "DATABASE_URL=... and BOT_TOKEN=... go to /etc/@APP@.env, mode 0600",
        "sudo cp @APP@.service /etc/systemd/system/ && sudo systemctl enable --now @APP@",
    ),
    "pm2": ("pm2 start ecosystem.config.js && pm2 save",),
    "northflank": (
        "a deployment service from the Dockerfile; grace period 60, and BOTLEASE_PLATFORM_GRACE=60",
        "DATABASE_URL and BOT_TOKEN as secrets",
    ),
    "plain": ("chmod +x run.sh && ./run.sh",),
}


class ScaffoldError(Exception):
    """The message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Done:
    files: tuple[tuple[str, str], ...]
    """(path, what became of it): wrote; same: it is there as it should be; kept: something else is there."""
    then: tuple[str, ...]


def offers() -> Iterator[tuple[str, str]]:
    """(name, what it writes) for each platform."""
    for platform in EVERY:
        name = slug(platform)
        yield name, ", ".join(str(path).replace("@APP@", "bot") for path, _ in _templates(name))


def _templates(name: str) -> Iterator[tuple[PurePosixPath, str]]:
    root = resources.files("botlease") / "deploy"
    if name in WITH_DOCKERFILE:
        yield PurePosixPath(DOCKERFILE), (root / DOCKERFILE).read_text()
    folder = root / name
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            for file in sorted(entry.iterdir(), key=lambda e: e.name):
                yield PurePosixPath(entry.name.replace("dot-", ".", 1), file.name), file.read_text()
        else:
            yield PurePosixPath(entry.name), entry.read_text()


def write(platform: str, folder: str, *, command: str, app: str) -> Done:
    """Raises ScaffoldError, before anything is written, for what cannot be."""
    found = named(platform)
    if found is None:
        raise ScaffoldError(f"no platform {platform!a}: `botlease init` lists them")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,29}", app):
        raise ScaffoldError(f"--app {app!a}: take up to 30 small letters, digits and -, a letter first")
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise ScaffoldError(f"--command {command!a}: {e}") from None
    if not words or not command.isprintable() or any(c in command for c in "\"'\\$`{}"):
        raise ScaffoldError(f"--command {command!a}: take plain words; put anything else into a script")
    values = {
        "@APP@": app,
        "@START@": " ".join(words),
        "@ARGV@": json.dumps(["botlease", "run", "--", *words]),
        "@HEALTHY_ARGV@": json.dumps(
            ["botlease", "run", "--health-port", "8080", "--health-host", "0.0.0.0", "--", *words]  # noqa: S104
        ),
    }

    def fill(text: str) -> str:
        return re.sub(r"@[A-Z_]+@", lambda m: values.get(m[0], m[0]), text)

    name = slug(found)
    files = [(fill(str(path)), fill(text)) for path, text in _templates(name)]
    return Done(
        tuple((path, _put(Path(folder) / path, text)) for path, text in files),
        tuple(fill(t) for t in (NEEDS_SYSTEM if name in ("systemd", "pm2", "plain") else NEEDS, *THEN[name])),
    )


def _put(path: Path, text: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Exclusive: what came to be there in the meantime, a dangling link included, is not written through.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as f:
            f.write(text)
    except FileExistsError:
        try:
            return "same" if path.read_text() == text else "kept"
        except (OSError, UnicodeDecodeError):
            return "kept"
    except OSError as e:
        raise ScaffoldError(f"cannot write {path}: {e.strerror}") from None
    return "wrote"
