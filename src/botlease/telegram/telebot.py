"""pyTelegramBotAPI behind the gateway: an update is done when everything that it started has ended.

.. code-block:: python

    from botlease.telegram import telebot as botlease_telebot

    bot = TeleBot(TOKEN)
    botlease_telebot.through_gateway(bot)

Started without ``botlease run --gateway`` it changes nothing. For the threaded ``TeleBot``, which is the default.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import requests
from telebot import TeleBot, apihelper

from botlease.telegram.address import address

MARK = "botlease_update_id"


def through_gateway(bot: TeleBot, *, url: str | None = None) -> None:
    """Point pyTelegramBotAPI at the gateway, and acknowledge what this bot has handled. ``url``: as
    ``botlease.gateway`` gave it. pyTelegramBotAPI has one address for all bots of a program: with several of them, each
    needs a program of its own, or one term and gateway for all."""
    url = address(url)
    if not url:
        return
    if not bot.threaded:
        raise ValueError("the gateway's hook is for the threaded TeleBot: leave out threaded=False")
    api: Any = apihelper
    api.API_URL, api.FILE_URL = f"{url}/ack/bot{{0}}/{{1}}", f"{url}/file/bot{{0}}/{{1}}"
    session, lock, pending = requests.Session(), threading.Lock(), Counter[int]()
    pool: Any = bot.worker_pool
    process, put = bot.process_new_updates, pool.put

    def ended(update_id: int) -> None:
        with lock:
            pending[update_id] -= 1
            if pending[update_id] > 0:
                return
            del pending[update_id]
        try:
            session.post(f"{url}/ack/bot{bot.token}/botleaseDone", json={"update_ids": [update_id]}, timeout=5)
        except OSError:
            pass  # not done then: it is handed out again after a restart

    def process_marked(updates: list[Any]) -> None:
        for update in updates:
            pending[update.update_id] += 1  # until all that it starts has been put into the pool
            for part in vars(update).values():
                if hasattr(part, "__dict__"):
                    setattr(part, MARK, update.update_id)
        try:
            process(updates)
        finally:
            for update in updates:
                ended(update.update_id)

    def put_marked(task: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        parts = [part for arg in args for part in (arg if isinstance(arg, list) else [arg])]
        ids = {part.__dict__[MARK] for part in parts if MARK in getattr(part, "__dict__", ())}

        def run() -> None:
            try:
                task(*args, **kwargs)
            finally:
                for update_id in ids:
                    ended(update_id)

        with lock:
            pending.update(ids)
        put(run)

    pool.put, bot.process_new_updates = put_marked, process_marked  # type: ignore[method-assign]
