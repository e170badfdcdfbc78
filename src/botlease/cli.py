"""The command line: wiring and exit codes; no decisions.

Nothing heavy is imported here: ``run`` forks the reaper first, then loads asyncio and a driver.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from botlease import __version__, settings
from botlease.platforms import PLAIN, SYSTEMD
from botlease.settings import ConfigurationError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
CONFIG, UNAVAILABLE = 78, 69


def fail(text: str, code: int) -> NoReturn:
    click.echo(f"botlease: {text}", err=True)
    sys.exit(code)


def invoke(command: click.Command, program: str) -> NoReturn:
    """Run a command as a program: a wrong command line gets one line with the cure, and exit code 2."""
    try:
        command.main(prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message())
        sys.exit(2)
    except click.UsageError as e:
        path = e.ctx.command_path if e.ctx is not None else program
        fail(f"{e.format_message().rstrip('.')}: see `{path} --help`", 2)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.Abort:
        sys.exit(130)
    sys.exit(0)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="botlease")
def main() -> None:
    """At most one copy of your bot works at any time, across every deployment.

    \b
    botlease run -- python bot.py        put this in front of your bot's start command
    botlease status                      who runs, who stands by
    """


def database_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--database",
        metavar="URL",
        help="postgresql://... or sqlite:///file. Default: $BOTLEASE_DATABASE_URL, $DATABASE_URL, else SQLite "
        "in your state folder. Better in the environment than here, where it may hold a password.",
    )(f)


@main.command(context_settings={"allow_interspersed_args": False, **CONTEXT})
@click.option("--name", metavar="N", help="The bot. Default: $BOTLEASE_NAME, else the digits of its Telegram token.")
@database_option
@click.option("--ttl", type=float, metavar="S", help="Seconds a lease lasts without a renewal. Default 10.")
@click.option("--profile", metavar="P", help="default (ttl 10 s) or fast (ttl 3 s).")
@click.option("--deployment", metavar="KEY", help="The release. Default: the platform's own variable. New key: newer.")
@click.option("--stop-grace", type=float, metavar="S", help="Seconds from SIGTERM to SIGKILL for the bot. Default 10.")
@click.option("--lock-delay", type=float, metavar="S", help="Seconds to wait after an expired lease. Default 1.")
@click.option("--max-crashes", type=click.IntRange(0, 1000), help="Crashes in a row that end the term. Default 5.")
@click.option(
    "--probation", type=float, metavar="S", help="Seconds in which the old one takes back. 0: none. Default 30."
)
@click.option(
    "--healthy-if", metavar="RULE", help="Proof of progress: http://URL, a FILE that is touched, stdout:REGEX."
)
@click.option("--healthy-within", type=float, metavar="S", help="For how long one such proof counts. Default 30.")
@click.option("--warm", is_flag=True, help="Start the bot up to botlease.gate() while another one works.")
@click.option("--danger-signal", metavar="A[,B]", help="Sent to the bot when renewals fail; B when they succeed again.")
@click.option(
    "--when-superseded",
    type=click.Choice(["exit", "stay"]),
    help="After the probation. Default: as the platform needs.",
)
@click.option("--take-over", is_flag=True, help="By hand: take over from the one that runs.")
@click.option("--standby", is_flag=True, help="Wait until the one that runs ends.")
@click.option("--pass-database", is_flag=True, help="Give the lease's database URL to the bot, too.")
@click.option("--wait-database", type=float, metavar="S", help="Keep trying to connect at the start for so long.")
@click.option("--health-port", type=click.IntRange(0, 65535), metavar="N", help="Serve /health /livez /readyz /leader.")
@click.option("--health-host", default="127.0.0.1", metavar="H", help="Where to listen; 0.0.0.0: everywhere.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    name: str | None,
    database: str | None,
    ttl: float | None,
    profile: str | None,
    deployment: str | None,
    stop_grace: float | None,
    lock_delay: float | None,
    max_crashes: int | None,
    probation: float | None,
    healthy_if: str | None,
    healthy_within: float | None,
    warm: bool,
    danger_signal: str | None,
    when_superseded: str | None,
    take_over: bool,
    standby: bool,
    pass_database: bool,
    wait_database: float | None,
    health_port: int | None,
    health_host: str,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND while, and only while, this instance holds the lease.

    \b
    botlease run -- python bot.py
    botlease run --name mybot --database postgresql://me@db/bots -- node bot.js

    A newer deployment takes over, on probation: if it fails, the old one takes back, and after two failures it
    only fills vacancies. An equal or older one stands by. Without a deployment key (on a laptop) a second start is
    refused, unless --take-over or --standby. SIGTERM and SIGINT stop the bot, then this.

    \b
    Exit codes:
      the bot's own; 0 after a stop signal, or when superseded for good
      2    a wrong command line
      69   the database cannot be reached
      70   the bot made no progress, or ended within its probation
      75   refused: another one runs
      78   settings or a database that cannot work
      126  the command cannot be executed      127  the command cannot be found
    """
    if not command:
        raise click.UsageError("no command: botlease run [OPTIONS] -- python bot.py")
    sys.exit(
        start(
            command,
            name=name,
            database=database,
            ttl=ttl,
            profile=profile,
            deployment=deployment,
            stop_grace=stop_grace,
            lock_delay=lock_delay,
            max_crashes=max_crashes,
            probation=probation,
            healthy_if=healthy_if,
            healthy_within=healthy_within,
            warm=warm,
            danger_signal=danger_signal,
            when_superseded=when_superseded,
            take_over=take_over,
            standby=standby,
            pass_database=pass_database,
            wait_database=wait_database,
            health_port=health_port,
            health_host=health_host,
        )
    )


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
    danger_signal: str | None = None,
    **options: Any,
) -> int:
    """Check everything that can be checked, fork the reaper, supervise. Returns the exit code."""
    hide_password(options.get("database"))
    env = os.environ
    try:
        made = settings.make(env, pid=os.getpid(), terminal=sys.stdin is not None and sys.stdin.isatty(), **options)
        waiting = _number(wait_database, "--wait-database", "BOTLEASE_WAIT_DATABASE", 0.0 if made.by_hand else 60.0)
        crashes = _whole(max_crashes, "BOTLEASE_MAX_CRASHES", 5, 1000)
        if health_port is None and env.get("BOTLEASE_HEALTH_PORT"):
            health_port = _whole(None, "BOTLEASE_HEALTH_PORT", 0, 65535)
        rule = _rule(healthy_if or env.get("BOTLEASE_HEALTHY_IF"), healthy_within)
        danger = _signals(danger_signal)
        warm = warm or _yes("BOTLEASE_WARM")
    except ConfigurationError as e:
        fail(str(e), CONFIG)
    _check_database(made.database)
    _check_command(command[0])
    from botlease import __main__ as entry

    forked = entry.take_reaper()
    if made.database.startswith("sqlite:"):
        _without_ssl()
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
            healthy_if=rule,
            danger=danger,
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
        _ = urlsplit(url).port
    except ValueError:  # its text would quote the password
        fail("the database URL is not valid: it should read postgresql://user@host:5432/name", CONFIG)
    scheme = url.split(":", 1)[0]
    if scheme in ("postgres", "postgresql") and "://" in url:
        from importlib.util import find_spec

        if find_spec("asyncpg") is None:
            fail("PostgreSQL needs the driver asyncpg: pip install 'botlease[postgres]'", CONFIG)
    elif scheme != "sqlite" or "://" not in url:
        fail(
            f"do not know the database URL {_redact(url)!r}: use postgresql://user@host/name or "
            "sqlite:///path/to/file.db (BOTLEASE_DATABASE_URL counts before DATABASE_URL)",
            CONFIG,
        )


