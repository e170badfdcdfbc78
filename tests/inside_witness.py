"""The witness inside a program: stamps "who term boottime" while ``botlease.active`` is entered, for ever."""

import asyncio
import os
import sys
import time

import botlease


async def main(path: str, ttl: float, deployment: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    while True:
        try:
            async with botlease.active(ttl=ttl, deployment=deployment) as term:
                print(f"active: term {term.number}, inside", flush=True)  # as run says it
                while True:
                    now = time.clock_gettime(time.CLOCK_BOOTTIME)
                    os.write(fd, f"{term.instance_id}/{os.getpid()} {term.number} {now:.6f}\n".encode())
                    await asyncio.sleep(0.002)
        except (botlease.LeaseLost, botlease.StoreError) as e:
            print(type(e).__name__, e, flush=True)
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), sys.argv[3]))
