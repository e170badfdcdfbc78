"""Change who works: promote, deactivate, pause, resume, prune."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

import click

from botlease import settings
from botlease.commands.shared import DEADLINE, command, name_option, which
from botlease.console import ask, database_option
from botlease.settings import ConfigurationError
from botlease.status import by_bot
from botlease.text import clean


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
    UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '...'; (if it has the assignment already, as after a
    fail-over: FALSE first, and both in one transaction)
    """

    async def give(store: Any) -> None:
        known = {i["instance_id"]: i for bot in by_bot(await store.overview(DEADLINE)) for i in bot["instances"]}
        if known.get(instance_id, {}).get("silent"):  # the one that works would be stopped for nobody
            raise ConfigurationError(
                f"{instance_id} gives no sign of life, last {known[instance_id]['last_heartbeat'][:19]}: choose one "
                "that does (`botlease status`), or start it; the SQL in --help does it all the same"
            )
        await store.promote(instance_id, DEADLINE)

    ask(database, give)
    click.echo(f"{clean(instance_id)} has the assignment; it starts when the lease is free (see `botlease status`)")


@command
@database_option
@click.argument("instance_id", required=False, shell_complete=_instances)
@name_option
@click.option("--all", "everybody", is_flag=True, help="Of every bot in this database.")
def deactivate(database: str | None, instance_id: str | None, name: str | None, everybody: bool) -> None:
    """Take the assignment away, from INSTANCE_ID or from whoever has it: the bot drains and stops.

    Nobody promotes himself after that: until you promote one, or a new deployment comes; a restart of the same one is
    none. In SQL: UPDATE bot_instances SET is_active = FALSE WHERE bot = '...'; (without WHERE: every bot, as --all)
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
    if len(match[1]) > 9:
        raise click.BadParameter(f"{value!a} is too old for any calendar")
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