def _redact(url: str) -> str:
    from botlease.stores import redact

    return redact(url)


def _check_command(program: str) -> None:
    if shutil.which(program) is None:
        if os.path.exists(program):  # noqa: PTH110
            fail(f"cannot execute {program}: permission denied: chmod +x it, or name its interpreter first", 126)
        fail(f"cannot find the command {program}: is it installed, and in PATH?", 127)


def hide_password(url: str | None) -> None:
    """Blot the password out of our own command line, which everybody on this machine can read."""
    if not url:
        return
    from botlease.stores import passwords
    from botlease.title import blot

    for secret in passwords(url):
        blot(secret)


def _ask(database: str | None, question: Callable[[Any], Any]) -> Any:
    """Open the store, ask one thing, close. Errors end the program with one line."""
    import asyncio

    from botlease.stores import StoreError, StoreRefused, open_store

    hide_password(database)

    async def ask() -> Any:
        url = settings.database_url(database, os.environ)
        if url.startswith("sqlite:///") and not os.path.exists(url.removeprefix("sqlite:///")):  # noqa: ASYNC240, PTH110
            # Opening it would make it, and a mistyped path would look like an empty database.
            raise ConfigurationError(f"there is no database at {url}: nothing has run there yet, or the URL is wrong")
        store = open_store(url)
        try:
            await store.open(5.0)
            return await question(store)
        finally:
            await store.aclose()

    try:
        settings.check_environment(os.environ)
        return asyncio.run(ask())
    except (StoreRefused, ConfigurationError) as e:
        fail(str(e), CONFIG)
    except StoreError as e:
        fail(str(e), UNAVAILABLE)


