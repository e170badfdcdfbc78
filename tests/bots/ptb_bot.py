"""An unmodified python-telegram-bot program that answers every message by replying to it. argv: base URL, token."""

import sys

from telegram.ext import ApplicationBuilder, MessageHandler, filters


async def answer(update, context):
    await update.message.reply_text("ptb " + update.message.text, do_quote=True)


app = ApplicationBuilder().token(sys.argv[2]).base_url(f"{sys.argv[1]}/bot").build()
app.add_handler(MessageHandler(filters.ALL, answer))
app.run_polling()
