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
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from botlease import clock, http
from botlease.stores.inbox import Holding, Inbox
from botlease.telegram.arguments import arguments
from botlease.telegram.poller import Poller, Tally
from botlease.telegram.term import Term
from botlease.telegram.upstream import Answer, Fenced, Headers, Unreachable, Upstream
from botlease.text import BOT_TOKEN

PATH: Final = re.compile(
    r"(?P<way>/ack|/batch)?(?P<rest>/bot(?P<token>[^/?]+)(?P<test>/test)?/(?P<method>[A-Za-z]+)(\?(?P<query>.*))?)"
)
FILE: Final = re.compile(r"(/ack|/batch)?(?P<rest>/file/bot(?P<token>[^/?]+)(/test)?/[^?].*)")
T = TypeVar("T")
LIMIT: Final = 8 * 1024 * 1024
"""Bytes of a call that is answered here; the Bot API itself takes no more in a call without a file."""
GONE: Final = 30.0
"""Seconds for which an answer is waited for when the client has hung up."""
SHARE: Final = 0.6
"""Of the time for a drain, what the bot may take to finish what it has in hand before it is told to stop."""
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

    async def drain(self, until: float, *, hurry: bool = True) -> None:
        """Hand nothing out any more, and wait until the bot has finished what it has, for at most :data:`SHARE` of the
        time until then (not in a ``hurry``: for all of that). Then it is to be told to stop. The last poll returns
        meanwhile, and what comes with it waits in the inbox for the successor."""
        self._draining = True
        for poller in self.pollers.values():
            poller.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, (until - clock.now()) * SHARE)):
                await asyncio.gather(*(p.settled() for p in self.pollers.values()))
                if not hurry:
                    await asyncio.Event().wait()
        self.signalled()

    def signalled(self) -> None:
        """The bot is told to stop. What it confirms from now on may not be finished: grammY's last call confirms
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

    def end(self) -> None:
        """Nothing leaves after this, and what is on its way is broken off."""
        self.term.end()
        self._upstream.abort()

    async def close(self) -> None:
        """End everything."""
        self.end()
        for poller in self.pollers.values():
            poller.cancel()
        if self._server is not None:
            self._server.close()
        await self._inbox.aclose()

    def report(self) -> dict[str, Tally]:
        return {poller.api: poller.report() for poller in self.pollers.values() if poller.counts}

    # One call ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: http.Request) -> http.Response:
        call, file = PATH.fullmatch(request.target), FILE.fullmatch(request.target)
        found = call or file
        if found is None or not BOT_TOKEN.fullmatch(unquote(found["token"])) or request.method not in ("GET", "POST"):
            await _skip(request)
            return _error(404, "Not Found")
        if "origin" in request.headers or _host(request) not in LOOPBACK:
            # A page in a browser of this machine, perhaps under a name that was pointed at 127.0.0.1.
            await _skip(request)
            return _error(403, "Forbidden: not for web pages")
        method = call["method"].lower() if call else "getfile"
        try:
            if call and method in LOCAL:
                return await self._local(request, call, method)
            if not await self._turn(request, method):
                await _skip(request)
                return _error(503, "the term is over" if self.term.over else "the term has not begun")
            return await self._relay(request, found["rest"], method)
        except Fenced:
            return _error(503, "the term is over")
        except Unreachable as e:
            return _error(502, f"Bad Gateway: {e}")
        except (ConnectionError, TimeoutError):
            return _error(400, "Bad Request: it broke off")
        except Exception as e:  # a bug of ours; its text might hold the token
            self._once(f"the gateway failed at {method[:40]}: {type(e).__name__}")
            return _error(500, "Internal Server Error")

    async def _turn(self, request: http.Request, method: str) -> bool:
        """Before the term begins only what reads may pass. The rest waits for it, as long as its client does."""
        if self.term.holding is None and not method.startswith("get"):
            if not _short(request):
                return False
            await request.read()  # only then a client that hangs up is noticed
            begun = asyncio.ensure_future(self.term.begun.wait())
            gone = asyncio.ensure_future(request.gone.wait())
            try:
                await asyncio.wait({begun, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                begun.cancel()
                gone.cancel()
        return self.term.may() and not request.gone.is_set()

    async def _relay(
        self, request: http.Request, target: str, method: str, instead: bytes | None = None
    ) -> http.Response:
        """Pass a call on. ``instead``: a JSON body in the place of its own."""
        headers: Headers = [(k.encode("ascii"), v.encode("latin-1")) for k, v in request.headers.items()]
        pieces: bytes | AsyncIterator[bytes]
        if instead is not None:
            headers = [(k, v) for k, v in headers if k not in (b"content-length", b"content-type")]
            headers.append((b"content-type", b"application/json"))
            pieces = instead
        elif request.pieces is None or _short(request):
            pieces = await request.read()
        else:
            pieces = request.pieces
        asked = self._fetch(request.method, target, headers, pieces, method)
        answer, body = await _patiently(asked, request.gone)
        kept = tuple((k, v) for k, v in answer.headers if body is None or k != b"content-length")
        return http.Response(answer.status, answer.pieces if body is None else body, "", kept)

    async def _fetch(
        self, verb: str, target: str, headers: Headers, body: bytes | AsyncIterator[bytes], method: str
    ) -> tuple[Answer, bytes | None]:
        """An answer, with its body if that is small: one write instead of three."""
        # by its name: a GET may send as well
        answer = await self._upstream.call(verb, target, headers, body, repeatable=method.startswith("get"))
        size = next((int(v) for k, v in answer.headers if k == b"content-length" and v.isdigit()), None)
        return answer, None if size is None or size > http.PIECE else await answer.read()

    async def _local(self, request: http.Request, found: re.Match[str], method: str) -> http.Response:
        try:
            body = await request.read(LIMIT)
            args = arguments(found["query"] or "", request.headers.get("content-type", ""), body)
        except ValueError:
            return _error(400, "Bad Request: can't parse the arguments")
        token = unquote(found["token"]) + (found["test"] or "")
        match method:
            case "getupdates":
                one = 1 if found["way"] is None else 100
                poller = self._poller(token)
                if poller is None:
                    return _error(429, "Too Many Requests: too many tokens at once")
                status, reply = await poller.get_updates(args, request, found["way"] == "/ack", one)
                return http.Response(status, reply)
            case "botleasedone":
                ids = args.get("update_ids")
                with contextlib.suppress(ValueError):
                    ids = json.loads(ids) if isinstance(ids, str) else ids
                known = [i for i in ids if isinstance(i, int)] if isinstance(ids, list) else []
                if token in self.pollers:
                    self.pollers[token].acknowledge(known)
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
            return await self._relay(request, found["rest"], "setwebhook")
        if request.headers.get("content-type", "").startswith("multipart/") and b"filename=" in body:
            return _error(400, f"Bad Request: {DROP} is not passed on; leave it out")
        self._once("the bot asks to drop pending updates: they were kept")
        return await self._relay(request, found["rest"].partition("?")[0], "setwebhook", json.dumps(args).encode())

    def _poller(self, token: str) -> Poller | None:
        if token not in self.pollers:
            if len(self.pollers) >= TOKENS:
                made_up = next((t for t, p in self.pollers.items() if not p.proved), None)
                if made_up is None:
                    return None
                self.pollers.pop(made_up).cancel()
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


TOKENS: Final = 32
"""At once. Anybody on this machine may ask with a token that he made up, and each costs a task and a question."""
LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]", "")
LOCAL: Final = frozenset(("getupdates", "botleasedone", "deletewebhook", "setwebhook", "close", "logout"))


def _error(status: int, description: str) -> http.Response:
    """In the Bot API's own form, as every framework reads it."""
    return http.Response(
        status, json.dumps({"ok": False, "error_code": status, "description": f"{description} (botlease)"}).encode()
    )


def _host(request: http.Request) -> str:
    """Without its port."""
    return re.sub(r":\d+$", "", request.headers.get("host", "").strip().lower())


def _short(request: http.Request) -> bool:
    size = request.headers.get("content-length", "")
    return (size.isdigit() and int(size) <= http.PIECE) or (not size and "transfer-encoding" not in request.headers)


async def _patiently(asked: Coroutine[Any, Any, T], gone: asyncio.Event) -> T:
    """Whoever hung up may have wanted it all the same: it is not broken off, but not waited for, for ever."""
    call, left = asyncio.ensure_future(asked), asyncio.ensure_future(gone.wait())
    both: set[asyncio.Future[Any]] = {call, left}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            await asyncio.wait({call}, timeout=GONE)
        if not call.done():
            raise ConnectionError("the client is gone")
        return call.result()
    finally:
        left.cancel()
        call.cancel()


async def _skip(request: http.Request) -> None:
    """Take in what nobody wants, so that the connection can be used again; not if it is much."""
    with contextlib.suppress(ValueError, OSError, TimeoutError):
        await request.read(LIMIT)