@main.command(context_settings=CONTEXT)
@database_option
@click.option("--name", metavar="N", help="Only this bot.")
@click.option("--all", "ended", is_flag=True, help="Ended instances, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each bot, one a line.")
def status(database: str | None, name: str | None, ended: bool, as_json: bool) -> None:
    """Show who runs and who stands by."""
    from botlease import status as show

    overview = _ask(database, lambda store: store.overview(5.0))
    bots = [b for b in show.by_bot(overview, ended=ended) if name is None or b["bot"] == name]
    if as_json:
        import json

        for bot in bots:
            click.echo(json.dumps(bot))
    else:
        click.echo(show.table(bots))


@main.command(context_settings=CONTEXT)
@database_option
@click.argument("instance_id")
def promote(database: str | None, instance_id: str) -> None:
    """Make INSTANCE_ID the one that runs. The one that runs now drains first."""
    _ask(database, lambda store: store.promote(instance_id, 5.0))
    click.echo(f"{instance_id} has the assignment; it starts when the lease is free (see `botlease status`)")


@main.command(context_settings=CONTEXT)
@click.option("--name", metavar="N", help="Only this bot. Default: the one that the environment names, else all.")
@click.option("--force-kill", is_flag=True, help="End what is found: SIGTERM, wait, SIGKILL.")
@click.option("--json", "as_json", is_flag=True)
def check(name: str | None, force_kill: bool, as_json: bool) -> None:
    """Look for instances on this machine. Exit code 0: none (left), 1: some are running."""
    sys.exit(local_check(name, force_kill, as_json))


def local_check(name: str | None, force_kill: bool, as_json: bool) -> int:
    """The seed's ``check_bot_running.py``."""
    import json
    from dataclasses import asdict
    from datetime import UTC, datetime

    from botlease import local

    if name is None:
        name = os.environ.get("BOTLEASE_NAME") or settings.token_id(os.environ)
    found = local.find(name)
    if as_json:
        click.echo(json.dumps([asdict(f) for f in found]))
    elif not found:
        click.echo("no instance of the bot is running on this machine")
    else:
        for f in found:
            since = datetime.fromtimestamp(f.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            click.echo(f"{f.what} pid {f.pid}, started {since}: {f.command}")
    if not found:
        return 0
    if not force_kill:
        if not as_json:
            click.echo("refused: the bot is already running; --force-kill ends it", err=True)
        return 1
    return 0 if local.force_kill(found, say=lambda text: click.echo(text, err=True)) else 1


@main.command(context_settings=CONTEXT)
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="0: any free one.")
@click.option(
    "--profile",
    type=click.Choice(["source", "h1", "h2"]),
    default="source",
    show_default=True,
    help="How conflicts are decided: as the server's source says, or in two harsher ways.",
)
@click.option(
    "--users", type=click.IntRange(0, 1000), default=3, show_default=True, help="Chatting users for each bot."
)
@click.option(
    "--every",
    type=click.FloatRange(0.01, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two messages of one user.",
)
@click.option("--seed", type=int, default=1, show_default=True)
def simulator(port: int, profile: str, users: int, every: float, seed: int) -> None:
    """Serve the Telegram Bot API on loopback, with chatting users, for trying bots out.

    Point your bot's base URL at it; any token of the usual form will do. Counts go to standard output, and to
    /simulator/report as JSON. Ends on Ctrl-C.
    """
    import asyncio

    from botlease.telegram.command import serve

    try:
        asyncio.run(serve(port, profile, users, every, seed, click.echo))
    except OSError as e:
        fail(f"cannot listen on port {port}: {e.strerror}: choose another --port", CONFIG)
    except KeyboardInterrupt:
        pass
