"""From the options of ``run`` to a supervisor: everything is checked that can be, then it begins.

Nothing of the command line is loaded for it: click is a megabyte and a half, and 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from botlease import settings
from botlease.exits import CONFIG, fail
from botlease.platforms import PLAIN, SYSTEMD
from botlease.settings import ConfigurationError
from botlease.title import hide_password


def start(
    command: tuple[str, ...],
    *,
    max_crashes: int | None = None,
    pass_database: bool = False,
    wait_database: float | None = None,
    health_port: int | None = None,
    health_host: str | None = "127.0.0.1",
    healthy_if: str | None = None,
    healthy_within: float | None = None,
    warm: bool = False,
    no_ahead: bool = False,
    gateway: bool = False,
    bot_api: str | None = None,
    delete_webhook: bool = False,
    danger_signal: str | None = None,
    **options: Any,
) -> int:
    """Check everything that can be checked, fork the reaper, supervise. Returns the exit code. ``options``: those of
    :func:`botlease.settings.make`."""
    hide_password(options.get("database"))
    env = os.environ
    try:
        made = settings.make(env, pid=os.getpid(), terminal=sys.stdin is not None and sys.stdin.isatty(), **options)
        waiting = _number(wait_database, "--wait-database", "BOTLEASE_WAIT_DATABASE", 0.0 if made.by_hand else 60.0)
        crashes = _whole(max_crashes, "BOTLEASE_MAX_CRASHES", 5, 1000)
        said = env.get("BOTLEASE_HEALTH_PORT", "")
        if health_port is None and said and not settings.of_a_service("BOTLEASE_HEALTH_PORT", said):
            health_port = _whole(None, "BOTLEASE_HEALTH_PORT", 0, 65535)
        rule = _rule(healthy_if or env.get("BOTLEASE_HEALTHY_IF"), healthy_within)
        danger = _signals(danger_signal)
        warm = warm or _yes("BOTLEASE_WARM")
        no_ahead = no_ahead or _yes("BOTLEASE_NO_AHEAD")
        upstream = _upstream(gateway or _yes("BOTLEASE_GATEWAY"), bot_api, delete_webhook)
    except ConfigurationError as e:
        fail(str(e), CONFIG)
    _check_database(made.database)
    _check_command(command[0])
    from botlease.work import reaper

    forked = reaper.take()
    load(made.database)
    from botlease.run import Options, say, supervise

    if made.database.startswith("sqlite:") and made.platform not in (PLAIN, SYSTEMD):
        say("SQLite guards this machine only: set DATABASE_URL to PostgreSQL where a deployment gets a new disk")
    return supervise(
        made,
        Options(
            command,
            pass_database=pass_database,
            max_crashes=crashes,
            wait_database=waiting,
            health_port=health_port,
            health_host=health_host,
            warm=warm,
            ahead=not no_ahead,
            healthy_if=rule,
            danger=danger,
            gateway=upstream,
            delete_webhook=delete_webhook,
        ),
        forked,
    )


def _rule(text: str | None, within: float | None) -> Any:
    within = _number(within, "--healthy-within", "BOTLEASE_HEALTHY_WITHIN", 30.0)
    if not text:
        return None
    from botlease.work.pulse import Rule

    if within < 0.5:
        raise ConfigurationError(f"--healthy-within is {within:g}; it must be at least 0.5 s")
    try:
        return Rule.parse(text, within)
    except ValueError as e:
        raise ConfigurationError(f"--healthy-if {e}") from None


def _upstream(gateway: bool, bot_api: str | None, delete_webhook: bool) -> str | None:
    """The address of the Bot API behind the gateway, or None without one."""
    if not gateway:
        given = "--bot-api" if bot_api else "--delete-webhook" if delete_webhook else ""
        if given:
            raise ConfigurationError(f"{given} is for the gateway: add --gateway")
        return None
    return settings.bot_api(bot_api or os.environ.get("BOTLEASE_BOT_API") or settings.BOT_API)


def _signals(text: str | None) -> tuple[int, ...]:
    import signal

    if not text:
        return ()
    numbers = []
    for name in text.split(","):
        word = name.strip().upper().removeprefix("SIG")
        if word not in ("USR1", "USR2", "HUP", "WINCH", "ALRM"):
            raise ConfigurationError(f"--danger-signal {name!a}: use USR1, USR2, HUP, WINCH or ALRM")
        numbers.append(int(getattr(signal, f"SIG{word}")))
    if len(numbers) > 2:
        raise ConfigurationError(f"--danger-signal {text!a}: name one signal, or two: A,B")
    return tuple(numbers)


def _yes(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "no", "false"):
        return False
    if value in ("1", "yes", "true"):
        return True
    raise ConfigurationError(f"{variable} is {value!a}; it must be 1 or 0")


def load_early(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Load what a supervisor of this database needs, while the command line is being read; nothing if that could name
    another one. Whatever is wrong is told by :func:`start`."""
    if not any(word.startswith("--database") for word in argv):
        with contextlib.suppress(ConfigurationError):
            load(settings.database_url(None, env))


def load(database: str) -> None:
    if database.startswith("sqlite:"):
        _without_ssl()
        import botlease.stores.sqlite
    elif database.startswith(("postgres:", "postgresql:")):
        with contextlib.suppress(ImportError):  # of its driver: who opens the store says what to do
            import botlease.stores.postgres
    import botlease.run  # noqa: F401


def _without_ssl() -> None:
    """asyncio loads ssl if it can: 4.4 MB (measured) that a supervisor on SQLite never uses."""
    modules: dict[str, Any] = sys.modules
    if "ssl" in modules or "asyncio" in modules:
        return
    modules["ssl"] = None
    try:
        import asyncio  # noqa: F401
    finally:
        del modules["ssl"]


def _whole(option: int | None, variable: str, default: int, most: int) -> int:
    value = _number(option, variable, variable, default, most)
    if value != int(value):
        raise ConfigurationError(f"{variable} is {value:g}; it must be a whole number")
    return int(value)


def _number(option: float | None, flag: str, variable: str, default: float, most: float = 86_400) -> float:
    value = option if option is not None else settings.number(variable, os.environ.get(variable))
    if value is None:
        return default
    if not 0 <= value <= most:
        name = variable if option is None else flag
        raise ConfigurationError(f"{name} is {value:g}; it must be between 0 and {most:g}")
    return value


def _check_database(url: str) -> None:
    """Refuse a URL nobody can open before anything is started. Cheap: no driver is loaded for it."""
    from urllib.parse import urlsplit

    try:
        for host in urlsplit(url).netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:  # its text would quote the password
        fail("the database URL is not valid: it should read postgresql://user@host:5432/name", CONFIG)
    scheme = url.split(":", 1)[0]
    if scheme in ("postgres", "postgresql") and "://" in url:
        from importlib.util import find_spec

        if find_spec("asyncpg") is None:
            fail("PostgreSQL needs the driver asyncpg: pip install 'asyncpg>=0.30'", CONFIG)
    elif scheme != "sqlite" or "://" not in url:
        from botlease.stores import UNKNOWN_URL

        fail(UNKNOWN_URL, CONFIG)


def _check_command(program: str) -> None:
    from botlease.work.ahead import find

    if not find(program, os.environ):
        if os.path.exists(program):  # noqa: PTH110
            fail(f"cannot execute {program}: permission denied: chmod +x it, or name its interpreter first", 126)
        fail(f"cannot find the command {program}: is it installed, and in PATH?", 127)
