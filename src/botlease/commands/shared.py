"""What the operator's commands share: how one is made, which bot is meant, and their options."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import click

from botlease import settings
from botlease.console import CONTEXT
from botlease.settings import ConfigurationError
from botlease.text import clean

DEADLINE: Final = 5.0
COMMANDS: Final[dict[str, click.Command]] = {}
TIMED_OUT = 75


class Seconds(click.FloatRange):
    """Within bounds; "nan" passes any bound, and a time that is none never ends."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if seconds != seconds:
            self.fail(f"{value!a} is not a number of seconds", param, ctx)
        return seconds


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
