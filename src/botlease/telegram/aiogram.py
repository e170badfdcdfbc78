"""aiogram behind the gateway: an update is done when its handler is.

.. code-block:: python

    from botlease.telegram import aiogram as botlease_aiogram

    bot = Bot(TOKEN, session=botlease_aiogram.session())
    botlease_aiogram.acknowledge(dispatcher)

Started without ``botlease run --gateway`` it changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import AiogramError
from aiogram.methods import TelegramMethod
from aiogram.types import TelegramObject, Update

from botlease.telegram.address import address


class _Done(TelegramMethod[bool]):
    __returning__ = bool
    __api_method__ = "botleaseDone"
    update_ids: list[int]


def session(*, url: str | None = None, **options: Any) -> AiohttpSession:
    """A session that goes through the gateway; the options are those of ``AiohttpSession``. ``url``: as
    ``botlease.gateway`` gave it, where several bots run in one program."""
    url = address(url)
    if not url:
        return AiohttpSession(**options)
    base, file = f"{url}/ack/bot{{token}}/{{method}}", f"{url}/file/bot{{token}}/{{path}}"
    return AiohttpSession(api=TelegramAPIServer(base=base, file=file), **options)


def acknowledge(dispatcher: Dispatcher) -> None:
    """Tell the gateway of each update whose handler has ended, also by an error; not if it was cancelled. Of bots with
    a :func:`session` behind a gateway; for others it changes nothing."""
    dispatcher.update.outer_middleware(_acknowledging)


async def _acknowledging(
    handler: Callable[[TelegramObject, dict[str, Any]], Awaitable[Any]], event: TelegramObject, data: dict[str, Any]
) -> Any:
    bot: Bot = data["bot"]
    try:
        result = await handler(event, data)
    except Exception:
        await _done(bot, event)
        raise
    await _done(bot, event)
    return result


async def _done(bot: Bot, event: TelegramObject) -> None:
    if isinstance(event, Update) and "/ack/" in bot.session.api.base:
        try:
            await bot(_Done(update_ids=[event.update_id]))
        except AiogramError:
            pass  # not done then: it is handed out again after a restart
