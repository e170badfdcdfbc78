"""aiogram as its documentation has it; behind the gateway with botlease's hook."""

import asyncio
import os

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.types import Message

from botlease.telegram import aiogram as hook

TOKEN, WORK = os.environ["TELEGRAM_BOT_TOKEN"], float(os.environ["WORK"])
dispatcher = Dispatcher()


@dispatcher.message()
async def answer(message: Message) -> None:
    await asyncio.sleep(WORK)
    await message.reply("done")


async def main() -> None:
    if "BOTLEASE_API_URL" in os.environ:
        session = hook.session()
    else:
        session = AiohttpSession(api=TelegramAPIServer.from_base(os.environ["TELEGRAM_API_URL"]))
    hook.acknowledge(dispatcher)
    await dispatcher.start_polling(Bot(TOKEN, session=session))


asyncio.run(main())
