"""The Bot API gateway: what a bot's base URL points at, so that none of its requests outlives its term.

    bot --> http://127.0.0.1:PORT/bot<token>/METHOD --> the Bot API

Every method passes through as it is, in pieces. Answered here, and why:

* ``getUpdates``: :mod:`.poller` owns it;
* ``deleteWebhook`` (and ``setWebhook`` without an address), ``close``, ``logOut``: they would destroy what waits for
  the successor, or another system's webhook; the bot is told that it is done;
* ``drop_pending_updates`` is taken out of a ``setWebhook``;
* ``botleaseDone`` is the hooks': these updates have been handled.

One update is handed out at a time, and is done when the next poll comes: that is true of every framework that polls
again when it has handled what it got, and then at most one is in hand when it is killed. Two other ways are chosen by
the end of the base URL: ``/batch`` hands out as many as the framework asks for (Telegraf handles them at once), and
``/ack`` does so as well and says that a hook acknowledges them one by one.

Before the term begins (a warm start) methods that only read pass, the others wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from botlease import clock, http
from botlease.stores.inbox import Holding, Inbox
from botlease.telegram.arguments import arguments
from botlease.telegram.poller import Poller, Tally
from botlease.telegram.term import Term
from botlease.telegram.upstream import Fenced, Headers, Unreachable, Upstream

PATH: Final = re.compile(
    r"(?P<way>/ack|/batch)?(?P<rest>/(?P<file>file/)?bot(?P<token>[^/]+)/(?P<method>[^?]*)(\?(?P<query>.*))?)"
)
TOKEN: Final = re.compile(r"\d{3,20}:[A-Za-z0-9_-]{1,80}(/test)?")
LIMIT: Final = 8 * 1024 * 1024
"""Bytes of a call that is answered here; the Bot API itself takes no more in a call without a file."""
DROP: Final = "drop_pending_updates"


class Gateway:
    """``upstream``: the address of the Bot API. ``say``: one line for people."""

    def __init__(
        self, upstream: str, inbox: Inbox, say: Callable[[str], None], *, delete_webhook: bool = False
    ) -> None:
        self.term = Term()
        self.pollers: dict[str, Poller] = {}
        self._upstream = Upstream(upstream, self.term.may)
        self._inbox = inbox
        self._say = say
        self._delete_webhook = delete_webhook
        self._server: asyncio.Server | None = None
        self._told: set[str] = set()
        self._draining = False

    async def listen(self, sock: socket.socket | None = None) -> str:
        """Serve on 127.0.0.1, or on a socket that listens already. Returns the address for the bot."""
        self._server = await http.serve(self._handle, 0, sock=sock, streaming=True)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def begin(self, holding: Holding, until: float) -> None:
        """The term has begun, and is trusted until then (on :func:`botlease.clock.now`)."""
        self.term.begin(holding, until)

    def arm(self, until: float) -> None:
        self.term.arm(until)

    async def drain(self, until: float) -> None:
        """Hand nothing out any more, and wait until the bot has finished what it has, at most until then. The last poll
        returns meanwhile, and what comes with it waits in the inbox for the successor."""
        self._draining = True
        for poller in self.pollers.values():
            poller.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - clock.now())):
                await asyncio.gather(*(p.settled() for p in self.pollers.values()))

    def signalled(self) -> None:
        """The bot has been told to stop. What it confirms from now on may not be finished: grammY's last call confirms
        what it is just working on. It counts if the bot ends by itself."""
        for poller in self.pollers.values():
            poller.signalled = True

    async def finish(self, *, clean: bool = True) -> None:
        """The bot has ended, by itself if ``clean``: let the last polls return, write down what is done."""
        self._draining = True
        await asyncio.gather(*(p.finish(clean) for p in self.pollers.values()))

    async def flush(self) -> None:
        """Write down what is done."""
        await asyncio.gather(*(p.flush() for p in self.pollers.values()))

    async def close(self) -> None:
        """End every connection. Nothing leaves after this."""
        self.term.end()
        for poller in self.pollers.values():
            poller.cancel()
        self._upstream.abort()
        if self._server is not None:
            self._server.close()
        await self._inbox.aclose()

    def report(self) -> dict[str, Tally]:
        return {poller.api: poller.report() for poller in self.pollers.values()}

    # One call ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: http.Request) -> http.Response:
        found = PATH.fullmatch(request.target)
        if found is None or not TOKEN.fullmatch(found["token"]):
            await _skip(request)
            return _error(404, "Not Found")
        method = found["method"].lower()
        try:
            if found["file"] is None and method in LOCAL:
                return await self._local(request, found, method)
            if not await self._turn(request, method if found["file"] is None else "get"):
                await _skip(request)
                return _error(503, "the term is over")
            return await self._relay(request, found["rest"])
        except Fenced:
            return _error(503, "the term is over")
        except Unreachable as e:
            return _error(502, f"Bad Gateway: {e}")
        except Exception as e:  # a bug of ours; its text might hold the token
            self._once(f"the gateway failed at {found['method'][:40]}: {type(e).__name__}")
            return _error(500, "Internal Server Error")

    async def _turn(self, request: http.Request, method: str) -> bool:
        """Before the term begins only what reads may pass."""
        if self.term.holding is None and not method.startswith("get"):
            begun = asyncio.ensure_future(self.term.begun.wait())
            gone = asyncio.ensure_future(request.gone.wait())
            try:
                await asyncio.wait({begun, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                begun.cancel()
                gone.cancel()
        return self.term.may() and not request.gone.is_set()

    async def _relay(self, request: http.Request, target: str, body: bytes | None = None) -> http.Response:
        headers: Headers = [(k.encode("ascii"), v.encode("latin-1")) for k, v in request.headers.items()]
        pieces: bytes | AsyncIterator[bytes]
        if body is not None:
            headers = [(k, v) for k, v in headers if k not in (b"content-length", b"content-type")]
            headers.append((b"content-type", b"application/json"))
            pieces = body
        elif _short(request):
            pieces = await request.read()
        else:
            assert request.pieces is not None
            pieces = request.pieces
        # by its name: a GET may send as well
        reads = target.startswith("/file/") or target.rpartition("/")[2].lower().startswith("get")
        answer = await self._upstream.call(request.method, target, headers, pieces, repeatable=reads)
        kept = tuple((k.decode("ascii"), v.decode("latin-1")) for k, v in answer.headers if k != b"content-length")
        size = next((int(v) for k, v in answer.headers if k == b"content-length" and v.isdigit()), None)
        if size is not None and size <= http.PIECE:
            # one write instead of three
            return http.Response(answer.status, await _all(answer.pieces), "", kept)
        if size is not None:
            kept = (*kept, ("content-length", str(size)))
        return http.Response(answer.status, answer.pieces, "", kept)

    async def _local(self, request: http.Request, found: re.Match[str], method: str) -> http.Response:
        try:
            body = await request.read(LIMIT)
            args = arguments(found["query"] or "", request.headers.get("content-type", ""), body)
        except ValueError:
            return _error(400, "Bad Request: can't parse the arguments")
        match method:
            case "getupdates":
                poller = self._poller(found["token"])
                if found["way"] is None:
                    args["limit"] = 1
                status, reply = await poller.get_updates(args, request.gone, found["way"] == "/ack")
                return http.Response(status, reply)
            case "botleasedone":
                ids = args.get("update_ids")
                with contextlib.suppress(ValueError):
                    ids = json.loads(ids) if isinstance(ids, str) else ids
                known = [i for i in ids if isinstance(i, int)] if isinstance(ids, list) else []
                self._poller(found["token"]).acknowledge(known)
                return http.Response(200, b'{"ok":true,"result":true}')
            case "setwebhook" if args.get("url"):
                return await self._set_webhook(request, found, args, body)
            case "close" | "logout":
                self._once(f"the bot asks for {method}: answered here, for the successor needs the session")
                return http.Response(200, b'{"ok":true,"result":true}')
        if str(args.get(DROP, "")).lower() in ("true", "yes", "1"):
            self._once("the bot asks to drop pending updates: they were kept, and will be handed out")
        return http.Response(200, b'{"ok":true,"result":true,"description":"Webhook is already deleted"}')

    async def _set_webhook(
        self, request: http.Request, found: re.Match[str], args: dict[str, Any], body: bytes
    ) -> http.Response:
        if not await self._turn(request, "setwebhook"):
            return _error(503, "the term is over")
        dropped = args.pop(DROP, None)
        if dropped is None:
            request.pieces, request.body = None, body
            return await self._relay(request, found["rest"])
        if request.headers.get("content-type", "").startswith("multipart/") and b"filename=" in body:
            return _error(400, f"Bad Request: {DROP} is not passed on; leave it out")
        self._once("the bot asks to drop pending updates: they were kept")
        return await self._relay(request, found["rest"].partition("?")[0], json.dumps(args).encode())

    def _poller(self, token: str) -> Poller:
        if token not in self.pollers:
            self.pollers[token] = Poller(
                token, self.term, self._upstream, self._inbox, self._say, delete_webhook=self._delete_webhook
            )
            if self._draining:
                self.pollers[token].stop()
        return self.pollers[token]

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


LOCAL: Final = frozenset(("getupdates", "botleasedone", "deletewebhook", "setwebhook", "close", "logout"))


def _error(status: int, description: str) -> http.Response:
    """In the Bot API's own form, as every framework reads it."""
    return http.Response(
        status, json.dumps({"ok": False, "error_code": status, "description": f"{description} (botlease)"}).encode()
    )


def _short(request: http.Request) -> bool:
    size = request.headers.get("content-length", "")
    return (size.isdigit() and int(size) <= http.PIECE) or (not size and "transfer-encoding" not in request.headers)


async def _all(pieces: AsyncIterator[bytes]) -> bytes:
    try:
        return b"".join([piece async for piece in pieces])
    except (OSError, TimeoutError) as e:
        raise Unreachable(str(e) or type(e).__name__) from None


async def _skip(request: http.Request) -> None:
    """Take in what nobody wants, so that the connection can be used again; not if it is much."""
    with contextlib.suppress(ValueError, OSError, TimeoutError):
        await request.read(LIMIT)
