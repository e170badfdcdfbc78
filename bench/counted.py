"""What a PostgreSQL server was asked for and wrote."""

from __future__ import annotations

import asyncio
import time

import asyncpg

from bench.lab import boot

COUNTERS = """
SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS wal,
  txid_snapshot_xmax(txid_current_snapshot())::bigint AS xids,
  (SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database)::bigint AS statements
"""


async def _counters(url: str) -> dict[str, int]:
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(COUNTERS)
    await connection.close()
    return {name: int(value) for name, value in row.items()}


class Counted:
    """What the PostgreSQL server was asked for and wrote meanwhile, an hour, without our own asking."""

    def __init__(self, url: str) -> None:
        self.url = url
        asyncio.run(self._checkpoint())  # one that came by itself would write whole pages

    async def _checkpoint(self) -> None:
        connection = await asyncpg.connect(self.url)
        await connection.execute("CHECKPOINT")
        await connection.close()

    def start(self) -> None:
        one = asyncio.run(_counters(self.url))
        self.before = asyncio.run(_counters(self.url))
        self.ours = {k: self.before[k] - one[k] for k in one}
        self.began = boot()

    def stop(self) -> dict[str, float]:
        time.sleep(1.2)  # a session's own counts come a second late
        after, span = asyncio.run(_counters(self.url)), boot() - self.began
        return {k: max(0, after[k] - self.before[k] - self.ours[k]) / span * 3600 for k in after}


def nobody(url: str, seconds: float) -> dict[str, float]:
    """What a server that nobody uses does in an hour by itself."""
    counted = Counted(url)
    time.sleep(1)
    counted.start()
    time.sleep(seconds)
    return counted.stop()
