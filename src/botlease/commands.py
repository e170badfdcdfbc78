"""The operator's commands: ask the store, print. What they say is decided in :mod:`.status` and :mod:`.journal`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Final

import click

from botlease import clock, settings
from botlease.console import CONFIG, CONTEXT, ask, database_option, fail
from botlease.settings import ConfigurationError
from botlease.text import clean, safe

DEADLINE: Final = 5.0
COMMANDS: Final[dict[str, click.Command]] = {}
TIMED_OUT = 75


def command(f: Callable[..., Any]) -> click.Command:
    made = click.command(context_settings=CONTEXT)(f)
    assert made.name is not None
    COMMANDS[made.name] = made
    return made


def name_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--name", metavar="N", help="The bot. Default: the environment's, or the only one there is.")(f)


def json_option(text: str) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help=text)


async def which(store: Any, name: str | None) -> str:
    """The bot that is meant. Raises ConfigurationError if that cannot be told."""
    bots = [lease["bot"] for lease in (await store.overview(DEADLINE))["leases"]]
    # The environment's counts like a name that was typed: another bot's must not be stopped for it.
    wanted = name or os.environ.get("BOTLEASE_NAME") or settings.token_id(os.environ)
    if wanted is not None:
        if wanted not in bots:
            raise ConfigurationError(f"no bot {wanted!a} in this database: there are {_list(bots)}")
        return wanted
    if len(bots) == 1:
        return str(bots[0])
    raise ConfigurationError(f"which bot? Name it with --name: there are {_list(bots)}")


def _list(bots: list[str]) -> str:
    return ", ".join(clean(b) for b in bots[:20]) or "none yet"


# See -----------------------------------------------------------------------------------------------------------------


@command
@database_option
@click.option("--name", metavar="N", help="Only this bot.")
@click.option("--all", "ended", is_flag=True, help="Ended instances, too.")
@json_option("One JSON object for each bot, one a line.")
@click.option("--watch", is_flag=True, help="Go on, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds, of --watch."
)
def status(database: str | None, name: str | None, ended: bool, as_json: bool, watch: bool, interval: float) -> None:
    """Show who runs, who stands by, and what is going on between them."""
    from botlease import status as show

    def render(overview: dict[str, Any]) -> str:
        bots = [b for b in show.by_bot(overview, ended=ended) if name is None or b["bot"] == name]
        return "\n".join(json.dumps(b) for b in bots) if as_json else show.table(bots)

    async def once(store: Any) -> None:
        if name is not None:
            await which(store, name)
        text = render(await store.overview(DEADLINE))
        if text:
            click.echo(text)

    async def forever(store: Any) -> None:
        from botlease.stores import StoreError

        last = ""
        while True:
            try:
                text = render(await store.overview(DEADLINE))
            except StoreError as e:  # it may come back; whoever watches wants to see it do so
                text = f"the database does not answer: {safe(e)}"
            if sys.stdout.isatty():
                click.echo(f"\x1b[H\x1b[J{text}\n\n(every {interval:g} s; Ctrl-C ends)")
            elif text != last:
                click.echo(text)
                sys.stdout.flush()
            last = text
            await asyncio.sleep(interval)

    try:
        ask(database, forever if watch else once)
    except KeyboardInterrupt:
        sys.exit(0)


@command
@database_option
@name_option
@click.option("--every", is_flag=True, help="Of every bot.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=20, show_default=True, help="So many terms.")
@json_option("One JSON object for each term, one a line.")
def history(database: str | None, name: str | None, every: bool, limit: int, as_json: bool) -> None:
    """Show the terms, newest first: who worked, from when until when, and why it ended. Times are the database's.

    \b
    Why it ended:
      stopped       a stop signal            superseded   another instance got the assignment
      deactivated   by the operator          paused       by the operator; the assignment stayed
      work_ended    the bot ended by itself  failed       it did not pass its probation
      unhealthy     it made no progress      store_silent no renewal was confirmed in time
      lease_lost    the row said so          store_changed another database answered
      expired       written by the successor: it had run out
      died          written by the successor: the kernel proved the holder dead
      given_back    granted too late: no work ran under it
    """
    from datetime import UTC, datetime

    from botlease import journal
    from botlease.status import align

    async def read(store: Any) -> Any:
        return await store.terms(None if every else await which(store, name), limit, DEADLINE)

    shown = journal.rows(ask(database, read), datetime.fromtimestamp(clock.wall(), UTC))
    if as_json:
        for row in shown:
            click.echo(json.dumps(row))
    else:
        click.echo("\n".join(align(journal.table(shown, many=every))) if shown else "no term yet")


@command
@database_option
@click.option("--name", metavar="N", help="Only this bot.")
@json_option("One JSON object for each bot, one a line.")
def verify(database: str | None, name: str | None, as_json: bool) -> None:
    """Prove from the journal that no two terms of a bot overlapped. Exit code 1 if anything is wrong.

    It reads what was recorded, by the database's clock: a term is closed after its work was reaped, or by the
    successor that waited it out. A clock that was stepped in between looks like a fault, and is said to be possible.
    """
    from dataclasses import asdict

    from botlease import journal

    async def read(store: Any) -> Any:
        if name is not None:
            await which(store, name)
        return await store.terms(name, 10_000_000, 60.0), (await store.overview(DEADLINE))["leases"]

    terms, leases = ask(database, read)
    verdicts = journal.verify(terms, [row for row in leases if name is None or row["bot"] == name])
    for v in verdicts:
        if as_json:
            click.echo(json.dumps(asdict(v)))
            continue
        for finding in v.findings:
            click.echo(clean(f"{v.bot}: term {finding.term} {finding.what}"))
        if not v.findings:
            click.echo(f"{clean(v.bot)}: {v.terms} terms, no two overlap")
    if not verdicts and not as_json:
        click.echo("no term yet: nothing to verify")
    sys.exit(1 if any(v.findings for v in verdicts) else 0)


@command
@database_option
@name_option
@click.option("--active", is_flag=True, help="Until an instance works.")
@click.option("--standby", is_flag=True, help="Until another one could take over.")
@click.option("--instance", metavar="ID", help="Until it is this one.")
@click.option("--deployment", metavar="KEY", help="Until it is one of this deployment (with or without the platform).")
@click.option("--timeout", type=click.FloatRange(0, 86_400), default=60.0, show_default=True, help="Seconds.")
def wait(
    database: str | None,
    name: str | None,
    active: bool,
    standby: bool,
    instance: str | None,
    deployment: str | None,
    timeout: float,
) -> None:
    """Wait for an instance that works (--active) or one that could take over (--standby). For scripts.

    Exit code 0 when there is one, and its id on standard output; 75 when the time is up.
    """
    from botlease import status as show

    if active is standby:
        raise click.UsageError("wait for what? --active or --standby, one of them")

    async def until(store: Any) -> str | None:
        changed = asyncio.Event()
        store.on_change = changed.set
        end = clock.now() + timeout
        while True:
            bots = {b["bot"]: b for b in show.by_bot(await store.overview(DEADLINE))}
            bot = bots.get(name) if name else None
            if name is None and bots:
                bot = bots.get(await which(store, None))
            for i in (bot or {"instances": []})["instances"]:
                fits = show.works(bot, i) if active else show.stands_by(bot, i)
                key = str(i["deployment"])
                if deployment is not None and deployment not in (key, key.partition(":")[2]):
                    continue
                if fits and instance in (None, i["instance_id"]):
                    return str(i["instance_id"])
            left = end - clock.now()
            if left <= 0:
                return None
            changed.clear()
            try:
                await asyncio.wait_for(changed.wait(), min(0.5, left))
            except TimeoutError:
                continue

    found = ask(database, until, patience=timeout)
    if found is None:
        fail(f"nobody {'is active' if active else 'stands by'} after {timeout:g} s: see `botlease status`", TIMED_OUT)
    click.echo(clean(found))


@command
@database_option
@click.option("--name", metavar="N", help="The bot, as for run.")
@json_option("One JSON object for each line.")
@click.option("--no-telegram", is_flag=True, help="Do not ask the Bot API about the token and a webhook.")
@click.option("--stop-grace", type=float, metavar="S", help="As for run.")
@click.option("--ttl", type=float, metavar="S", help="As for run.")
def doctor(
    database: str | None,
    name: str | None,
    as_json: bool,
    no_telegram: bool,
    stop_grace: float | None,
    ttl: float | None,
) -> None:
    """Look for what is not as it should be, here and now: each line ok, a warning, or a problem with its cure.

    Changes nothing. Run it where the bot runs, with its environment. Exit code 1 if there is a problem.
    """
    from botlease.console import hide_password
    from botlease.doctor import examine

    hide_password(database)
    lines = asyncio.run(
        examine(os.environ, database=database, name=name, telegram=not no_telegram, stop_grace=stop_grace, ttl=ttl)
    )
    for line in lines:
        if as_json:
            click.echo(json.dumps({"level": line.level, "what": line.what, "cure": line.cure}))
        else:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[line.level]
            click.echo(f"{click.style(line.level.ljust(8), fg=colour)} {clean(line.what)}")
            if line.cure:
                click.echo(f"{'':8} -> {clean(line.cure)}")
    sys.exit(1 if any(line.level == "problem" for line in lines) else 0)


# Change --------------------------------------------------------------------------------------------------------------


def _instances(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell's completion: quick, and silent if it cannot be told."""
    from botlease.stores import open_store

    async def read() -> list[str]:
        store = open_store(settings.database_url(ctx.params.get("database"), os.environ))
        try:
            await store.open(1.0, upgrade=False)
            return [i["instance_id"] for i in (await store.overview(1.0))["instances"] if i["ended_at"] is None]
        finally:
            await store.aclose()

    try:
        return [i for i in asyncio.run(read()) if i.startswith(incomplete)]
    except Exception:
        return []


