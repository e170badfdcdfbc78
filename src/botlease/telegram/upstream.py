"""The Bot API, as a client: connections that are kept, bodies in pieces, and a fence.

Nothing leaves when the fence is down, and what had not left yet never does: every connection is closed with RST
(``SO_LINGER`` of zero seconds), which makes the kernel throw away what it has not sent. It does so, too, when the
process is killed, which is what happens at the end of trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import h11

from botlease import clock
from botlease.http import PIECE
from botlease.settings import bot_api

if TYPE_CHECKING:
    import ssl

Headers = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterator[bytes] | Callable[[], bytes]
"""Or a function that makes it when the connection is there."""

HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade host expect".split()
)
CONNECT: Final = 10.0
SILENCE: Final = 600.0
"""Seconds without a byte after which an answer is given up: a server that takes in a big file may think long."""
KEPT: Final = 10.0
"""Seconds for which an idle connection is used again: servers close theirs after 60 s or so, and a request that meets
the close cannot be repeated without asking for it twice."""
ABORT: Final = struct.pack("ii", 1, 0)


class Fenced(Exception):
    """The term is over: this must not leave any more."""


class Unreachable(ConnectionError):
    """The Bot API cannot be reached, or broke off. The text holds no address of a request: that has the token in it."""


BROKEN: Final = (OSError, TimeoutError, h11.ProtocolError)


@dataclass(eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    state: h11.Connection
    used: float = 0.0

    def abort(self) -> None:
        self.writer.transport.abort()


@dataclass
class Answer:
    """The head of an answer. Take its pieces to the end, or close them."""

    status: int
    headers: Headers
    pieces: Pieces

    async def read(self, limit: int = 64 * 1024 * 1024) -> bytes:
        out = bytearray()
        try:
            async for piece in self.pieces:
                out += piece
                if len(out) > limit:
                    raise Unreachable("its answer is too long")
        finally:
            await self.pieces.aclose()
        return bytes(out)


class Pieces:
    """The body of an answer. It gives its connection back at the end, or ends it when closed before."""

    def __init__(self, upstream: Upstream, connection: _Connection, pump: asyncio.Task[None] | None) -> None:
        self._upstream, self._connection, self._pump = upstream, connection, pump
        self._over = False

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        try:
            event = await _next(self._connection)
        except BROKEN as e:
            await self.aclose()
            raise Unreachable(_why(e)) from None
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            await self.aclose()
            raise Unreachable("it closed the connection in the middle of an answer")
        self._over = True
        self._upstream.give_back(self._connection, self._pump, whole=True)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._upstream.give_back(self._connection, self._pump, whole=False)


class Upstream:
    """``base``: where the Bot API is. ``may``: whether requests may leave, asked before each and before each piece."""

    def __init__(self, base: str, may: Callable[[], bool]) -> None:
        parts = urlsplit(bot_api(base))
        assert parts.hostname is not None
        self._prefix = parts.path.rstrip("/").encode()
        self._host = parts.netloc.encode()
        self._address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._secure = parts.scheme == "https"
        self._context: ssl.SSLContext | None = None
        self._may = may
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def call(self, method: str, target: str, headers: Headers, body: Body, *, repeatable: bool = False) -> Answer:
        """Send, and wait for the head of the answer. ``repeatable``: it may be sent twice, if a connection that was
        kept turns out to be closed. Raises :class:`Fenced`, :class:`Unreachable`."""
        first = await self._take()
        reused = first.used > 0
        try:
            return await self._exchange(first, method, target, headers, body)
        except BROKEN as e:
            if not (reused and repeatable and isinstance(body, bytes)):
                raise Unreachable(_why(e)) from None
        connection = await self._connect()
        try:
            return await self._exchange(connection, method, target, headers, body)
        except BROKEN as e:
            raise Unreachable(_why(e)) from None

    def give_back(self, connection: _Connection, pump: asyncio.Task[None] | None, *, whole: bool) -> None:
        """After an answer: keep the connection for the next one, if both sides have said all they had to say."""
        self._busy.discard(connection)
        sent = pump is None or (pump.done() and not pump.cancelled() and pump.exception() is None)
        if pump is not None and not pump.done():
            pump.cancel()
        state = connection.state
        if whole and sent and state.our_state is h11.DONE and state.their_state is h11.DONE:
            state.start_next_cycle()
            now = connection.used = clock.now()
            self._idle.append(connection)
            while now - self._idle[0].used >= KEPT:  # what a burst has left: the newest one is always taken first
                self._idle.pop(0).abort()
        else:
            connection.abort()

    def abort(self) -> None:
        """End every connection, with RST."""
        for connection in [*self._busy, *self._idle]:
            connection.abort()
        self._busy.clear()
        self._idle.clear()

    # One exchange ------------------------------------------------------------------------------------------------

    async def _exchange(
        self, connection: _Connection, method: str, target: str, headers: Headers, body: Body
    ) -> Answer:
        self._busy.add(connection)
        pump: asyncio.Task[None] | None = None
        try:
            if callable(body):
                body = body()
            head = h11.Request(
                method=method,
                target=self._prefix + target.encode("ascii"),
                headers=[(b"host", self._host), *_passed_on(headers), *_length(headers, body)],
            )
            out = connection.state.send(head) or b""
            if isinstance(body, bytes):
                if body:
                    out += connection.state.send(h11.Data(data=body)) or b""
                self._write(connection, out + (connection.state.send(h11.EndOfMessage()) or b""))
            else:
                pump = asyncio.ensure_future(self._pump(connection, out, body))
            response = await self._head(connection, pump)
        except BaseException:
            self.give_back(connection, pump, whole=False)
            raise
        return Answer(response.status_code, _passed_on(list(response.headers)), Pieces(self, connection, pump))

    def _write(self, connection: _Connection, data: bytes) -> None:
        if not self._may():
            raise Fenced
        connection.writer.write(data)

    async def _pump(self, connection: _Connection, out: bytes, body: AsyncIterator[bytes]) -> None:
        async for piece in body:
            self._write(connection, out + (connection.state.send(h11.Data(data=piece)) or b""))
            out = b""
            await connection.writer.drain()
        self._write(connection, out + (connection.state.send(h11.EndOfMessage()) or b""))
        await connection.writer.drain()

    async def _head(self, connection: _Connection, pump: asyncio.Task[None] | None) -> h11.Response:
        """The head of the answer. A body that cannot be sent to its end fails the whole."""
        head = asyncio.ensure_future(self._response(connection))
        try:
            if pump is not None:
                both: set[asyncio.Future[object]] = {head, pump}  # type: ignore[arg-type]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if pump.done() and pump.exception() is not None and not head.done():
                    pump.result()
            return await head
        finally:
            head.cancel()

    async def _response(self, connection: _Connection) -> h11.Response:
        while True:
            event = await _next(connection)
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise ConnectionResetError("it closed the connection before it answered")

    # Connections -------------------------------------------------------------------------------------------------

    async def _take(self) -> _Connection:
        now = clock.now()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.used < KEPT and not connection.reader.at_eof() and not connection.writer.is_closing():
                return connection
            connection.abort()
        return await self._connect()

    async def _connect(self) -> _Connection:
        if not self._may():
            raise Fenced
        try:
            async with asyncio.timeout(CONNECT):
                # One address after the other, and not only the first: where IPv6 leads nowhere that would be for ever.
                reader, writer = await asyncio.open_connection(
                    *self._address, ssl=self._tls(), limit=2 * PIECE, happy_eyeballs_delay=0.25
                )
        except TimeoutError:
            raise Unreachable(f"no connection within {CONNECT:g} s") from None
        except (OSError, UnicodeError) as e:  # a host name that cannot be one
            raise Unreachable(_why(e)) from None
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        # little of a body lies in our memory: what the kernel has not taken is not sent
        writer.transport.set_write_buffer_limits(high=PIECE)
        return _Connection(reader, writer, h11.Connection(h11.CLIENT))

    def _tls(self) -> ssl.SSLContext | None:
        if self._secure and self._context is None:
            import ssl

            self._context = ssl.create_default_context()
            paths = ssl.get_default_verify_paths()
            if paths.cafile is None and not (paths.capath and any(Path(paths.capath).iterdir())):
                # a slim image without certificates of its own: those that most HTTP libraries of Python bring
                with contextlib.suppress(ImportError):
                    import certifi

                    self._context.load_verify_locations(certifi.where())
        return self._context


async def _next(connection: _Connection) -> h11.Event | type[h11.PAUSED]:
    while True:
        event = connection.state.next_event()
        if event is h11.NEED_DATA:
            async with asyncio.timeout(SILENCE):
                connection.state.receive_data(await connection.reader.read(PIECE))
        else:
            return event  # type: ignore[return-value]


def _passed_on(headers: Headers) -> Headers:
    named = {word.strip().lower() for k, v in headers if k.lower() == b"connection" for word in v.split(b",")}
    return [(k, v) for k, v in headers if k.lower() not in HOP_BY_HOP | named]


def _length(headers: Headers, body: bytes | AsyncIterator[bytes]) -> Headers:
    if any(k.lower() == b"content-length" for k, _ in headers):
        return []
    if isinstance(body, bytes):
        return [(b"content-length", str(len(body)).encode())] if body else []
    return [(b"transfer-encoding", b"chunked")]  # its length is not known


def _why(e: Exception) -> str:
    if isinstance(e, TimeoutError):
        return "it did not answer in time"
    if isinstance(e, OSError) and e.strerror and e.errno is not None and e.errno > 0:
        return e.strerror
    return str(e) or type(e).__name__
