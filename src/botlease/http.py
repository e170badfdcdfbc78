"""A small HTTP/1.1 server: h11 parses, asyncio carries. For health answers, the gate and the Bot API simulator; and
:func:`status_of`, which asks one for its status.

It notices when a client hangs up while its answer is being made, and leaves it to the handler what that
means: :attr:`Request.gone` is set, the handler goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
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


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Awaitable[Response]]


async def serve(handler: Handler, port: int, *, host: str | None = "127.0.0.1") -> asyncio.Server:
    """Listen on ``host`` (None: every address, as a platform's router needs it). Raises OSError if it cannot."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _converse(reader, writer, handler)
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.IncompleteReadError):
            pass
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    return await asyncio.start_server(connected, host, port, limit=MAX_HEAD)


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    peer = writer.get_extra_info("peername") or ("", 0)
    while True:
        request = await _receive(reader, writer, connection)
        if request is None:
            return
        request.peer = (peer[0], peer[1])
        response = await _answer(reader, connection, handler, request)
        if response is None:
            return
        close = connection.their_state is h11.MUST_CLOSE
        headers = [
            ("content-type", response.content_type),
            ("content-length", str(len(response.body))),
            ("connection", "close" if close else "keep-alive"),
            *response.headers,
        ]
        out = connection.send(h11.Response(status_code=response.status, headers=headers)) or b""
        if request.method != "HEAD":
            out += connection.send(h11.Data(data=response.body)) or b""
        out += connection.send(h11.EndOfMessage()) or b""
        writer.write(out)
        await writer.drain()
        if close or connection.our_state is not h11.DONE:
            return
        connection.start_next_cycle()


async def _receive(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: h11.Connection
) -> Request | None:
    request: Request | None = None
    size = 0
    parts: list[bytes] = []
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                writer.write(connection.send(go_on) or b"")
            async with asyncio.timeout(IDLE):
                connection.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Request):
            names = {k.decode("ascii").lower(): v.decode("latin-1") for k, v in event.headers}
            request = Request(event.method.decode("ascii"), event.target.decode("ascii", "replace"), names)
        elif isinstance(event, h11.Data):
            size += len(event.data)
            if size > MAX_BODY:
                return None
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            request.body = b"".join(parts)
            return request
        else:
            return None


async def _answer(
    reader: asyncio.StreamReader, connection: h11.Connection, handler: Handler, request: Request
) -> Response | None:
    """Run the handler while watching the connection. None: nobody is left to be answered."""
    task = asyncio.ensure_future(handler(request))
    watch = asyncio.ensure_future(reader.read(65_536))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        while not task.done():
            data = b"" if watch.exception() else watch.result()
            if not data:
                request.gone.set()
                await asyncio.shield(task)
                return None
            connection.receive_data(data)  # the client sends its next request early
            watch = asyncio.ensure_future(reader.read(65_536))
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result()
    finally:
        if not watch.done():
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        elif task.done() and not request.gone.is_set() and not watch.cancelled() and not watch.exception():
            connection.receive_data(watch.result())


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
