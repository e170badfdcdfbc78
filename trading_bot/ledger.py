"""The ledger: orders in the database that also holds the lease.

Two rules are the database's own, so that no bug in this program can break them:

* an order carries the term of the lease; a trigger refuses it unless that term is the current one and still
  held (the fencing token, checked where the effect is);
* one message becomes at most one order (unique on bot and message).
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass
from typing import Any, Final, Protocol

START_CASH: Final = 10_000.0
COLUMNS: Final = "bot, term, chat, message, symbol, amount, price"


class Stale(Exception):
    """Another instance has taken over: this one must not trade any more."""


class AlreadyPlaced(Exception):
    """This message was turned into an order before."""


class ForeignTable(Exception):
    """There is a table of this name that is not ours."""

    def __init__(self) -> None:
        super().__init__("the table trades of this database belongs to something else: use another database or schema")


class NotEnough(Exception):
    """The message can be shown to the user."""


@dataclass(frozen=True, slots=True)
class Order:
    chat: int
    message: int
    symbol: str
    amount: float  # bought above 0, sold below
    price: float


class Ledger(Protocol):
    async def open(self) -> None: ...
    async def place(self, order: Order) -> None: ...
    async def holdings(self, chat: int) -> tuple[float, dict[str, float]]: ...
    async def close(self) -> None: ...


SQLITE_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS trades (
  id INTEGER PRIMARY KEY, bot TEXT NOT NULL, term INTEGER NOT NULL, chat INTEGER NOT NULL, message INTEGER NOT NULL,
  symbol TEXT NOT NULL, amount REAL NOT NULL, price REAL NOT NULL, at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
  UNIQUE (bot, chat, message)
);
CREATE TRIGGER IF NOT EXISTS trades_carry_the_current_term BEFORE INSERT ON trades
WHEN NOT EXISTS (SELECT 1 FROM bot_leases WHERE bot = NEW.bot AND term = NEW.term AND holder IS NOT NULL)
BEGIN SELECT RAISE(ABORT, 'stale term'); END;
"""

POSTGRES_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS trades (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, bot text NOT NULL, term bigint NOT NULL, chat bigint NOT NULL,
  message bigint NOT NULL, symbol text NOT NULL, amount double precision NOT NULL, price double precision NOT NULL,
  at timestamptz NOT NULL DEFAULT clock_timestamp(), UNIQUE (bot, chat, message)
);
-- FOR SHARE: an acquire by another instance waits until this order is committed, or comes first and refuses it.
CREATE OR REPLACE FUNCTION trades_carry_the_current_term() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM 1 FROM bot_leases WHERE bot = NEW.bot AND term = NEW.term AND holder IS NOT NULL FOR SHARE;
  IF NOT FOUND THEN RAISE EXCEPTION 'stale term'; END IF;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS trades_carry_the_current_term ON trades;
CREATE TRIGGER trades_carry_the_current_term BEFORE INSERT ON trades
  FOR EACH ROW EXECUTE FUNCTION trades_carry_the_current_term();
