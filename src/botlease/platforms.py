"""Hosting platforms as data: how each is recognised, what it tells a process, and how it replaces one.

A deployment key should be new for each deployment. One that repeats after a roll-back (commit, image, revision name,
pod template) still works: such an instance fills the vacancy when the newer one is stopped, and is then the newest.
What each line rests on: docs/platforms.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from botlease.value import value

Source = tuple[str, str]
"""A variable, and a regular expression whose first group is the part that counts ("": all of it)."""

CONTAINER: Final = r"([0-9a-f]{12})"
"""Docker's short container id, which is the host name unless somebody sets one. A new container is a new deployment;
one that is restarted keeps its name."""
POD: Final = r".+-([bcdfghjklmnpqrstvwxz2456789]{8,10})-[bcdfghjklmnpqrstvwxz2456789]{5}"
"""A pod's name in a Deployment: name, template hash, suffix, in the alphabet that Kubernetes draws them from."""


@value
class Platform:
    name: str
    detect: tuple[Source, ...] = ()
    """Any of these that is set and fits tells."""
    deployment: tuple[Source, ...] = ()
    """The first of these that is set and fits is the deployment key. It must be the same after a restart. None at all:
    a new one stands by until the old one is stopped; BOTLEASE_DEPLOYMENT says otherwise."""
    instance: tuple[str, ...] = ()
    """What the platform calls this one process or container."""
    environment: tuple[str, ...] = ()
    """Where it says which environment this is: production, staging, a preview."""
    preview: tuple[tuple[str, str], ...] = ()
    """(variable, value): it says that this is a preview of a change. "": any value."""
    stop_signal: str = "SIGTERM"
    stop_grace: float = 30
    """Seconds from the stop signal to SIGKILL, as documented, or the default where it can be set."""
    grace_variable: str = ""
    """Where the process can read what was set instead."""
    grace_cure: str = ""
    """How to get more of it."""
    health: str = "none"
    """Whether something asks for an HTTP answer: none, or optional (if it is set up, or for some kinds of service)."""
    health_window: float = 0
    """Seconds for which /health may wait for the handover and the probation. Only where the old one is kept alive
    until /health says 200, and a deployment that never does so is given up in favour of the old one."""
    restarts: bool = True
    """It starts a process again that ends with exit code 0 unasked: a superseded one had better stay."""
    beside: str = ""
    """A variable that must be set as well as the one that tells."""


def _all(*names: str) -> tuple[Source, ...]:
    return tuple((name, "") for name in names)


