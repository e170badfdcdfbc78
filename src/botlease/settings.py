"""Flags and environment to frozen settings. Pure: takes a mapping, never ``os.environ``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from botlease.model import Mode, Timing, TimingError
from botlease.platforms import (
    PLAIN,
    PLATFORMS,
    Platform,
    deployment_key,
    detect,
    environment_name,
    instance_name,
    named,
)
from botlease.text import TOKEN

TOKEN_VARIABLES: Final = ("TELEGRAM_BOT_TOKEN", "BOT_TOKEN", "TELEGRAM_TOKEN", "TG_BOT_TOKEN")
SETTINGS: Final = (
    "BOTLEASE_DATABASE_URL",
    "BOTLEASE_NAME",
    "BOTLEASE_DEPLOYMENT",
    "BOTLEASE_TTL",
    "BOTLEASE_STOP_GRACE",
    "BOTLEASE_LOCK_DELAY",
    "BOTLEASE_MAX_CRASHES",
    "BOTLEASE_WAIT_DATABASE",
    "BOTLEASE_HEALTH_PORT",
    "BOTLEASE_PROFILE",
    "BOTLEASE_PROBATION",
    "BOTLEASE_HEALTHY_IF",
    "BOTLEASE_HEALTHY_WITHIN",
    "BOTLEASE_ENVIRONMENT",
    "BOTLEASE_ENVIRONMENT_NAME",
    "BOTLEASE_PLATFORM",
    "BOTLEASE_PLATFORM_GRACE",
    "BOTLEASE_TASK",
    "BOTLEASE_WARM",
    "BOTLEASE_NO_AHEAD",
    "BOTLEASE_GATEWAY",
    "BOTLEASE_BOT_API",
)
FOR_THE_BOT: Final = (  # set by a supervisor, so that one may stand in the environment of another
    "BOTLEASE_TERM",
    "BOTLEASE_INSTANCE_ID",
    "BOTLEASE_BOT",
    "BOTLEASE_GATE_FD",
    "BOTLEASE_GATE_URL",
    "BOTLEASE_API_URL",
)
_OF_A_SERVICE: Final = re.compile(r"_(SERVICE_(HOST|PORT(_.*)?)|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)$")
"""What Kubernetes tells each pod about a service that is called botlease, or botlease-something."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,63}")
FAST_TTL: Final = 3.0


class ConfigurationError(Exception):
    """The settings are wrong. The message says what is, and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    bot: str
    database: str = field(repr=False)
    timing: Timing
    deployment: str
    by_hand: bool
    """No deployment key at all: somebody started it, as on a laptop."""
    mode: Mode
    platform: Platform
    instance_id: str
    host: str | None = None
    """What the platform calls this process; None: the host's name says more."""
    leaves: bool = False
    """Superseded for good it ends: nobody would start it again."""
    barred: str = ""
    """Why this environment must not become active, if so."""


def bot_name(option: str | None, env: Mapping[str, str]) -> str:
    """The key of the bot: the name given, else the digits of its Telegram token (never the token), else ``bot``."""
    name = option if option is not None else env.get("BOTLEASE_NAME")
    if name is not None:
        _no_token("the bot's name", name)
        if not NAME.fullmatch(name):
            shown = ascii(name if len(name) < 40 else name[:40] + "...")
            raise ConfigurationError(
                f"the bot's name {shown} cannot be used: take 1 to 64 letters, digits or . _ : @ + -, "
                "beginning with a letter or a digit"
            )
        return name
    return token_id(env) or "bot"


def _no_token(what: str, value: str) -> None:
    """It would stand in rows, in names of files, in logs and in metrics."""
    if TOKEN.search(value):
        raise ConfigurationError(
            f"{what} looks like a Telegram token: leave it away, or take the digits before the colon"
        )


def token_id(env: Mapping[str, str]) -> str | None:
    """The digits before the colon of the Telegram token in this environment."""
    for variable in TOKEN_VARIABLES:
        digits, colon, _ = env.get(variable, "").partition(":")
        if colon and digits.isdecimal() and digits.isascii():
            return digits
    return None


def database_url(option: str | None, env: Mapping[str, str]) -> str:
    """The option, else BOTLEASE_DATABASE_URL, else DATABASE_URL, else SQLite in the user's state folder."""
    for url in (option, env.get("BOTLEASE_DATABASE_URL"), env.get("DATABASE_URL")):
        if url is not None and url.strip():
            return url.strip()
    state = env.get("XDG_STATE_HOME") or (f"{env['HOME']}/.local/state" if env.get("HOME") else "")
    if not state:
        raise ConfigurationError("no database: set BOTLEASE_DATABASE_URL, or HOME for one in your state folder")
    return f"sqlite:///{PurePosixPath(state) / 'botlease' / 'botlease.db'}"


def number(name: str, value: str | float | None) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(f"{name} is {value!a}, which is not a number") from None


