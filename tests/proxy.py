"""A TCP proxy in front of a PostgreSQL server that fails in every way a network can, on command.

It cuts the stream into the protocol's messages, so that a test can let the third of the server's pass and nothing
after it (what has a commit done whose answer nobody saw?).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

ASKS, ANSWERS = "asks", "answers"
"""The two directions: what the client sends, what the server sends."""
SSL_REQUEST = 80877103


@dataclass(eq=False)
class Link:
    """One connection: how many messages went each way."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    seen: dict[str, int] = field(default_factory=lambda: {ASKS: 0, ANSWERS: 0})

    def reset(self) -> None:
        """End both sides with RST, whatever is still unsent."""
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Messages:
    """Cuts one direction of the protocol into messages; the first of a client has no type byte."""

    def __init__(self, typed: bool) -> None:
        self.typed, self.data, self.raw = typed, b"", False
        self.asked_for_tls = False

    def feed(self, data: bytes) -> list[bytes]:
        if self.raw:
            return [data]
        self.data += data
        out = []
        while len(self.data) >= (5 if self.typed else 4):
            (length,) = struct.unpack_from("!i", self.data, 1 if self.typed else 0)
            size = length + (1 if self.typed else 0)
            if len(self.data) < size:
                break
            message, self.data = self.data[:size], self.data[size:]
            if not self.typed:
                code = struct.unpack_from("!i", message, 4)[0]
                self.asked_for_tls = code == SSL_REQUEST
                self.typed = not self.asked_for_tls
            out.append(message)
        return out


class Proxy:
    """``async with Proxy(port) as proxy``: the server is reached at ``proxy.port``.

    ``flow[ASKS]`` and ``flow[ANSWERS]`` are events: cleared, that direction is held up (accepted, forwarded never).
    ``on_message(link, direction, message)`` is asked before each is forwarded; False drops it. ``refuse``: new
    connections are reset.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.target, self.host = port, host
        self.flow = {ASKS: asyncio.Event(), ANSWERS: asyncio.Event()}
        for event in self.flow.values():
            event.set()
        self.on_message: Callable[[Link, str, bytes], bool] | None = None
        self.refuse = False
        self.delay = 0.0
        self.port = 0
        self.links: set[Link] = set()

    async def __aenter__(self) -> Proxy:
        self.server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def stall(self, *directions: str) -> None:
        for direction in directions or (ASKS, ANSWERS):
            self.flow[direction].clear()

    def go_on(self) -> None:
        for event in self.flow.values():
            event.set()

    def reset(self) -> None:
        for link in [*self.links]:
            link.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refuse:
                raise ConnectionRefusedError
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, up_writer)
        self.links.add(link)
        asks, answers = Messages(typed=False), Messages(typed=True)
        try:
            # gathered and not awaited one by one: what one side still has to say may come after the other has ended
            await asyncio.gather(
                self._pump(link, ASKS, reader, up_writer, asks, answers),
                self._pump(link, ANSWERS, up_reader, writer, answers, asks),
                return_exceptions=True,
            )
        finally:
            self.links.discard(link)
            for w in (writer, up_writer):
                w.transport.abort()

    async def _pump(
        self,
        link: Link,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        messages: Messages,
        others: Messages,
    ) -> None:
        try:
            while data := await reader.read(65536):
                if direction == ANSWERS and others.asked_for_tls and len(data) == 1:
                    others.asked_for_tls = False  # the server's answer to that is one byte
                    whole = [data]
                else:
                    whole = messages.feed(data)
                await asyncio.sleep(self.delay)
                for message in whole:
                    await self.flow[direction].wait()
                    link.seen[direction] += 1
                    if self.on_message is not None and not self.on_message(link, direction, message):
                        continue
                    if writer.transport.is_closing():
                        return
                    writer.write(message)
        finally:
            writer.close()  # also after a reset, or the other end would never hear of it

    async def __aexit__(self, *_: object) -> None:
        self.go_on()
        self.server.close()
        while self.links:
            self.reset()
            await asyncio.sleep(0.001)
