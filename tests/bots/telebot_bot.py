"""An unmodified pyTelegramBotAPI program that answers every message by replying to it. argv: base URL, token."""

import sys

import telebot

telebot.apihelper.API_URL = sys.argv[1] + "/bot{0}/{1}"
bot = telebot.TeleBot(sys.argv[2])


@bot.message_handler(func=lambda message: True)
def answer(message):
    bot.reply_to(message, "telebot " + message.text)


bot.infinity_polling()