def timing(
    env: Mapping[str, str],
    *,
    ttl: float | None = None,
    stop_grace: float | None = None,
    lock_delay: float | None = None,
    profile: str | None = None,
    probation: float | None = None,
) -> Timing:
    """The timings that belong to these numbers, refused with the arithmetic where they contradict each other."""
    profile = profile or env.get("BOTLEASE_PROFILE")
    if profile not in (None, "", "fast", "default"):
        raise ConfigurationError(f"the profile {profile!a} is not known: use default or fast")
    ttl = ttl if ttl is not None else number("BOTLEASE_TTL", env.get("BOTLEASE_TTL"))
    stop_grace = stop_grace if stop_grace is not None else number("BOTLEASE_STOP_GRACE", env.get("BOTLEASE_STOP_GRACE"))
    lock_delay = lock_delay if lock_delay is not None else number("BOTLEASE_LOCK_DELAY", env.get("BOTLEASE_LOCK_DELAY"))
    probation = probation if probation is not None else number("BOTLEASE_PROBATION", env.get("BOTLEASE_PROBATION"))
    if ttl is None:
        ttl = FAST_TTL if profile == "fast" else 10.0
    try:
        made = Timing.for_ttl(ttl, stop_grace=10.0 if stop_grace is None else stop_grace)
        return replace(
            made,
            lock_delay=made.lock_delay if lock_delay is None else lock_delay,
            probation=made.probation if probation is None else probation,
        )
    except TimingError as e:
        raise ConfigurationError(f"the timings contradict each other: {e}") from None


def check_environment(env: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored in silence, and the bot run with settings nobody meant."""
    for name in env:
        if name.startswith("BOTLEASE_") and name not in SETTINGS + FOR_THE_BOT and not of_a_service(name, env[name]):
            raise ConfigurationError(f"the environment variable {name} is not known; known are {', '.join(SETTINGS)}")


def of_a_service(name: str, value: str) -> bool:
    """Kubernetes says it, and nobody has meant it as a setting of ours."""
    address = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    return address or _OF_A_SERVICE.search(name) is not None


def make(
    env: Mapping[str, str],
    *,
    name: str | None = None,
    database: str | None = None,
    deployment: str | None = None,
    ttl: float | None = None,
    stop_grace: float | None = None,
    lock_delay: float | None = None,
    profile: str | None = None,
    take_over: bool = False,
    standby: bool = False,
    probation: float | None = None,
    when_superseded: str | None = None,
    pid: int = 0,
    terminal: bool = False,
) -> Settings:
    check_environment(env)
    if take_over and standby:
        raise ConfigurationError("--take-over and --standby exclude each other: choose one")
    bot = bot_name(name, env)
    told = env.get("BOTLEASE_PLATFORM")
    if told and named(told) is None:
        known = ", ".join(p.name for p in PLATFORMS)
        raise ConfigurationError(
            f"BOTLEASE_PLATFORM is {told!a}, which is not known: use one of {known}, systemd, plain"
        )
    platform = detect(env, pid, terminal=terminal)
    seconds = number("BOTLEASE_PLATFORM_GRACE", env.get("BOTLEASE_PLATFORM_GRACE"))
    if seconds is not None and not 0 <= seconds <= 86_400:
        raise ConfigurationError(f"BOTLEASE_PLATFORM_GRACE is {seconds:g}; it must be between 0 and 86400 seconds")
    key = deployment or env.get("BOTLEASE_DEPLOYMENT") or deployment_key(platform, env)
    _no_token("the deployment key", key or "")
    if key is not None and (len(key) > 200 or not key.isprintable()):
        raise ConfigurationError("the deployment key must be printable and at most 200 characters long")
    instance_id = f"{bot}-{os.urandom(4).hex()}"
    where = instance_name(platform, env)
    by_hand = key is None and platform is PLAIN
    if take_over:
        mode = Mode.PREEMPT
    elif by_hand and not standby:
        mode = Mode.REFUSE
    elif standby or key is None:
        mode = Mode.WAIT  # a platform that does not name its deployments: wait for the older one to be stopped
    else:
        mode = Mode.PREEMPT
    return Settings(
        bot=bot,
        database=database_url(database, env),
        timing=timing(env, ttl=ttl, stop_grace=stop_grace, lock_delay=lock_delay, profile=profile, probation=probation),
        deployment=key or f"start:{instance_id}",
        by_hand=by_hand,
        mode=mode,
        platform=platform,
        instance_id=instance_id,
        host=None if where is None else "".join(c if c.isprintable() else "?" for c in where[:100]),
        leaves=not platform.restarts if when_superseded is None else when_superseded == "exit",
        barred=barred(platform, env),
    )


def barred(platform: Platform, env: Mapping[str, str]) -> str:
    """Why an instance in this environment must not become active, or "". A duplicated or preview environment has the
    production's token and a database of its own: no lease can see both. So it must be told apart by its name."""
    allowed = [name.strip() for name in env.get("BOTLEASE_ENVIRONMENT", "").split(",") if name.strip()]
    here = environment_name(platform, env)
    if not allowed:
        if here != "preview":
            return ""
        return "this is a preview of a change: set BOTLEASE_ENVIRONMENT=preview if the bot is to run in it"
    if here in allowed:
        return ""
    shown = ", ".join(allowed)
    if here is None:
        cure = "set " + " or ".join((*platform.environment, "BOTLEASE_ENVIRONMENT_NAME"))
        return (
            f"BOTLEASE_ENVIRONMENT allows {shown}, and {platform.name} does not say which environment this is: {cure}"
        )
    return f"this is the environment {here!a}, and BOTLEASE_ENVIRONMENT allows only {shown}"


BOT_API: Final = "https://api.telegram.org"


def bot_api(url: str) -> str:
    """The address of a Bot API server, as it was given. Raises ConfigurationError with the cure."""
    cure = f"the address of the Bot API should read {BOT_API} or http://host:8081"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigurationError(cure) from None
    if (
        parts.scheme not in ("http", "https")
        or not url.isascii()
        or not parts.hostname
        or parts.query
        or parts.fragment
    ):
        raise ConfigurationError(cure)
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(f"{cure}, without a name or a password")
    return url
