"""The simulated Bot API in a thread of its own, for tests that wait for processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from harness import until

from botlease.telegram.botapi import Profile
from botlease.telegram.simulator import Message, Simulator

T = TypeVar("T")
BOT = 123456
TOKEN = f"{BOT}:AAGq-a-token-of-a-test-0123456789"


class Telegram:
    def __init__(self, profile: Profile = Profile.SOURCE) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.simulator = asyncio.run_coroutine_threadsafe(Simulator.start(profile=profile), self.loop).result()
        self.chat = self.do(lambda: self.simulator.user(BOT))

    def do(self, what: Callable[[], T]) -> T:
        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result()

    def say(self, text: str = "hello") -> Message:
        return self.do(lambda: self.chat.say(text))

    def answered(self, text: str = "hello", limit: float = 20.0) -> Message:
        message = self.say(text)
        until(lambda: message.replies, limit)
        return message

    @property
    def env(self) -> dict[str, str]:
        return {
            "TELEGRAM_BOT_TOKEN": TOKEN,
            "TELEGRAM_API_URL": self.simulator.url,
            "BOTLEASE_BOT_API": self.simulator.url,
        }

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.simulator.stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()
