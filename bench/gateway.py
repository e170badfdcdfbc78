"""The gateway's price for a call, beside the same call without it: latency, and calls per second of one core.

Three processes: a Bot API that answers at once, ``botlease run --gateway``, and here the bot.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from harness import World, until

from botlease.work.tree import descendants

TOKEN = "123456:AAGq-a-token-of-the-bench-0123456789"
BODY = b'{"chat_id": 1, "text": "a message of some forty characters, or so"}'
ANSWER = b'{"ok":true,"result":{"message_id":1,"date":1700000000,"chat":{"id":1,"type":"private"},"text":"hello"}}'


class Instant(asyncio.Protocol):
    """Answers every request of known length at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while b"\r\n\r\n" in self.data:
            head, _, rest = self.data.partition(b"\r\n\r\n")
            size = next(
                (int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0
            )
            if len(rest) < size:
                return
            self.data = rest[size:]
            answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
            self.transport.write(answer + ANSWER)  # type: ignore[attr-defined]


def upstream(pipe: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def calls(port: int, count: int, side_by_side: int) -> list[float]:
    """Seconds of each of ``count`` sendMessage calls, on connections that are kept."""
    request = (
        b"POST /bot%s/sendMessage HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % TOKEN.encode()
        + b"user-agent: bench\r\naccept: */*\r\ncontent-length: %d\r\n\r\n" % len(BODY)
        + BODY
    )
    out: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count // side_by_side):
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            size = next(int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
            await reader.readexactly(size)
            out.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(one() for _ in range(side_by_side)))
    return out


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(world: World, count: int, line: Callable[[str, str], None], pss: Callable[[list[int]], float]) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=upstream, args=(theirs,), daemon=True)
    server.start()
    port = int(ours.recv())
    show = "import os, time; print('bot:', os.environ['BOTLEASE_API_URL'], flush=True); time.sleep(600)"
    options = ("--gateway", "--bot-api", f"http://127.0.0.1:{port}", "--name", "bench")
    run = world.run(*options, bot=(sys.executable, "-c", show), ttl="10")
    try:
        run.says("bot: http")
        gateway = int(run.text().partition("bot: http://127.0.0.1:")[2].split()[0])
        front = next(p for p in descendants(run.pid) if Path(f"/proc/{p}/comm").read_text() == "botlease-front\n")
        asyncio.run(calls(gateway, 200, 1))  # warm
        took: dict[str, list[float]] = {"direct": [], "through": []}
        for _ in range(4):  # turn about: the machine is noisy
            took["direct"] += asyncio.run(calls(port, count // 4, 1))
            took["through"] += asyncio.run(calls(gateway, count // 4, 1))
        direct, through = (median(took[k]) * 1000 for k in ("direct", "through"))
        line("a call, median (floor: direct)", f"{through:7.2f} ms  (floor {direct:.2f}; added {through - direct:.2f})")
        before, began = cpu(front), time.perf_counter()
        done = len(asyncio.run(calls(gateway, 4 * count, 16)))
        wall, used = time.perf_counter() - began, cpu(front) - before
        line("calls per second of one core", f"{done / used:7.0f}     ({done / wall:.0f} a second, 16 at once)")
        line("memory of its process, PSS", f"{pss([front]):7.1f} MB")
    finally:
        run.process.terminate()
        until(lambda: run.process.poll() is not None)
        server.kill()
