"""pyTelegramBotAPI behind the gateway: an update is done when its handler is.

.. code-block:: python

    from botlease.telegram import telebot as botlease_telebot

    bot = TeleBot(TOKEN, use_class_middlewares=True)
    botlease_telebot.through_gateway(bot)

Started without ``botlease run --gateway`` it changes nothing. For the threaded ``TeleBot``. An update that another
middleware cancels is not acknowledged.
"""

from __future__ import annotations

import os
from typing import Any

import requests
from telebot import TeleBot, apihelper
from telebot.handler_backends import BaseMiddleware
from telebot.util import update_types

MARK = "botlease_update_id"


class _Acknowledging(BaseMiddleware):
    def __init__(self, bot: TeleBot, url: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.update_types = update_types
        self.bot, self.url = bot, url
        self.session = requests.Session()

    def pre_process(self, message: Any, data: Any) -> None:
        pass

    def post_process(self, message: Any, data: Any, exception: Exception | None) -> None:
        update_id = getattr(message, MARK, None)
        if update_id is not None:
            self.done(update_id)

    def done(self, update_id: int) -> None:
        try:
            url = f"{self.url}/ack/bot{self.bot.token}/botleaseDone"
            self.session.post(url, json={"update_ids": [update_id]}, timeout=5)
        except OSError:
            pass  # not done then: it is handed out again after a restart


def through_gateway(bot: TeleBot) -> None:
    """Point pyTelegramBotAPI at the gateway, and acknowledge what this bot has handled."""
    url = os.environ.get("BOTLEASE_API_URL")
    if not url:
        return
    if not bot.use_class_middlewares:
        raise ValueError("the gateway's hook is a class middleware: TeleBot(token, use_class_middlewares=True)")
    api: Any = apihelper
    api.API_URL, api.FILE_URL = f"{url}/ack/bot{{0}}/{{1}}", f"{url}/file/bot{{0}}/{{1}}"
    process = bot.process_new_updates

    def marked(updates: list[Any]) -> None:
        for update in updates:
            parts = [part for part in vars(update).values() if hasattr(part, "__dict__")]
            for part in parts:
                setattr(part, MARK, update.update_id)
            if not parts:  # of a kind that this telebot does not know: no handler will see it
                hook.done(update.update_id)
        process(updates)

    hook = _Acknowledging(bot, url)
    bot.process_new_updates = marked  # type: ignore[method-assign]
    bot.setup_middleware(hook)
