"""Hosting platforms as data: how each is recognised and which variable names the deployment.

A key must be new for each deployment. What repeats after a roll-back (commit, image, revision name) still
works: such an instance only fills the vacancy when the newer one is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Platform:
    name: str
    detect: str  # the variable whose presence tells
    deployment: tuple[str, ...]  # the first of these that is set
    stop_grace: float  # seconds from the stop signal to SIGKILL, as the platform documents it
    health_window: float = 0.0  # seconds for which /health may wait for a handover


PLATFORMS: Final = (
    # Railway stops the old container once /health says 200; without that window it is killed unasked.
    Platform("Railway", "RAILWAY_ENVIRONMENT_ID", ("RAILWAY_DEPLOYMENT_ID",), 0, health_window=120),
    Platform("Heroku", "DYNO", ("HEROKU_RELEASE_VERSION",), 30),
    Platform("Render", "RENDER", ("RENDER_GIT_COMMIT",), 30),
    Platform("Fly.io", "FLY_APP_NAME", ("FLY_MACHINE_VERSION",), 5),
    Platform("Koyeb", "KOYEB_SERVICE_ID", ("KOYEB_REGIONAL_DEPLOYMENT_ID",), 30),
    Platform("Cloud Run", "K_SERVICE", ("K_REVISION", "CLOUD_RUN_REVISION"), 10),
    Platform("Kubernetes", "KUBERNETES_SERVICE_HOST", ("POD_TEMPLATE_HASH",), 30),
    Platform("Northflank", "NF_OBJECT_ID", ("NF_DEPLOYMENT_SHA",), 30),
    Platform("pm2", "pm_id", ("pm_uptime",), 1.6),
)
SYSTEMD: Final = Platform("systemd", "SYSTEMD_EXEC_PID", ("INVOCATION_ID",), 90)
PLAIN: Final = Platform("plain", "", (), 10)


def detect(env: Mapping[str, str], pid: int = 0) -> Platform:
    """``pid`` is our own: a terminal on a desktop inherits systemd's variables, but is not what it started."""
    if pid and env.get(SYSTEMD.detect) == str(pid):
        return SYSTEMD
    for platform in PLATFORMS:
        if env.get(platform.detect):
            return platform
    # Railway sets several in a container; RAILWAY_TOKEN and the like stand on laptops, too.
    if any(env.get(name) for name in ("RAILWAY_DEPLOYMENT_ID", "RAILWAY_SERVICE_ID", "RAILWAY_REPLICA_ID")):
        return PLATFORMS[0]
    return PLAIN


def deployment_key(platform: Platform, env: Mapping[str, str]) -> str | None:
    """The deployment this process belongs to, or None: then every start is one of its own, made by hand."""
    for name in platform.deployment:
        if env.get(name):
            return f"{platform.name.lower()}:{env[name]}"
    return None