PLATFORMS: Final = (
    Platform(
        "Railway",
        # RAILWAY_TOKEN and the like stand on laptops, too.
        _all("RAILWAY_ENVIRONMENT_ID", "RAILWAY_DEPLOYMENT_ID", "RAILWAY_SERVICE_ID", "RAILWAY_REPLICA_ID"),
        _all("RAILWAY_DEPLOYMENT_ID"),
        ("RAILWAY_REPLICA_ID",),
        ("RAILWAY_ENVIRONMENT_NAME",),
        stop_grace=0,
        grace_variable="RAILWAY_DEPLOYMENT_DRAINING_SECONDS",
        grace_cure="set the service variable RAILWAY_DEPLOYMENT_DRAINING_SECONDS",
        health="optional",
        # Railway gives the new one 300 s by default: this leaves room for the start.
        health_window=120,
        restarts=False,
    ),
    Platform(
        "Dokku",
        _all("GIT_REV"),  # DYNO alone is Heroku's
        (("HOSTNAME", CONTAINER),),
        ("DYNO",),
        beside="DYNO",
        grace_cure="dokku ps:set APP stop-timeout-seconds N",
        restarts=False,
    ),
    Platform(
        "Heroku",
        _all("DYNO"),
        _all("HEROKU_RELEASE_VERSION"),
        ("HEROKU_DYNO_ID", "DYNO"),
        ("HEROKU_APP_NAME",),
        (("HEROKU_PR_NUMBER", ""),),
        grace_cure="it is fixed: let the bot stop within 25 s",
    ),
    Platform(
        "Render",
        _all("RENDER"),
        _all("RENDER_GIT_COMMIT"),
        ("RENDER_INSTANCE_ID",),
        ("RENDER_SERVICE_NAME",),
        (("IS_PULL_REQUEST", "true"),),
        grace_cure="set maxShutdownDelaySeconds in render.yaml",
        health="optional",
    ),
    Platform(
        "Fly.io",
        _all("FLY_APP_NAME"),
        _all("FLY_MACHINE_VERSION"),
        ("FLY_MACHINE_ID",),
        ("FLY_APP_NAME",),
        stop_signal="SIGINT",
        stop_grace=5,
        grace_cure="set kill_timeout in fly.toml",
        health="optional",
        restarts=False,
    ),
    Platform(
        "Koyeb",
        _all("KOYEB_SERVICE_ID"),
        _all("KOYEB_REGIONAL_DEPLOYMENT_ID"),
        ("KOYEB_INSTANCE_ID",),
        ("KOYEB_APP_NAME",),
        stop_grace=0,
        grace_cure="its length is not documented: let the bot stop quickly",
        health="optional",
    ),
    Platform(
        "Cloud Run",
        _all("K_SERVICE", "CLOUD_RUN_WORKER_POOL"),
        _all("K_REVISION", "CLOUD_RUN_REVISION"),
        (),
        ("K_SERVICE", "CLOUD_RUN_WORKER_POOL"),
        stop_grace=10,
        grace_cure="it is fixed: let the bot stop within 8 s",
        health="optional",  # a service must answer on its port, a worker pool has none
    ),
    Platform(
        "Northflank",
        _all("NF_OBJECT_ID"),
        _all("NF_DEPLOYMENT_SHA"),
        (),
        ("NF_PROJECT_ID",),
        grace_cure="set gracePeriodSeconds of the service",
        health="optional",
    ),
    Platform(
        "Coolify",
        _all("COOLIFY_CONTAINER_NAME", "COOLIFY_RESOURCE_UUID"),
        (("COOLIFY_CONTAINER_NAME", ""), ("HOSTNAME", CONTAINER)),
        ("COOLIFY_CONTAINER_NAME",),
        ("COOLIFY_BRANCH",),
        grace_cure="set the stop grace period in the application's settings",
        health="optional",
    ),
    Platform(
        "CapRover",
        # set while the image is built; `botlease init caprover` says how to keep it
        _all("CAPROVER_GIT_COMMIT_SHA"),
        (("HOSTNAME", CONTAINER),),
        ("HOSTNAME",),
        stop_grace=10,
        grace_cure="set StopGracePeriod in the service update override",
    ),
    Platform(
        "DigitalOcean",
        # documents no variable of its own: `botlease init digitalocean` sets BOTLEASE_PLATFORM
        (),
        (("HOSTNAME", ""),),
        ("HOSTNAME",),
        stop_grace=120,
        grace_cure="set termination.grace_period_seconds in app.yaml",
    ),
    Platform(
        "Kubernetes",
        _all("KUBERNETES_SERVICE_HOST"),
        (("POD_TEMPLATE_HASH", ""), ("HOSTNAME", POD)),
        ("POD_NAME", "HOSTNAME"),
        ("POD_NAMESPACE",),
        grace_cure="set terminationGracePeriodSeconds of the pod",
        health="optional",
    ),
    Platform(
        "pm2",
        _all("pm_id"),
        # pm_uptime and unique_id are new at each restart: a bot that crashes would be the newest each time
        (),
        ("unique_id", "pm_id"),
        stop_signal="SIGINT",
        stop_grace=1.6,
        grace_cure="set kill_timeout in ecosystem.config.js",
    ),
    Platform(
        "Docker",  # Compose and Swarm
        (("HOSTNAME", CONTAINER),),
        (("BOTLEASE_TASK", ""), ("HOSTNAME", CONTAINER)),
        ("HOSTNAME",),
        stop_grace=10,
        grace_cure="set stop_grace_period of the service",
    ),
)
SYSTEMD: Final = Platform(
    "systemd",
    _all("SYSTEMD_EXEC_PID"),
    (),  # INVOCATION_ID is new at each restart
    ("INVOCATION_ID",),
    stop_grace=90,
    grace_cure="set TimeoutStopSec in the unit",
)
PLAIN: Final = Platform("plain", stop_grace=10, grace_cure="give it more time before you kill it", restarts=False)
EVERY: Final = (*PLATFORMS, SYSTEMD, PLAIN)