@command
@database_option
@click.argument("instance_id", shell_complete=_instances)
def promote(database: str | None, instance_id: str) -> None:
    """Make INSTANCE_ID the one that runs. The one that runs now drains first.

    Its deployment becomes the newest, so that it stays until a new deployment comes or you choose again. In SQL:
    UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '...';
    """
    ask(database, lambda store: store.promote(instance_id, DEADLINE))
    click.echo(f"{clean(instance_id)} has the assignment; it starts when the lease is free (see `botlease status`)")


@command
@database_option
@click.argument("instance_id", required=False, shell_complete=_instances)
@name_option
@click.option("--all", "everybody", is_flag=True, help="Of every bot in this database.")
def deactivate(database: str | None, instance_id: str | None, name: str | None, everybody: bool) -> None:
    """Take the assignment away, from INSTANCE_ID or from whoever has it: the bot drains and stops.

    Nobody promotes himself after that: until you promote one, or a new deployment comes. In SQL:
    UPDATE bot_instances SET is_active = FALSE;
    """
    if everybody and (instance_id or name):
        raise click.UsageError("--all means every bot: leave the instance and --name away")

    async def take(store: Any) -> tuple[str | None, int]:
        if everybody:
            return None, await store.deactivate(None, None, DEADLINE)
        if instance_id is not None:
            known = {i["instance_id"] for i in (await store.overview(DEADLINE))["instances"]}
            if instance_id not in known:
                raise ConfigurationError(f"no instance {instance_id!r}: see `botlease status`")
            return instance_id, await store.deactivate(name, instance_id, DEADLINE)
        bot = await which(store, name)
        return bot, await store.deactivate(bot, None, DEADLINE)

    who, count = ask(database, take)
    what = f"{count} bots" if who is None else who
    done = "deactivated; it drains and stops" if count else "nobody had the assignment"
    click.echo(f"{clean(what)}: {done}")


