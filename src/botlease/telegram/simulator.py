"""A Bot API server for tests and demos: real HTTP, the real server's conflicts, simulated chat users.

.. code-block:: python

    simulator = await Simulator.start()
    user = simulator.user(bot_id=123)        # a chat
    user.say("/price BTC")                   # delivered by getUpdates
    simulator.report(123)                    # conflicts, lost, twice, gaps

An update counts as handled when the bot *replies to it* (``reply_parameters`` or ``reply_to_message_id``). It is
lost when it was confirmed by an offset and never replied to, and handled twice when it got two replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from botlease import clock, http
from botlease.telegram.arguments import arguments, integer
from botlease.telegram.botapi import ApiError, Bot, Profile

TOKEN = re.compile(r"[1-9]\d*:[^/]{1,70}")


@dataclass(eq=False)
class Message:
    """One message of a simulated user, and what became of it."""

    chat: int
    message_id: int
    text: str
    sent_at: float
    update_id: int = 0
    delivered: int = 0
    delivered_at: float | None = None
    confirmed_at: float | None = None
    replies: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    messages: int
    answered: int
    lost: int  # confirmed, never answered
    twice: int  # answered more than once
    waiting: int  # neither confirmed nor answered
    conflicts: int  # 409s to a live client
    conflicts_dead: int
    reply_ms_max: float
    gap_ms_max: float  # the longest time without a client that polls, since the first one did


@dataclass
class _Span:
    begin: float
    end: float | None = None


class Chat:
    """A simulated user in a chat with the bot."""

    def __init__(self, simulator: Simulator, bot_id: int, chat_id: int) -> None:
        self.simulator, self.bot_id, self.chat_id = simulator, bot_id, chat_id
        self._task: asyncio.Task[None] | None = None

    def say(self, text: str) -> Message:
        return self.simulator.say(self.bot_id, self.chat_id, text)

    def chatter(self, texts: list[str], every: float, rng: random.Random) -> None:
        """Send one of ``texts`` every ``every`` seconds, a little irregularly, until the simulator stops."""

        async def go() -> None:
            while True:
                await asyncio.sleep(every * rng.uniform(0.5, 1.5))
                self.say(rng.choice(texts))

        self._task = asyncio.ensure_future(go())

    def hush(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None


class Simulator:
    def __init__(self, profile: Profile = Profile.SOURCE, *, seed: int = 1, speed: float = 1.0) -> None:
        self.profile = profile
        self.speed = speed
        self.rng = random.Random(seed)  # noqa: S311 - chat noise
        self.bots: dict[int, Bot] = {}
        self.messages: dict[int, list[Message]] = {}
        self.polls: dict[int, list[_Span]] = {}
        self.chats: list[Chat] = []
        self.url = ""
        self.on_reply: Callable[[Message], None] = lambda message: None
        self._by_update: dict[tuple[int, int], Message] = {}
        self._by_message: dict[tuple[int, int, int], Message] = {}
        self.calls: deque[tuple[float, int, str]] = deque(maxlen=100_000)
        """(when, bot id, method) of each request that arrived whole."""
        self.faults: list[tuple[str, ApiError]] = []
        """The next call of this method (lower case) is answered so instead, once."""
        self._next_message = 0
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(
        cls, port: int = 0, profile: Profile = Profile.SOURCE, *, seed: int = 1, speed: float = 1.0
    ) -> Simulator:
        self = cls(profile, seed=seed, speed=speed)
        self._server = await http.serve(self._handle, port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        for chat in self.chats:
            chat.hush()
        if self._server is not None:
            self._server.close()

    def now(self) -> float:
        return clock.now() * self.speed

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed)

    def bot(self, bot_id: int) -> Bot:
        if bot_id not in self.bots:
            made = Bot(bot_id, self.now, self.sleep, self.profile, random.Random(self.rng.random()))  # noqa: S311
            made.on_confirm = lambda ids: self._confirmed(bot_id, ids)
            made.on_deliver = lambda ids, alive: self._delivered(bot_id, ids, alive)
            self.bots[bot_id] = made
            self.messages[bot_id] = []
            self.polls[bot_id] = []
        return self.bots[bot_id]

    # Users -----------------------------------------------------------------------------------------------------

    def user(self, bot_id: int, chat_id: int | None = None) -> Chat:
        self.bot(bot_id)
        chat = Chat(self, bot_id, chat_id or 1000 + len(self.chats))
        self.chats.append(chat)
        return chat

    def say(self, bot_id: int, chat_id: int, text: str) -> Message:
        bot = self.bot(bot_id)
        self._next_message += 1
        message = Message(chat_id, self._next_message, text, clock.now())
        payload: dict[str, Any] = {
            "message_id": message.message_id,
            "date": int(time.time()),  # noqa: TID251 - a Telegram message has wall time
            "chat": {"id": chat_id, "type": "private", "first_name": f"User {chat_id}"},
            "from": {"id": chat_id, "is_bot": False, "first_name": f"User {chat_id}"},
            "text": text,
        }
        if text.startswith("/"):
            payload["entities"] = [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}]
        update_id = bot.push("message", payload)
        if update_id is not None:
            message.update_id = update_id
            self._by_update[bot_id, update_id] = message
            self._by_message[bot_id, chat_id, message.message_id] = message
            self.messages[bot_id].append(message)
        return message

    def _confirmed(self, bot_id: int, ids: list[int]) -> None:
        for update_id in ids:
            message = self._by_update.get((bot_id, update_id))
            if message is not None:
                message.confirmed_at = clock.now()

    def _delivered(self, bot_id: int, ids: list[int], alive: Callable[[], bool]) -> None:
        for update_id in ids:
            message = self._by_update.get((bot_id, update_id))
            if message is not None and alive():
                message.delivered += 1
                message.delivered_at = clock.now()

    # What it saw -------------------------------------------------------------------------------------------------

    def report(self, bot_id: int) -> Report:
        bot, messages = self.bot(bot_id), self.messages[bot_id]
        polls = self.polls[bot_id]
        waits = [m.replies[0][0] - m.sent_at for m in messages if m.replies]
        return Report(
            messages=len(messages),
            answered=sum(bool(m.replies) for m in messages),
            lost=sum(m.confirmed_at is not None and not m.replies for m in messages),
            twice=sum(len(m.replies) > 1 for m in messages),
            waiting=sum(m.confirmed_at is None and not m.replies for m in messages),
            conflicts=bot.counters.conflicts_live,
            conflicts_dead=bot.counters.conflicts_dead,
            reply_ms_max=max(waits, default=0.0) * 1000,
            gap_ms_max=self.gap(bot_id, polls[0].begin, clock.now()) * 1000 if polls else 0.0,
        )

    def gap(self, bot_id: int, begin: float, end: float) -> float:
        """The longest time within [begin, end] (on :func:`botlease.clock.now`) without a client that polls."""
        worst, covered = 0.0, begin
        for span in sorted(self.polls[bot_id], key=lambda s: s.begin):
            stop = span.end if span.end is not None else clock.now()
            if stop < begin or span.begin > end:
                continue
            worst = max(worst, min(span.begin, end) - covered)
            covered = max(covered, stop)
        return max(worst, end - covered if covered < end else 0.0)

    # HTTP ------------------------------------------------------------------------------------------------------------

    async def _handle(self, request: http.Request) -> http.Response:
        parts = urlsplit(request.target)
        if parts.path == "/simulator/report":
            body = {str(i): self._plain(i) for i in self.bots}
            return http.Response(200, json.dumps(body).encode())
        if file := re.fullmatch(r"/file/bot[^/]+/zeros/(\d+)\.bin", parts.path):
            return http.Response(200, b"0" * int(file[1]), "application/octet-stream")
        match = re.fullmatch(r"/bot([^/]+)/([A-Za-z]+)/?", parts.path)
        try:
            if match is None:
                raise ApiError(404, "Not Found")
            token, method = match.groups()
            if not TOKEN.fullmatch(token):
                raise ApiError(401, "Unauthorized: invalid token specified")
            bot = self.bot(int(token.split(":")[0]))
            self.calls.append((clock.now(), bot.bot_id, method))
            fault = next((f for f in self.faults if f[0] == method.lower()), None)
            if fault is not None:
                self.faults.remove(fault)
                raise fault[1]
            if method.lower() == "senddocument":  # its size is all that matters of it
                sent = {"message_id": 1, "document": {"file_id": "1", "file_size": len(request.body)}}
                return http.Response(200, json.dumps({"ok": True, "result": sent}).encode())
            try:
                args = arguments(parts.query, request.headers.get("content-type", ""), request.body)
            except ValueError:
                raise ApiError(400, "Bad Request: can't parse JSON") from None
            result, description = await self._call(bot, method.lower(), args, request)
        except ApiError as e:
            reply: dict[str, Any] = {"ok": False, "error_code": e.code, "description": e.description}
            extra: tuple[tuple[str, str], ...] = ()
            if e.parameters:
                reply["parameters"] = e.parameters
                if "retry_after" in e.parameters:
                    extra = (("Retry-After", str(e.parameters["retry_after"])),)
            return http.Response(e.code, json.dumps(reply).encode(), headers=extra)
        reply = {"ok": True, "result": result}
        if description:
            reply["description"] = description
        return http.Response(200, json.dumps(reply).encode())

    def _plain(self, bot_id: int) -> dict[str, Any]:
        report = self.report(bot_id)
        return {name: getattr(report, name) for name in report.__slots__}

    async def _call(self, bot: Bot, method: str, args: dict[str, Any], request: http.Request) -> tuple[Any, str]:
        match method:
            case "getme":
                return _me(bot.bot_id), ""
            case "getupdates":
                return await self._get_updates(bot, args, request), ""
            case "getwebhookinfo":
                return bot.webhook_info(), ""
            case "setwebhook":
                return await bot.set_webhook(args)
            case "deletewebhook":
                return await bot.set_webhook({**args, "url": ""})
            case "getfile":
                path = f"zeros/{args.get('file_id')}.bin"
                return {"file_id": args.get("file_id"), "file_unique_id": "1", "file_path": path}, ""
            case "sendmessage":
                return self._send(bot, args), ""
            case "setmycommands" | "sendchataction" | "deletemycommands":
                return True, ""
            case "close":
                return True, ""
            case "logout":
                bot.queue.clear()
                bot.webhook_url = ""
                return True, ""
        raise ApiError(404, "Not Found: method not found")

    async def _get_updates(self, bot: Bot, args: dict[str, Any], request: http.Request) -> list[dict[str, Any]]:
        span = _Span(clock.now())
        self.polls[bot.bot_id].append(span)

        async def watch() -> None:
            await request.gone.wait()
            span.end = clock.now()

        watcher = asyncio.ensure_future(watch())
        try:
            return await bot.get_updates(args, lambda: not request.gone.is_set())
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            if span.end is None:
                span.end = clock.now()

    def _send(self, bot: Bot, args: dict[str, Any]) -> dict[str, Any]:
        text, chat = str(args.get("text") or ""), integer(args.get("chat_id"), 0)
        if not text:
            raise ApiError(400, "Bad Request: message text is empty")
        if not args.get("chat_id"):
            raise ApiError(400, "Bad Request: chat_id is empty")
        if chat not in {c.chat_id for c in self.chats}:
            raise ApiError(400, "Bad Request: chat not found")
        self._next_message += 1
        target = integer(args.get("reply_to_message_id"), 0)
        parameters = args.get("reply_parameters")
        if isinstance(parameters, str):
            parameters = json.loads(parameters)
        if isinstance(parameters, dict):
            target = integer(parameters.get("message_id"), 0)
        answered = self._by_message.get((bot.bot_id, chat, target))
        if answered is not None:
            answered.replies.append((clock.now(), text))
            self.on_reply(answered)
        return {
            "message_id": self._next_message,
            "date": int(time.time()),  # noqa: TID251
            "chat": {"id": chat, "type": "private", "first_name": f"User {chat}"},
            "from": _me(bot.bot_id),
            "text": text,
        }


def _me(bot_id: int) -> dict[str, Any]:
    return {
        "id": bot_id,
        "is_bot": True,
        "first_name": "Simulated bot",
        "username": f"simulated_{bot_id}_bot",
        "can_join_groups": True,
        "can_read_all_group_messages": False,
        "supports_inline_queries": False,
        "can_connect_to_business": False,
        "has_main_web_app": False,
    }
