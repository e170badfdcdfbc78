"""Look at what is: status, history, verify, wait, doctor. What they say is decided in :mod:`botlease.status`,
:mod:`botlease.journal` and :mod:`botlease.doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import click

from botlease import clock
from botlease.commands.shared import DEADLINE, TIMED_OUT, Seconds, command, json_option, name_option, which
from botlease.console import ask, database_option
from botlease.exits import fail
from botlease.text import clean, safe

MOST_TERMS = 10_000_000


@command
@database_option
@click.option("--name", metavar="N", help="Only this bot.")
@click.option("--all", "ended", is_flag=True, help="Ended instances, too.")
@json_option("One JSON object for each bot, one a line.")
@click.option("--watch", is_flag=True, help="Go on, until Ctrl-C.")
@click.option("--interval", type=Seconds(0.1, 3600), default=1.0, show_default=True, help="Seconds, of --watch.")
def status(database: str | None, name: str | None, ended: bool, as_json: bool, watch: bool, interval: float) -> None:
    """Show who runs, who stands by, and what is going on between them."""
    from botlease import status as show

    def render(overview: dict[str, Any]) -> str:
        if trouble := overview.get("trouble"):
            click.echo(f"botlease: what waits for the bots cannot be read: {trouble}", err=True)
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


async def of_one_moment(store: Any, name: str | None) -> tuple[list[Any], list[Any]]:
    """Terms and leases. What changes hands while they are read is read anew: it would look like a lease that nobody
    has journalled, or one that went backwards."""

    async def read() -> dict[str, Any]:
        leases = (await store.overview(DEADLINE))["leases"]
        return {row["bot"]: row for row in leases if name is None or row["bot"] == name}

    def hold(row: dict[str, Any] | None) -> tuple[Any, ...]:
        return (row["term"], row["holder"]) if row is not None else ()

    before = await read()
    terms = await store.terms(name, MOST_TERMS, 60.0)
    for _ in range(20):
        leases = await read()
        moved = {bot for bot in before | leases if hold(before.get(bot)) != hold(leases.get(bot))}
        if not moved:
            break
        terms = [row for row in terms if row["bot"] not in moved]
        for bot in moved:
            terms += await store.terms(bot, MOST_TERMS, 60.0)
        before = leases
    return terms, list(before.values())


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
        return await of_one_moment(store, name)

    verdicts = journal.verify(*ask(database, read))
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
@click.option("--timeout", type=Seconds(0, 86_400), default=60.0, show_default=True, help="Seconds.")
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

    Exit code 0 when there is one, and its id on standard output; 75 when the time is up; 78 when nothing has ever run
    in this database, or at once when it does not know the bot that the environment names: name it by --name to wait.
    """
    from botlease import status as show

    if active is standby:
        raise click.UsageError("wait for what? --active or --standby, one of them")

    end = clock.now() + timeout

    async def until(store: Any) -> str | None:
        changed = asyncio.Event()
        store.on_change = changed.set
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
    from botlease.doctor import examine
    from botlease.title import hide_password

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
