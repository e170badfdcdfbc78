"""An unmodified aiogram program that answers every message by replying to it. argv: base URL, token."""

import asyncio
import sys

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer

dp = Dispatcher()


@dp.message()
async def answer(message):
    await message.reply("aiogram " + message.text)


bot = Bot(sys.argv[2], session=AiohttpSession(api=TelegramAPIServer.from_base(sys.argv[1])))
asyncio.run(dp.start_polling(bot))
