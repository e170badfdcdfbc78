"""The seed's plain design, honestly run: deactivate the others, register as active, start at once; every
heartbeat look whether this instance is still active, and start or stop the bot accordingly.

argv: database URL, table, instance id, then the bot's command. It takes SIGTERM: stops the bot, then ends.
"""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from typing import Any

HEARTBEAT = 5.0
STOP_GRACE = 10.0


async def execute(url: str, *statements: str) -> list[Any]:
    rows: list[Any] = []
    if url.startswith("sqlite:///"):
        db = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=5)
        with db:
            for statement in statements:
                rows = db.execute(statement).fetchall()
        db.close()
        return rows
    import asyncpg

    connection = await asyncpg.connect(url, statement_cache_size=0)
    try:
        for statement in statements:
            rows = await connection.fetch(statement)
    finally:
        await connection.close()
    return rows


def create(table: str) -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS {table} (instance_id TEXT PRIMARY KEY, started_at TIMESTAMP, "
        "last_heartbeat TIMESTAMP, is_active BOOLEAN)"
    )


async def stop(bot: asyncio.subprocess.Process) -> None:
    bot.terminate()
    try:
        await asyncio.wait_for(bot.wait(), STOP_GRACE)
    except TimeoutError:
        bot.kill()
        await bot.wait()


async def main(url: str, table: str, me: str, command: list[str]) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await execute(
        url,
        f"UPDATE {table} SET is_active = FALSE",
        f"INSERT INTO {table} VALUES ('{me}', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, TRUE)",
    )
    bot: asyncio.subprocess.Process | None = None
    while not ending.is_set():
        rows = await execute(
            url,
            f"UPDATE {table} SET last_heartbeat = CURRENT_TIMESTAMP WHERE instance_id = '{me}'",
            f"SELECT is_active FROM {table} WHERE instance_id = '{me}'",
        )
        active = bool(rows and rows[0][0])
        if active and (bot is None or bot.returncode is not None):
            bot = await asyncio.create_subprocess_exec(*command)
        elif not active and bot is not None and bot.returncode is None:
            await stop(bot)
        try:
            await asyncio.wait_for(ending.wait(), HEARTBEAT)
        except TimeoutError:
            pass
    if bot is not None and bot.returncode is None:
        await stop(bot)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
