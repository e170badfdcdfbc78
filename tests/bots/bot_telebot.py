"""pyTelegramBotAPI as its documentation has it; behind the gateway with botlease's hook."""

import os
import time

from telebot import TeleBot, apihelper

from botlease.telegram import telebot as hook

TOKEN, WORK = os.environ["TELEGRAM_BOT_TOKEN"], float(os.environ["WORK"])
bot = TeleBot(TOKEN)
if "BOTLEASE_API_URL" not in os.environ:
    apihelper.API_URL = os.environ["TELEGRAM_API_URL"] + "/bot{0}/{1}"
hook.through_gateway(bot)


@bot.message_handler(func=lambda message: True)
def answer(message):
    time.sleep(WORK)
    bot.reply_to(message, "done")


bot.infinity_polling()