"""


def _check(order: Order, cash: float, holdings: dict[str, float]) -> None:
    if order.amount > 0 and order.amount * order.price > cash + 1e-9:
        raise NotEnough(f"That costs {order.amount * order.price:,.2f}, and you have {cash:,.2f}.")
    if order.amount < 0 and -order.amount > holdings.get(order.symbol, 0.0) + 1e-9:
        raise NotEnough(f"You have {holdings.get(order.symbol, 0.0):g} {order.symbol}.")


def _sum(rows: list[Any]) -> tuple[float, dict[str, float]]:
    cash = START_CASH
    holdings: dict[str, float] = {}
    for symbol, amount, cost in rows:
        cash -= cost
        if abs(amount) > 1e-9:
            holdings[symbol] = amount
    return cash, holdings


class SqliteLedger:
    def __init__(self, path: str, bot: str, term: int) -> None:
        self.path, self.bot, self.term = path, bot, term

    def _run(self, order: Order | None, chat: int) -> tuple[float, dict[str, float]]:
        db = sqlite3.connect(self.path, timeout=5, isolation_level=None)
        try:
            if order is not None:
                db.execute("BEGIN IMMEDIATE")
            rows = db.execute(
                "SELECT symbol, sum(amount), sum(amount * price) FROM trades WHERE bot = ? AND chat = ? "
                "GROUP BY symbol",
                (self.bot, chat),
            ).fetchall()
            if order is not None:
                _check(order, *_sum(rows))
                values = (self.bot, self.term, chat, order.message, order.symbol, order.amount, order.price)
                db.execute(
                    "INSERT INTO trades (bot, term, chat, message, symbol, amount, price) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
                db.execute("COMMIT")
            return _sum(rows)
        except sqlite3.IntegrityError as e:
            if "stale term" in str(e):
                raise Stale(f"term {self.term} is over") from None
            raise AlreadyPlaced from None
        finally:
            db.close()

    async def open(self) -> None:
        def create() -> None:
            db = sqlite3.connect(self.path, timeout=5)
            try:
                db.executescript(SQLITE_SCHEMA)
                db.execute(f"SELECT {COLUMNS} FROM trades LIMIT 0")  # noqa: S608 - a constant
            except sqlite3.OperationalError as e:
                if "no such column" in str(e):
                    raise ForeignTable from None
                raise
            finally:
                db.close()

        await asyncio.to_thread(create)

    async def place(self, order: Order) -> None:
        await asyncio.to_thread(self._run, order, order.chat)

    async def holdings(self, chat: int) -> tuple[float, dict[str, float]]:
        return await asyncio.to_thread(self._run, None, chat)

    async def close(self) -> None:
        pass


class PostgresLedger:
    def __init__(self, url: str, bot: str, term: int) -> None:
        self.url, self.bot, self.term = url, bot, term
        self._pool: Any = None

    async def open(self) -> None:
        import asyncpg

        self._pool = await asyncpg.create_pool(self.url, min_size=1, max_size=2, statement_cache_size=0)
        try:
            await self._pool.fetch(f"SELECT {COLUMNS} FROM trades LIMIT 0")  # noqa: S608 - a constant
        except asyncpg.UndefinedTableError:
            await self._pool.execute(POSTGRES_SCHEMA)
        except asyncpg.UndefinedColumnError:
            raise ForeignTable from None
        fenced = (
            "SELECT 1 FROM pg_trigger WHERE tgname = 'trades_carry_the_current_term' AND tgrelid = 'trades'::regclass"
        )
        if not await self._pool.fetchval(fenced):
            await self._pool.execute(POSTGRES_SCHEMA)  # restored without it: an order would not be fenced

    async def place(self, order: Order) -> None:
        import asyncpg

        try:
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "SELECT pg_advisory_xact_lock($1)", order.chat
                )  # one order of a user at a time
                _check(order, *await self._holdings(connection, order.chat))
                await connection.execute(
                    "INSERT INTO trades (bot, term, chat, message, symbol, amount, price) "
                    "VALUES ($1, $2, $3, $4, $5, $6, $7)",
                    *(self.bot, self.term, order.chat, order.message, order.symbol, order.amount, order.price),
                )
        except asyncpg.RaiseError:
            raise Stale(f"term {self.term} is over") from None
        except asyncpg.UniqueViolationError:
            raise AlreadyPlaced from None

    async def _holdings(self, connection: Any, chat: int) -> tuple[float, dict[str, float]]:
        rows = await connection.fetch(
            "SELECT symbol, sum(amount), sum(amount * price) FROM trades WHERE bot = $1 AND chat = $2 GROUP BY symbol",
            *(self.bot, chat),
        )
        return _sum([tuple(r) for r in rows])

    async def holdings(self, chat: int) -> tuple[float, dict[str, float]]:
        async with self._pool.acquire() as connection:
            return await self._holdings(connection, chat)

    async def close(self) -> None:
        await self._pool.close()


def open_ledger(url: str, bot: str, term: int) -> Ledger:
    if url.startswith("sqlite:"):
        from botlease.stores import sqlite_path

        return SqliteLedger(sqlite_path(url), bot, term)  # the very file of the lease
    return PostgresLedger(url, bot, term)
