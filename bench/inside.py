"""A program with an instance inside, as ``holder.py --bare`` is for the peers: inside.py NAME FILE. The moments at
which it begins and ends its work are written to the file."""

import asyncio
import os
import sys
import time

import botlease


async def main() -> None:
    out = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def stamp() -> None:
        os.write(out, f"{os.getpid()} 0 {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\n".encode())

    async with botlease.active(sys.argv[1], deployment="v1", ttl=10):
        stamp()
        try:
            await asyncio.Event().wait()
        finally:
            stamp()


asyncio.run(main())
