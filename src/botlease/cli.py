"""The command line: wiring and exit codes; no decisions.

Nothing heavy is imported here: ``run`` forks the reaper first, then loads asyncio and a driver.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Final

import click

from botlease import __version__, settings
from botlease.console import CONFIG, CONTEXT, database_option, fail, hide_password, leave
from botlease.platforms import PLAIN, SYSTEMD
from botlease.settings import ConfigurationError

OPERATOR: Final = {
    "See": {
        "status": "Who runs, who stands by, what is going on between them.",
        "history": "The terms: who worked, for how long, why it ended.",
        "verify": "Prove from the journal that no two terms overlapped.",
        "wait": "Wait until somebody works, or stands by. For scripts.",
        "doctor": "What is not as it should be, and what to do.",
    },
    "Change": {
        "promote": "Make an instance the one that runs.",
        "deactivate": "Stop the bot until somebody is promoted or deployed.",
        "pause": "Nobody works until it is resumed.",
        "resume": "End a pause.",
        "prune": "Delete old history.",
    },
    "On this machine": {
        "check": "Look for instances here, and end them if you say so.",
        "init": "Write the files your platform needs.",
        "completion": "Completion for bash, zsh or fish.",
        "simulator": "A Telegram Bot API on loopback, to try bots out.",
    },
}
"""The commands of :mod:`botlease.commands`, which is loaded only for them."""


class Commands(click.Group):
    """Loads the operator's commands when one is asked for: a supervisor has no use for them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", *(name for names in OPERATOR.values() for name in names)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "run" and cmd_name in self.list_commands(ctx):
            from botlease import commands
            from botlease.work.tree import leave_no_core

            leave_no_core()  # the database's password and the token are in our memory
            return commands.COMMANDS[cmd_name]
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in {
            "Run": {"run": "Run a command while this instance holds the lease."},
            **OPERATOR,
        }.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="botlease")
def main() -> None:
    """At most one copy of your bot works at any time, across every deployment.

    \b
    botlease run -- python bot.py        put this in front of your bot's start command
    botlease status --watch              who runs, who stands by
    botlease init railway                the files your platform needs
    botlease doctor                      what is not as it should be

    Every command takes --help. The database comes from $BOTLEASE_DATABASE_URL or $DATABASE_URL.
    """


@main.command(context_settings={"allow_interspersed_args": False, **CONTEXT})
@click.option("--name", metavar="N", help="The bot. Default: $BOTLEASE_NAME, else the digits of its Telegram token.")
@database_option
@click.option("--ttl", type=float, metavar="S", help="Seconds a lease lasts without a renewal. Default 10.")
@click.option("--profile", metavar="P", help="default (ttl 10 s) or fast (ttl 3 s).")
@click.option("--deployment", metavar="KEY", help="The release. Default: the platform's own variable. New key: newer.")
@click.option("--stop-grace", type=float, metavar="S", help="Seconds from SIGTERM to SIGKILL for the bot. Default 10.")
@click.option("--lock-delay", type=float, metavar="S", help="Seconds to wait after an expired lease. Default 1.")
@click.option(
    "--max-crashes",
    type=click.IntRange(0, 1000),
    help="Restarts in a row; the crash after them ends the term. Default 5.",
)
@click.option(
    "--probation", type=float, metavar="S", help="Seconds in which the old one takes back. 0: none. Default 30."
)
@click.option(
    "--healthy-if", metavar="RULE", help="Proof of progress: http://URL, a FILE that is touched, stdout:REGEX."
)
@click.option("--healthy-within", type=float, metavar="S", help="For how long one such proof counts. Default 30.")
@click.option("--warm", is_flag=True, help="Start the bot up to botlease.gate() while another one works.")
@click.option("--no-ahead", is_flag=True, help="Load a Python bot's interpreter in the term, not while standing by.")
@click.option("--gateway", is_flag=True, help="Serve the Bot API on loopback: no 409, no update lost. See above.")
@click.option("--bot-api", metavar="URL", help="Your own Bot API server. Default https://api.telegram.org.")
@click.option(
    "--delete-webhook", is_flag=True, help="With --gateway: delete a webhook that keeps the bot from polling."
)
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
    no_ahead: bool,
    gateway: bool,
    bot_api: str | None,
    delete_webhook: bool,
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

    With --gateway the bot finds the Bot API at $BOTLEASE_API_URL instead of https://api.telegram.org: it is the only
    thing to change in it (README, "Telegram"). What it has not finished is handed to its successor.

    \b
    Exit codes:
      the bot's own; 0 after a stop signal, or when superseded for good
      2    a wrong command line
      69   the database cannot be reached
      70   the bot made no progress, or ended within its probation
      75   refused: another one runs, or a copy of this one does (a machine restored from a snapshot)
      78   settings or a database that cannot work
      126  the command cannot be executed      127  the command cannot be found
    """
    if not command:
        raise click.UsageError("no command: botlease run [OPTIONS] -- python bot.py")
    leave(
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
            no_ahead=no_ahead,
            gateway=gateway,
            bot_api=bot_api,
            delete_webhook=delete_webhook,
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
    no_ahead: bool = False,
    gateway: bool = False,
    bot_api: str | None = None,
    delete_webhook: bool = False,
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
        no_ahead = no_ahead or _yes("BOTLEASE_NO_AHEAD")
        upstream = _upstream(gateway or _yes("BOTLEASE_GATEWAY"), bot_api, delete_webhook)
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
        from botlease.stores import UNKNOWN_URL

        fail(UNKNOWN_URL, CONFIG)


def _check_command(program: str) -> None:
    if shutil.which(program) is None:
        if os.path.exists(program):  # noqa: PTH110
            fail(f"cannot execute {program}: permission denied: chmod +x it, or name its interpreter first", 126)
        fail(f"cannot find the command {program}: is it installed, and in PATH?", 127)