def _pause(database: str | None, name: str | None, everybody: bool, on: bool) -> None:
    if everybody and name:
        raise click.UsageError("--all means every bot: leave --name away")

    async def change(store: Any) -> tuple[str | None, int]:
        bot = None if everybody else await which(store, name)
        return bot, await store.pause(bot, on, DEADLINE)

    bot, count = ask(database, change)
    what = f"{count} bots" if bot is None else bot
    done = "paused; nobody works until `botlease resume`" if on else "resumed; whoever has the assignment works again"
    already = f"was {'paused' if on else 'not paused'} already"
    click.echo(f"{clean(what)}: {done if count else already}")


@command
@database_option
@name_option
@click.option("--all", "everybody", is_flag=True, help="Every bot in this database.")
def pause(database: str | None, name: str | None, everybody: bool) -> None:
    """Nobody works until `botlease resume`, new deployments included. The assignment stays where it is.

    In SQL: UPDATE bot_leases SET paused = TRUE WHERE bot = '...';
    """
    _pause(database, name, everybody, True)


@command
@database_option
@name_option
@click.option("--all", "everybody", is_flag=True, help="Every bot in this database.")
def resume(database: str | None, name: str | None, everybody: bool) -> None:
    """End a pause: whoever has the assignment works again.

    In SQL: UPDATE bot_leases SET paused = FALSE WHERE bot = '...';
    """
    _pause(database, name, everybody, False)


def _days(ctx: click.Context, param: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dhm]?)", value.strip())
    if match is None:
        raise click.BadParameter(f"{value!a} is no age: 30d, 12h or 90m")
    return float(match[1]) / {"d": 1, "": 1, "h": 24, "m": 1440}[match[2]]


@command
@database_option
@click.option("--name", metavar="N", help="Only this bot.")
@click.option("--older-than", default="30d", show_default=True, callback=_days, metavar="AGE", help="30d, 12h, 90m.")
def prune(database: str | None, name: str | None, older_than: float) -> None:
    """Delete instances without a heartbeat and closed terms that are older. Never a lease, never what lives.

    What is older than 30 days goes by itself whenever an instance starts.
    """
    instances, terms = ask(database, lambda store: store.prune(name, older_than, DEADLINE))
    click.echo(f"deleted {instances} instances and {terms} terms")


# On this machine -----------------------------------------------------------------------------------------------------


@command
@click.option("--name", metavar="N", help="Only this bot. Default: the one that the environment names, else all.")
@click.option("--force-kill", is_flag=True, help="End what is found: SIGTERM, wait, SIGKILL.")
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    help="Seconds from SIGTERM to SIGKILL. Default: the longest --stop-grace of what is found, and 2.",
)
@json_option("One JSON array.")
def check(name: str | None, force_kill: bool, grace: float | None, as_json: bool) -> None:
    """Look for instances on this machine. Exit code 0: none (left), 1: some are running.

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
    from botlease.telegram.command import serve

    try:
        asyncio.run(serve(port, profile, users, every, seed, click.echo))
    except OSError as e:
        fail(f"cannot listen on port {port}: {e.strerror}: choose another --port", CONFIG)
    except KeyboardInterrupt:
        pass
