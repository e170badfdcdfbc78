"""The command line: options and help; no decisions.

A supervisor does not load this: the command line of ``run`` is read by a fork (:mod:`botlease.__main__`), which hands
the options over and ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from botlease import __version__
from botlease.console import CONTEXT, database_option

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
@click.option(
    "--name",
    metavar="N",
    help="The bot. Default: $BOTLEASE_NAME, else the digits of its Telegram token, in $TELEGRAM_BOT_TOKEN, $BOT_TOKEN, "
    "$TELEGRAM_TOKEN or $TG_BOT_TOKEN, else 'bot'. Name it where several bots share a database.",
)
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
@click.option(
    "--wait-database",
    type=float,
    metavar="S",
    help="Keep trying to connect at the start for so long. Default 60; by hand 0.",
)
@click.option("--health-port", type=click.IntRange(0, 65535), metavar="N", help="Serve /health /livez /readyz /leader.")
@click.option("--health-host", default="127.0.0.1", metavar="H", help="Where to listen; 0.0.0.0: everywhere.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(deliver: Callable[[dict[str, Any]], None] | None, /, command: tuple[str, ...], **options: Any) -> None:
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
    if deliver is not None:
        deliver({"command": command, **options})
        return
    from botlease.exits import leave
    from botlease.start import start

    leave(start(command, **options))
