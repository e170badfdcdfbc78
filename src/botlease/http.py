"""A small HTTP/1.1 server: h11 parses, asyncio carries. For health answers, the gate, the Bot API gateway and its
simulator; and :func:`status_of`, which asks one for its status.

It notices when a client hangs up while its answer is being made, and leaves it to the handler what that
means: :attr:`Request.gone` is set, the handler goes on. A handler that wants to can take the body of a request, and
give that of its answer, in pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from botlease import clock

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
PIECE = 64 * 1024
IDLE = 120.0


@dataclass(slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    peer: tuple[str, int] = ("", 0)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client closed its connection before it was answered."""
    pieces: AsyncIterator[bytes] | None = None
    """The body, where the server was started with ``streaming``."""
    connection: object = None
    """The same for every request of one connection."""
    closed: Callable[[], bool] = lambda: False
    """Whether that connection is closed by now."""

    async def read(self, limit: int = MAX_BODY) -> bytes:
        """The whole body. Raises ValueError if it is longer than ``limit`` bytes."""
        if self.pieces is not None:
            parts, size = [], 0
            async for piece in self.pieces:
                size += len(piece)
                if size > limit:
                    raise ValueError("the body is too long")
                parts.append(piece)
            self.body, self.pieces = b"".join(parts), None
        return self.body


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes | AsyncIterator[bytes]
    content_type: str = "application/json"
    headers: tuple[tuple[str | bytes, str | bytes], ...] = ()

    async def discard(self) -> None:
        """Let go what stands behind a body that nobody will take."""
        close = getattr(self.body, "aclose", None)
        if close is not None:
            await close()


Handler = Callable[[Request], Awaitable[Response]]


async def serve(
    handler: Handler,
    port: int,
    *,
    host: str | None = "127.0.0.1",
    sock: socket.socket | None = None,
    streaming: bool = False,
    limit: int = MAX_BODY,
    patience: float = IDLE,
    most: int = 0,
) -> asyncio.Server:
    """Listen on ``host`` (None: every address, as a platform's router needs it) or on a socket that listens already.

    ``limit``: bytes of a body that is taken in before the handler is asked. ``patience``: seconds for which a client
    may say nothing, and for a whole request where there is a ``most``. That many connections are kept; the oldest goes
    for a new one, so that whoever opens many and says nothing shuts nobody out.
    Raises OSError if it cannot.
    """
    kept: dict[asyncio.StreamWriter, None] = {}

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept[writer] = None
        if most and len(kept) > most:
            oldest = next(iter(kept))
            del kept[oldest]  # now: its end is noticed later, and the next one must not pick it again
            oldest.transport.abort()
        talk = _Conversation(reader, writer, handler, streaming, limit, patience, patience if most else math.inf)
        try:
            await talk.run()
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # the loop is being closed; asyncio (3.11) would log it as an error of the callback
        finally:
            kept.pop(writer, None)
            with contextlib.suppress(OSError):
                writer.close()

    # So many are accepted in one turn of the loop, and up to three turns' before the first of them is counted: with the
    # ones that are kept they must not come near to a small limit of open files, or the database's cannot be opened.
    backlog = 8 if most else 100
    if sock is not None:
        return await asyncio.start_server(connected, sock=sock, limit=MAX_HEAD, backlog=backlog)
    return await asyncio.start_server(connected, host, port, limit=MAX_HEAD, backlog=backlog)


