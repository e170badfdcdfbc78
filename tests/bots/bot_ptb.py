"""python-telegram-bot as its documentation has it; behind the gateway with botlease's hook."""

import asyncio
import os

from telegram import Update
from telegram.ext import Application, ContextTypes, MessageHandler, filters

from botlease.telegram import ptb

TOKEN, WORK = os.environ["TELEGRAM_BOT_TOKEN"], float(os.environ["WORK"])


async def answer(update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
    await asyncio.sleep(WORK)
    await update.message.reply_text("done", do_quote=True)


builder = Application.builder().token(TOKEN)
if "BOTLEASE_API_URL" not in os.environ:
    builder = builder.base_url(os.environ["TELEGRAM_API_URL"] + "/bot")
application = ptb.through_gateway(builder).build()
application.add_handler(MessageHandler(filters.TEXT, answer))
application.run_polling()
