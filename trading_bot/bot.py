"""The conversation: /start /price /buy /sell /portfolio."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from telegram import Message, Update
from telegram.ext import Application, ApplicationBuilder, CommandHandler, ContextTypes

from botlease.telegram import ptb
from trading_bot.ledger import AlreadyPlaced, Ledger, NotEnough, Order, Stale
from trading_bot.prices import SYMBOLS, Prices, UnknownSymbol

log = logging.getLogger("trading_bot")
HELP = f"""Paper trading. You start with 10,000 dollars that do not exist.
/price SYMBOL
/buy SYMBOL AMOUNT
/sell SYMBOL AMOUNT
/portfolio
Symbols: {", ".join(SYMBOLS)}"""

Handler = Callable[[Update, ContextTypes.DEFAULT_TYPE], Coroutine[Any, Any, None]]


class Wrong(Exception):
    """What the user typed cannot be understood; the message says how it should read."""


def parse(words: list[str], usage: str) -> tuple[str, float]:
    try:
        symbol, amount = words[0], float(words[1])
    except (IndexError, ValueError):
        raise Wrong(f"Like this: {usage}") from None
    if not 0 < amount < 1e9:  # refuses nan and inf, too
        raise Wrong("The amount must be above 0.")
    return symbol, amount


class Trader:
    def __init__(self, ledger: Ledger, prices: Prices, version: str) -> None:
        self.ledger, self.prices, self.version = ledger, prices, version

    async def start(self, message: Message, words: list[str]) -> str:
        return f"{HELP}\n(version {self.version})"

    async def price(self, message: Message, words: list[str]) -> str:
        if not words:
            raise Wrong("Like this: /price BTC")
        return f"{words[0].upper()} {await self.prices.price(words[0]):,.2f}"

    async def buy(self, message: Message, words: list[str]) -> str:
        return await self._trade(message, words, 1, "/buy BTC 0.1")

    async def sell(self, message: Message, words: list[str]) -> str:
        return await self._trade(message, words, -1, "/sell BTC 0.1")

    async def _trade(self, message: Message, words: list[str], sign: int, usage: str) -> str:
        symbol, amount = parse(words, usage)
        price = await self.prices.price(symbol)
        order = Order(message.chat_id, message.message_id, symbol.upper(), sign * amount, price)
        await self.ledger.place(order)
        return f"{'Bought' if sign > 0 else 'Sold'} {amount:g} {order.symbol} at {price:,.2f}."

    async def portfolio(self, message: Message, words: list[str]) -> str:
        cash, holdings = await self.ledger.holdings(message.chat_id)
        total = cash
        lines = [f"Cash {cash:,.2f}"]
        for symbol, amount in sorted(holdings.items()):
            worth = amount * await self.prices.price(symbol)
            total += worth
            lines.append(f"{symbol} {amount:g} = {worth:,.2f}")
        return "\n".join([*lines, f"Total {total:,.2f}"])

    def handler(self, answer: Callable[[Message, list[str]], Awaitable[str]]) -> Handler:
        async def handle(update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
            message = update.message
            if message is None:
                return
            try:
                text = await answer(message, list(context.args or []))
            except (Wrong, UnknownSymbol, NotEnough) as e:
                text = str(e)
            except AlreadyPlaced:
                text = "That order was already placed."
            except Stale:
                # The database refused: somebody else trades now. Say nothing to the user, he will.
                log.error("the database refused an order of a stale term; stopping")
                context.application.stop_running()
                return
            await message.reply_text(text, do_quote=True)

        return handle

    def build(self, token: str, api: str | None) -> Application:  # type: ignore[type-arg]
        builder = ApplicationBuilder().token(token)
        if "BOTLEASE_API_URL" in os.environ:  # started behind the gateway, which knows where the Bot API is
            builder = ptb.through_gateway(builder)
        elif api:
            builder = builder.base_url(f"{api}/bot").base_file_url(f"{api}/file/bot")
        application = builder.build()
        for name in ("start", "price", "buy", "sell", "portfolio"):
            application.add_handler(CommandHandler(name, self.handler(getattr(self, name))))

        async def opened(_: object) -> None:
            await self.ledger.open()

        async def closed(_: object) -> None:
            await self.ledger.close()

        application.post_init = opened
        application.post_shutdown = closed
        return application