class _Conversation:
    """One connection of a client: one request after the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
        streaming: bool,
        limit: int,
        patience: float,
        whole: float,
    ) -> None:
        self.reader, self.writer, self.handler, self.streaming = reader, writer, handler, streaming
        self.limit, self.patience, self.whole = limit, patience, whole
        self.give_up = math.inf
        self.connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self.received = asyncio.Event()  # the request is complete: from now on a client that hangs up is noticed

    async def run(self) -> None:
        peer = self.writer.get_extra_info("peername") or ("", 0)
        while True:
            request = await self._receive()
            if request is None:
                return
            request.peer = (peer[0], peer[1])
            response = await self._answer(request)
            if response is None:
                return
            try:
                if not await self._send(request, response):
                    return
            finally:
                await response.discard()

    async def _next(self) -> object:
        while True:
            event = self.connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self.connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                self.writer.write(self.connection.send(go_on) or b"")
            async with asyncio.timeout(min(self.patience, max(0.0, self.give_up - clock.now()))):
                self.connection.receive_data(await self.reader.read(PIECE))

    async def _receive(self) -> Request | None:
        self.received.clear()
        self.give_up = clock.now() + self.whole
        event = await self._next()
        if not isinstance(event, h11.Request):
            return None
        names = {k.decode("ascii").lower(): v.decode("latin-1") for k, v in event.headers}
        request = Request(event.method.decode("ascii"), event.target.decode("ascii", "replace"), names)
        request.pieces = self._pieces()
        request.connection, request.closed = self, self.writer.is_closing
        if not self.streaming:
            try:
                await request.read(self.limit)
            except ValueError:
                return None
        self.give_up = math.inf
        return request

    async def _pieces(self) -> AsyncIterator[bytes]:
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.received.set()
                return
            else:
                raise ConnectionError("the client hung up in the middle of its request")

    async def _answer(self, request: Request) -> Response | None:
        """Run the handler while watching the connection. None: nobody is left to be answered."""
        task = asyncio.ensure_future(self.handler(request))
        if not self.received.is_set():
            complete = asyncio.ensure_future(self.received.wait())
            both: set[asyncio.Future[object]] = {task, complete}  # type: ignore[arg-type]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            complete.cancel()
            if not self.received.is_set():
                return task.result()  # answered before the whole request was there
        watch = asyncio.ensure_future(self.reader.read(PIECE))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            while not task.done():
                data = b"" if watch.exception() else watch.result()
                if not data:
                    request.gone.set()
                    await (await asyncio.shield(task)).discard()
                    return None
                self.connection.receive_data(data)  # the client sends its next request early
                watch = asyncio.ensure_future(self.reader.read(PIECE))
                await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            return task.result()
        finally:
            if not watch.done():
                watch.cancel()
                await asyncio.wait({watch})  # not `await watch`: a cancellation of ours would pass for its own
            elif task.done() and not request.gone.is_set() and not watch.cancelled() and not watch.exception():
                self.connection.receive_data(watch.result())

    async def _send(self, request: Request, response: Response) -> bool:
        """False: the connection ends with this answer."""
        connection, writer, body = self.connection, self.writer, response.body
        close = connection.their_state is not h11.DONE
        headers = [(_raw("connection"), _raw("close" if close else "keep-alive"))]
        headers += [(_raw(k), _raw(v)) for k, v in response.headers]
        if response.content_type:
            headers.append((b"content-type", _raw(response.content_type)))
        if isinstance(body, bytes):
            headers.append((b"content-length", _raw(str(len(body)))))
        out = connection.send(h11.Response(status_code=response.status, headers=headers)) or b""
        if isinstance(body, bytes):
            if request.method != "HEAD":
                out += connection.send(h11.Data(data=body)) or b""
        else:
            async for piece in body:
                writer.write(out + (connection.send(h11.Data(data=piece)) or b""))
                await writer.drain()
                out = b""
        out += connection.send(h11.EndOfMessage()) or b""
        writer.write(out)
        await writer.drain()
        if close or connection.our_state is not h11.DONE:
            return False
        connection.start_next_cycle()
        return True


def _raw(text: str | bytes) -> bytes:
    return text.encode("ascii") if isinstance(text, str) else text


async def status_of(url: str, deadline: float) -> int:
    """The status that a GET of this http:// URL is answered with. Raises OSError, TimeoutError or ValueError."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    async with asyncio.timeout(deadline):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [("host", parts.netloc.rpartition("@")[2]), ("connection", "close")]
            request = connection.send(h11.Request(method="GET", target=target, headers=headers)) or b""
            writer.write(request + (connection.send(h11.EndOfMessage()) or b""))
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65_536))
                elif isinstance(event, h11.Response):
                    return event.status_code
                elif not isinstance(event, h11.InformationalResponse):
                    raise ConnectionError("the connection was closed before the answer")
        except h11.ProtocolError as e:
            raise ValueError(str(e)) from None
        finally:
            writer.close()
