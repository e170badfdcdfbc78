"""python-telegram-bot behind the gateway: an update is done when its handlers are.

.. code-block:: python

    from botlease.telegram import ptb

    application = ptb.through_gateway(Application.builder().token(TOKEN)).build()

Started without ``botlease run --gateway`` it changes nothing. Handlers with ``block=False`` count as done when they
begin. To handle several at once pass ``concurrent_updates`` here: set on the builder afterwards it replaces the hook.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from telegram import Update
from telegram.error import TelegramError
from telegram.ext import ApplicationBuilder, BaseUpdateProcessor

from botlease.telegram.address import address


class AcknowledgingProcessor(BaseUpdateProcessor):
    """Handles up to ``concurrent_updates`` at once, and tells the gateway of each that is done."""

    def __init__(self, concurrent_updates: int = 1) -> None:
        super().__init__(concurrent_updates)

    async def do_process_update(self, update: object, coroutine: Awaitable[Any]) -> None:
        await coroutine  # errors went to the error handlers; what is cancelled is not done
        if isinstance(update, Update):
            try:
                await update.get_bot().do_api_request("botleaseDone", {"update_ids": [update.update_id]})
            except TelegramError:
                pass  # not done then: it is handed out again after a restart

    async def initialize(self) -> None:
        pass

    async def shutdown(self) -> None:
        pass


def through_gateway(
    builder: ApplicationBuilder[Any, Any, Any, Any, Any, Any], concurrent_updates: int = 1, *, url: str | None = None
) -> Any:
    """Point the builder of an application at the gateway. ``url``: as ``botlease.gateway`` gave it, where several bots
    run in one program. Returns the builder."""
    url = address(url)
    if not url:
        return builder.concurrent_updates(concurrent_updates) if concurrent_updates > 1 else builder
    return (
        builder.base_url(f"{url}/ack/bot")
        .base_file_url(f"{url}/file/bot")
        .concurrent_updates(AcknowledgingProcessor(concurrent_updates))
    )