def slug(platform: Platform) -> str:
    """The name as options and files have it: ``fly``, ``cloud-run``."""
    return platform.name.lower().removesuffix(".io").replace(" ", "-")


def _first(sources: tuple[Source, ...], env: Mapping[str, str]) -> str | None:
    for name, pattern in sources:
        value = env.get(name)
        if not value:
            continue
        if not pattern:
            return value
        match = re.fullmatch(pattern, value)
        if match:
            return match[1]
    return None


def named(name: str) -> Platform | None:
    """The platform of this name, as people write it."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("io")
    aliases = {"compose": "docker", "swarm": "docker", "k8s": "kubernetes", "do": "digitalocean", "vps": "systemd"}
    wanted = aliases.get(wanted, wanted)
    return next((p for p in EVERY if slug(p).replace("-", "") == wanted), None)


def detect(env: Mapping[str, str], pid: int = 0, *, terminal: bool = False) -> Platform:
    """``pid`` is our own: a terminal on a desktop inherits systemd's variables, but is not what it started.
    ``terminal``: somebody sits before it, so that a mere container is his workplace, and no deployment.
    BOTLEASE_PLATFORM counts before everything else (settings refuses a name that is not known)."""
    told = named(env.get("BOTLEASE_PLATFORM", ""))
    if told is not None:
        return told
    if pid and env.get("SYSTEMD_EXEC_PID") == str(pid):
        return SYSTEMD
    for platform in PLATFORMS:
        if _first(platform.detect, env) is None or (platform.beside and not env.get(platform.beside)):
            continue
        return PLAIN if terminal and platform.name == "Docker" else platform
    return PLAIN


def deployment_key(platform: Platform, env: Mapping[str, str]) -> str | None:
    """The deployment this process belongs to, or None: then every start is one of its own, made by hand."""
    key = _first(platform.deployment, env)
    return None if key is None else f"{slug(platform)}:{key}"


def instance_name(platform: Platform, env: Mapping[str, str]) -> str | None:
    """What the platform calls this process, where it has a word for it."""
    return next((env[name] for name in platform.instance if env.get(name)), None)


def environment_name(platform: Platform, env: Mapping[str, str]) -> str | None:
    """Which environment this is, as BOTLEASE_ENVIRONMENT_NAME or the platform says: "preview" for a preview of a
    change, "local" without a platform, None where it cannot be told."""
    if env.get("BOTLEASE_ENVIRONMENT_NAME"):
        return env["BOTLEASE_ENVIRONMENT_NAME"]
    if any(env.get(name) and value in ("", env[name].lower()) for name, value in platform.preview):
        return "preview"
    if platform is PLAIN:
        return "local"
    return next((env[name] for name in platform.environment if env.get(name)), None)


def grace(platform: Platform, env: Mapping[str, str]) -> float:
    """Seconds this platform gives from its stop signal to SIGKILL, as far as the process can know."""
    try:
        return float(env.get("BOTLEASE_PLATFORM_GRACE") or env.get(platform.grace_variable) or platform.stop_grace)
    except ValueError:
        return platform.stop_grace
