"""Where prices come from: a seeded random walk, or a URL that answers {"price": number}."""

from __future__ import annotations

import math
import random
import time
from typing import Protocol

SYMBOLS = {"BTC": 60_000.0, "ETH": 3_000.0, "SOL": 150.0, "TON": 5.0}


class UnknownSymbol(Exception):
    """The message can be shown to the user."""


class Prices(Protocol):
    async def price(self, symbol: str) -> float: ...


def known(symbol: str) -> str:
    symbol = symbol.upper()
    if symbol not in SYMBOLS:
        raise UnknownSymbol(f"I do not know {symbol[:10]!r}. I trade {', '.join(SYMBOLS)}.")
    return symbol


class RandomWalk:
    """The same seed gives the same prices at the same second, on every instance: a new deployment goes on
    where the old one stopped."""

    STEP = 5.0  # seconds between two prices
    VOLATILITY = 0.002  # of one step

    def __init__(self, seed: int = 1) -> None:
        self.seed = seed

    async def price(self, symbol: str) -> float:
        symbol = known(symbol)
        step = int(time.time() / self.STEP)  # noqa: TID251 - a market has wall time
        level = 0.0
        # A sum of waves with random phases walks as a random walk does, and needs no history.
        source = random.Random(f"{self.seed}/{symbol}")
        for octave in range(12):
            period = 2.0 ** (octave + 1)
            level += (
                self.VOLATILITY * math.sqrt(period) * math.sin(step / period * math.tau + source.uniform(0, math.tau))
            )
        return round(SYMBOLS[symbol] * math.exp(level), 2)


class HttpPrices:
    """``PRICE_URL`` with ``{symbol}`` in it, for instance your exchange's ticker."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def price(self, symbol: str) -> float:
        import httpx

        symbol = known(symbol)
        async with httpx.AsyncClient(timeout=5) as client:
            answer = await client.get(self.url.format(symbol=symbol))
            answer.raise_for_status()
            return float(answer.json()["price"])


def from_environment(env: dict[str, str]) -> Prices:
    if env.get("PRICE_URL"):
        return HttpPrices(env["PRICE_URL"])
    return RandomWalk(int(env.get("PRICE_SEED", "1")))
