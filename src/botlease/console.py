"""What the commands share: how they are run, the database option, asking a store one thing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from botlease import settings
from botlease.exits import CONFIG, UNAVAILABLE, fail
from botlease.settings import ConfigurationError
from botlease.title import hide_password

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def invoke(command: click.Command, program: str, obj: object = None) -> NoReturn:
    """Run a command as a program: a wrong command line gets one line with the cure, and exit code 2."""
    try:
        command.main(prog_name=program, standalone_mode=False, obj=obj)
    except click.UsageError as e:
        if type(e).__name__ == "NoArgsIsHelpError":  # by its name: click has the class since 8.2 only
            click.echo(e.format_message())
            sys.exit(2)
        path = e.ctx.command_path if e.ctx is not None else program
        fail(f"{e.format_message().rstrip('.')}: see `{path} --help`", 2)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.Abort:
        sys.exit(130)
    sys.exit(0)


def database_option(f: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--database",
        metavar="URL",
        help="postgresql://... or sqlite:///file. Default: $BOTLEASE_DATABASE_URL, $DATABASE_URL, else SQLite "
        "in your state folder. Better in the environment than here, where it may hold a password.",
    )(f)


def ask(database: str | None, question: Callable[[Any], Any], *, patience: float = 0.0) -> Any:
    """Open the store as it is, ask one thing, close. Errors end the program with one line; for ``patience`` seconds
    that nothing has run there yet is none."""
    import asyncio

    from botlease import clock
    from botlease.stores import Late, StoreEmpty, StoreError, StoreRefused, open_store, unanswered

    end = clock.now() + patience

    hide_password(database)

    async def asked() -> Any:
        url = settings.database_url(database, os.environ)
        store = open_store(url)
        try:
            path = getattr(store, "path", "")
            if path and not os.path.exists(path):  # noqa: ASYNC240, PTH110
                # Opening it would make it, and a mistyped path would look like an empty database.
                raise StoreEmpty(f"there is no database at {url}: nothing has run there yet, or the URL is wrong")
            await store.open(5.0, upgrade=False)
            return await question(store)
        except Late as e:
            raise StoreError(unanswered(e, store.url)) from None
        finally:
            await store.aclose()

    async def patiently() -> Any:
        while True:
            try:
                return await asked()
            except StoreEmpty:
                if clock.now() >= end:
                    raise
                await asyncio.sleep(0.2)

    try:
        settings.check_environment(os.environ)
        return asyncio.run(patiently())
    except (StoreRefused, ConfigurationError) as e:
        fail(str(e), CONFIG)
    except StoreError as e:
        fail(str(e), UNAVAILABLE)
