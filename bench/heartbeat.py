"""The floor of an idle holder: a program that writes one row each two seconds, as a holder does at the default ttl, and
nothing else: heartbeat.py URL|FILE"""

import asyncio
import sqlite3
import sys
import time

EVERY = 2.0
TABLE = "CREATE TABLE IF NOT EXISTS heartbeat (beat int)"
ROW = "INSERT INTO heartbeat VALUES (0)"
BEAT = "UPDATE heartbeat SET beat = beat + 1"


async def postgres(url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    await connection.execute(f"{TABLE}; {ROW}")
    beat = await connection.prepare(BEAT)
    while True:
        await beat.fetch()
        await asyncio.sleep(EVERY)


def sqlite(path: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = PERSIST")  # the cheapest that is safe, and ours
    for statement in (TABLE, ROW):
        db.execute(statement)
    while True:
        db.execute(BEAT)
        time.sleep(EVERY)


if __name__ == "__main__":
    if sys.argv[1].startswith("postgresql://"):
        asyncio.run(postgres(sys.argv[1]))
    else:
        sqlite(sys.argv[1])
