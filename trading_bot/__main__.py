"""``python -m trading_bot``: reads TELEGRAM_BOT_TOKEN (or BOT_TOKEN), DATABASE_URL, TELEGRAM_API_URL, PRICE_URL.

Run it through ``railway_startup.py`` or ``botlease run``: alone it has no term, and then its ledger refuses orders.
"""

from __future__ import annotations

import logging
import os
import sys

from telegram.error import InvalidToken

from trading_bot.bot import Trader
from trading_bot.ledger import ForeignTable, open_ledger
from trading_bot.prices import from_environment


class Discreet(logging.Formatter):
    """httpx logs whole URLs, and errors quote the token: blot it out of whatever is logged, tracebacks included."""

    def __init__(self, token: str) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")
        self.token = token

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(self.token, "***")


def main() -> int:
    env = dict(os.environ)
    token = env.get("TELEGRAM_BOT_TOKEN") or env.get("BOT_TOKEN") or ""
    if ":" not in token:
        print("trading_bot: set TELEGRAM_BOT_TOKEN to the token that @BotFather gave you", file=sys.stderr)
        return 78
    database = env.get("BOTLEASE_DATABASE_URL") or env.get("DATABASE_URL") or ""
    if not database:
        print("trading_bot: set DATABASE_URL, or start it with railway_startup.py", file=sys.stderr)
        return 78
    if "BOTLEASE_GATE_FD" in env:
        # A warm start. What takes time, importing python-telegram-bot, is done by now; from here on only one may go.
        from botlease import wait_at_gate

        env["BOTLEASE_TERM"] = str(wait_at_gate())
    output = logging.StreamHandler()
    output.setFormatter(Discreet(token))
    logging.basicConfig(handlers=[output], level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        term = int(env.get("BOTLEASE_TERM", "0"))
        prices = from_environment(env)
    except ValueError as e:
        print(f"trading_bot: BOTLEASE_TERM and PRICE_SEED must be whole numbers: {e}", file=sys.stderr)
        return 78
    ledger = open_ledger(database, env.get("BOTLEASE_BOT") or token.split(":")[0], term)
    trader = Trader(ledger, prices, env.get("BOT_VERSION", "1"))
    try:
        trader.build(token, env.get("TELEGRAM_API_URL")).run_polling(poll_interval=0.0, timeout=10, bootstrap_retries=5)
    except ForeignTable as e:
        print(f"trading_bot: {e}", file=sys.stderr)
        return 78
    except InvalidToken:
        print("trading_bot: Telegram does not accept the token in TELEGRAM_BOT_TOKEN", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
