"""On this machine: check, init, completion, simulator."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import click

from botlease import settings
from botlease.commands.shared import Seconds, command, json_option
from botlease.exits import CONFIG, fail


@command
@click.option("--name", metavar="N", help="Only this bot. Default: the one that the environment names, else all.")
@click.option("--force-kill", is_flag=True, help="End what is found: SIGTERM, wait, SIGKILL.")
@click.option(
    "--grace",
    type=Seconds(0, 3600),
    help="Seconds from SIGTERM to SIGKILL. Default: the longest --stop-grace of what is found, and 2.",
)
@json_option("One JSON array.")
def check(name: str | None, force_kill: bool, grace: float | None, as_json: bool) -> None:
    """Look for instances on this machine. Exit code 0: none (left); 1: some are running; 78: it cannot be told here.

    \b
    What counts, of your own processes only:
      instances of botlease, by the note they left (boot id, pid, start time)
      an interpreter that runs one of the seed's scripts, or -m trading_bot
      a program of yours that has the very token of this environment in its own
    The last one is any script that was started with the token: look at the list before --force-kill.
    """
    sys.exit(local_check(name, force_kill, grace, as_json))


def local_check(name: str | None, force_kill: bool, grace: float | None, as_json: bool) -> int:
    """The seed's ``check_bot_running.py``."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from botlease import local

    if name is None:
        name = os.environ.get("BOTLEASE_NAME") or settings.token_id(os.environ)
    try:
        found = local.find(name)
    except settings.ConfigurationError as e:  # its code must not be 1: that would say that one runs
        fail(str(e), CONFIG)
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
            # the way this was called, so that what it names can be typed
            program = click.get_current_context(silent=True)
            how = program.command_path if program is not None else "botlease check"
            click.echo(f"refused: the bot is already running; `{how} --force-kill` ends it", err=True)
        return 1
    return 0 if local.force_kill(found, grace, say=lambda text: click.echo(text, err=True)) else 1


@command
@click.argument("platform", required=False, shell_complete=lambda ctx, param, incomplete: _platforms(incomplete))
@click.option("--dir", "folder", default=".", show_default=True, type=click.Path(file_okay=False), help="Where to.")
@click.option("--command", "start", default="python bot.py", show_default=True, help="What starts your bot.")
@click.option("--app", default="bot", show_default=True, metavar="NAME", help="The name in the files.")
def init(platform: str | None, folder: str, start: str, app: str) -> None:
    """Write the files that PLATFORM needs. Nothing that is there already is touched. Without PLATFORM: which there are.

    Exit code 0: written, or all there as they should be; 1: something else is there under such a name.
    """
    from botlease import scaffold

    if platform is None:
        for name, text in scaffold.offers():
            click.echo(f"{name:14} {text}")
        return
    try:
        done = scaffold.write(platform, folder, command=start, app=app)
    except scaffold.ScaffoldError as e:
        fail(str(e), CONFIG)
    for path, what in done.files:
        click.echo(f"{what:8} {path}")
    for line in done.then:
        click.echo(f"then     {line}")
    sys.exit(1 if any(what == "kept" for _, what in done.files) else 0)


def _platforms(incomplete: str) -> list[str]:
    from botlease.platforms import EVERY, slug

    return [name for p in EVERY if (name := slug(p)).startswith(incomplete)]


@command
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for your shell.

    \b
    bash:  eval "$(botlease completion bash)"            in ~/.bashrc
    zsh:   eval "$(botlease completion zsh)"             in ~/.zshrc
    fish:  botlease completion fish | source             in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    main = click.get_current_context().find_root().command
    click.echo(kind(main, {}, "botlease", "_BOTLEASE_COMPLETE").source())


@command
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
    type=Seconds(0.01, 3600),
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
    from botlease.telegram.command import serve

    try:
        asyncio.run(serve(port, profile, users, every, seed, click.echo))
    except OSError as e:
        fail(f"cannot listen on port {port}: {e.strerror}: choose another --port", CONFIG)
    except KeyboardInterrupt:
        pass
