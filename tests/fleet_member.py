"""A member of a fleet, as a program has it: fleet_member.py NAME LOG. Each bot writes when it begins and ends."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import botlease


async def main(name: str, log: str, options: dict[str, object]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(what: str, term: botlease.Term) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.write(file, f"{what} {term.bot} {term.number} {now:.6f}\n".encode())

    async def run(term: botlease.Term) -> None:
        write("begin", term)
        try:
            await asyncio.Event().wait()
        finally:
            write("end", term)

    await botlease.Fleet(name, run, **options).run()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    given = dict(a.split("=", 1) for a in sys.argv[3:])
    asyncio.run(main(sys.argv[1], sys.argv[2], {k: float(v) if k == "ttl" else v for k, v in given.items()}))
