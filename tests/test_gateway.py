"""The gateway in this process, between a real HTTP client and the simulated Bot API."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import shutil
import sqlite3
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl

from botlease import clock, http
from botlease.stores import open_store
from botlease.stores.inbox import Holding, open_inbox
from botlease.telegram import desk, poller
from botlease.telegram.botapi import ApiError, Profile
from botlease.telegram.gateway import Gateway
from botlease.telegram.simulator import Chat, Simulator

BOT = 123456
TOKEN = f"{BOT}:AAGq-a-token-of-a-test-0123456789"


@dataclass
class House:
    """A simulator, a database, and gateways one after the other, as deployments come and go."""

    simulator: Simulator
    url: str
    said: list[str] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    clients: list[aiohttp.ClientSession] = field(default_factory=list)

    async def gateway(self, term: int = 1, seconds: float = 60.0, **options: Any) -> Bot:
        upstream = options.pop("upstream", self.simulator.url)
        gateway = Gateway(upstream, open_inbox(self.url), self.said.append, **options)
        self.gateways.append(gateway)
        base = await gateway.listen()
        if seconds:
            gateway.begin(Holding(str(BOT), term, f"n{term}"), clock.now() + seconds)
        return Bot(self, gateway, base)

    def user(self) -> Chat:
        return self.simulator.user(BOT)

    def says(self, what: str) -> Callable[[], bool]:
        return lambda: any(what in line for line in self.said)

    def called(self, method: str) -> int:
        return sum(m == method for _, _, m in self.simulator.calls)


@dataclass
class Bot:
    house: House
    gateway: Gateway
    base: str
    offset: int = 0

    def __post_init__(self) -> None:
        self.session = aiohttp.ClientSession()
        self.house.clients.append(self.session)

    async def call(self, method: str, prefix: str = "", **args: Any) -> dict[str, Any]:
        async with self.session.post(f"{self.base}{prefix}/bot{TOKEN}/{method}", json=args) as r:
            answer: dict[str, Any] = await r.json()
            return answer | {"status": r.status}

    async def poll(self, timeout: float = 5, prefix: str = "/batch", **args: Any) -> list[str]:
        """The texts of the next batch; what it got before is confirmed by it."""
        result = (await self.call("getUpdates", prefix, offset=self.offset, timeout=timeout, **args))["result"]
        if result:
            self.offset = result[-1]["update_id"] + 1
        return [u["message"]["text"] for u in result]


async def until(what: Callable[[], object], limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while not what():
            await asyncio.sleep(0.005)


async def opened(url: str) -> AsyncIterator[House]:
    h = House(await Simulator.start(), url)
    yield h
    for session in h.clients:
        await session.close()
    for gateway in h.gateways:
        await gateway.close()
    await h.simulator.stop()


@pytest.fixture
async def house(sqlite_url: str) -> AsyncIterator[House]:
    async for h in opened(sqlite_url):
        yield h


@pytest.fixture
async def each_house(any_url: str) -> AsyncIterator[House]:
    """On each store in turn."""
    store = open_store(any_url)
    await store.open(5.0)
    await store.aclose()
    async for h in opened(any_url):
        yield h


# Passing through -------------------------------------------------------------------------------------------------


async def test_calls_and_errors_pass_through_in_every_form(house: House) -> None:
    bot, chat = await house.gateway(), house.user()
    message = chat.say("hello")
    target = f"{bot.base}/bot{TOKEN}/sendMessage"
    text: dict[str, Any] = {"chat_id": str(chat.chat_id), "text": "hi", "reply_to_message_id": str(message.message_id)}
    form = aiohttp.FormData(text, default_to_multipart=True)
    for request in (
        bot.session.get(target, params=text),
        bot.session.post(target, params=text),
        bot.session.post(target, data=text),
        bot.session.post(target, data=form),
        bot.session.post(target, json=text),
    ):
        async with request as r:
            assert r.status == 200 and (await r.json())["result"]["text"] == "hi"
    assert len(message.replies) == 5
    wrong = await bot.call("sendMessage", chat_id=1, text="")
    assert (wrong["status"], wrong["description"]) == (400, "Bad Request: message text is empty")
    assert (await bot.call("noSuchThing"))["description"] == "Not Found: method not found"


async def test_flood_control_reaches_the_bot_as_it_is(house: House) -> None:
    bot = await house.gateway()
    house.simulator.faults.append(
        ("sendmessage", ApiError(429, "Too Many Requests: retry after 7", {"retry_after": 7}))
    )
    async with bot.session.post(f"{bot.base}/bot{TOKEN}/sendMessage", json={"chat_id": 1, "text": "x"}) as r:
        answer = await r.json()
        assert (r.status, r.headers["Retry-After"], answer["parameters"]) == (429, "7", {"retry_after": 7})


async def test_connections_are_kept_on_both_sides(house: House) -> None:
    bot = await house.gateway()
    for _ in range(20):
        await bot.call("getMe")
    assert len(bot.gateway._upstream._idle) == 1 and not bot.gateway._upstream._busy


async def test_files_pass_in_both_directions_in_pieces(house: House) -> None:
    bot, size = await house.gateway(), 5_000_000

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 50_000):
            yield b"x" * 50_000

    for body in (io.BytesIO(b"x" * size), pieces()):  # with a length, and in chunks
        async with bot.session.post(f"{bot.base}/bot{TOKEN}/sendDocument", data=body) as r:
            assert (await r.json())["result"]["document"]["file_size"] == size
    async with bot.session.get(f"{bot.base}/file/bot{TOKEN}/zeros/{size}.bin") as r:
        assert r.headers["Content-Length"] == str(size) and await r.read() == b"0" * size


async def test_a_bot_api_that_cannot_be_reached_is_an_error_the_framework_can_read(house: House) -> None:
    bot = await house.gateway(upstream="http://127.0.0.1:1")
    answer = await bot.call("sendMessage", chat_id=1, text="x")
    assert answer["status"] == 502 and answer["ok"] is False and answer["description"].startswith("Bad Gateway")


async def test_a_send_that_broke_off_is_not_repeated(house: House) -> None:
    """A message has no key by which the Bot API could tell that it is the same one."""
    hits = 0

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hits
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                hits += 1
                if hits > 1:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.transport.abort()

    server = await asyncio.start_server(broken, "127.0.0.1", 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with bot.session.get(f"{bot.base}/bot{TOKEN}/sendMessage") as r:
        assert r.status == 200
    async with bot.session.get(f"{bot.base}/bot{TOKEN}/sendMessage?again") as r:
        assert r.status == 502
    server.close()
    assert hits == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_the_bot_api_is_reached_over_tls_and_its_certificate_is_checked(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    server = await asyncio.start_server(_ok, "127.0.0.1", 0, ssl=context)
    upstream = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    refused = await (await house.gateway(upstream=upstream)).call("getMe")
    assert refused["status"] == 502 and "certificate" in refused["description"]
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    assert (await (await house.gateway(upstream=upstream)).call("getMe"))["ok"] is True
    server.close()


async def _ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"ok":true}')


# getUpdates ------------------------------------------------------------------------------------------------------


async def test_an_update_is_stored_before_the_bot_api_forgets_it(house: House) -> None:
    bot, chat = await house.gateway(), house.user()
    seen: list[tuple[int, bool]] = []
    confirm = house.simulator.bot(BOT).on_confirm

    def confirmed(ids: list[int]) -> None:
        db = sqlite3.connect(house.url.removeprefix("sqlite:///") + "-updates")
        rows = {r[0] for r in db.execute("SELECT update_id FROM bot_updates")}
        db.close()
        seen.extend((i, i in rows) for i in ids)
        confirm(ids)

    house.simulator.bot(BOT).on_confirm = confirmed
    for n in range(5):
        chat.say(str(n))
    assert await bot.poll() == [str(n) for n in range(5)]
    await until(lambda: len(seen) == 5)
    assert all(stored for _, stored in seen)


async def test_what_was_in_hand_when_the_process_was_killed_is_handed_out_again_and_counted(each_house: House) -> None:
    house = each_house
    bot, chat = await house.gateway(), house.user()
    for n in range(3):
        chat.say(str(n))
    assert await bot.poll(limit=2) == ["0", "1"]
    bot.offset -= 1  # it confirms the first one only, and is killed with the second in hand
    assert await bot.poll(limit=1) == ["1"]
    await until(lambda: bot.gateway.report()[str(BOT)].in_hand == 1)
    await asyncio.sleep(0.1)  # "done" is written soon, not at once
    await bot.gateway.close()

    again = await house.gateway(term=2)
    assert await again.poll() == ["1", "2"]
    assert again.gateway.report()[str(BOT)].repeated == 1
    assert house.says("in hand when the one before ended, handed out again: 1")()
    await again.poll(timeout=0)
    assert await again.poll(timeout=0) == [] and again.gateway.report()[str(BOT)].in_hand == 0


async def test_a_planned_handover_hands_over_what_waits_and_nothing_twice(house: House) -> None:
    old, chat = await house.gateway(), house.user()
    chat.say("one")
    assert await old.poll() == ["one"]
    waiting = asyncio.ensure_future(old.poll(timeout=30))  # it is done with it, and asks for more
    await until(lambda: house.simulator.bot(BOT).held is not None)
    drained = asyncio.ensure_future(old.gateway.drain(clock.now() + 5))
    chat.say("two")  # comes with the last poll
    await drained
    await old.gateway.finish()
    assert not waiting.done()
    waiting.cancel()
    await old.gateway.close()
    polls = house.called("getUpdates")
    chat.say("three")
    await asyncio.sleep(0.3)
    assert house.called("getUpdates") == polls  # no confirming call, no other poll

    new = await house.gateway(term=2)
    texts = await new.poll()
    while len(texts) < 2:
        texts += await new.poll()
    assert texts == ["two", "three"]
    assert new.gateway.report()[str(BOT)].repeated == 0
    assert house.simulator.report(BOT).conflicts == house.simulator.report(BOT).conflicts_dead == 0


async def test_the_last_poll_of_a_drain_is_never_broken_off(house: House) -> None:
    house.simulator.bot(BOT).profile = Profile.H1
    old = await house.gateway()
    waiting = asyncio.ensure_future(old.poll(timeout=30))
    await until(lambda: house.simulator.bot(BOT).held is not None)
    await old.gateway.drain(clock.now() + 5)
    await old.gateway.finish()
    waiting.cancel()
    await old.gateway.close()
    new = await house.gateway(term=2)
    began = clock.now()
    house.user().say("hello")
    assert await new.poll() == ["hello"] and clock.now() - began < 1.0
    assert house.simulator.report(BOT).conflicts == 0


async def test_whoever_follows_a_killed_one_waits_until_its_poll_must_be_over(house: House) -> None:
    house.simulator.bot(BOT).profile = Profile.H2
    old = await house.gateway()
    waiting = asyncio.ensure_future(old.poll(timeout=30))
    await until(lambda: house.simulator.bot(BOT).held is not None)
    await old.gateway.close()  # its poll goes on living at the server
    with contextlib.suppress(aiohttp.ClientError, KeyError):
        await waiting
    polls = house.called("getUpdates")
    new = await house.gateway(term=2)
    first = asyncio.ensure_future(new.poll(timeout=20))
    await until(lambda: house.called("getUpdates") > polls)
    house.user().say("hello")
    assert await first == ["hello"]
    assert house.simulator.report(BOT).conflicts == 0


async def test_two_pollers_of_one_program_are_served_from_one_poll(house: House) -> None:
    one = await house.gateway()
    two = Bot(house, one.gateway, one.base)
    texts: list[str] = []

    async def go(bot: Bot) -> None:
        while True:
            texts.extend(await bot.poll(timeout=3))

    tasks = [asyncio.ensure_future(go(bot)) for bot in (one, two)]
    chat = house.user()
    for n in range(30):
        chat.say(str(n))
        await asyncio.sleep(0.05)
    await until(lambda: len(texts) >= 30)
    for task in tasks:
        task.cancel()
    assert sorted(texts, key=int) == [str(n) for n in range(30)]
    spans = sorted((s.begin, s.end or 9e9) for s in house.simulator.polls[BOT])
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert house.simulator.report(BOT).conflicts == 0


@pytest.mark.parametrize("ttl", [1.2, 2.5, pytest.param(9.0, marks=pytest.mark.long)])
async def test_no_poll_outlasts_the_lease(house: House, ttl: float) -> None:
    bot = await house.gateway(seconds=ttl)
    ends: list[tuple[float, float]] = []  # when it must be over by, when it is over
    get = house.simulator.bot(BOT).get_updates

    async def watched(args: dict[str, Any], alive: Callable[[], bool]) -> list[dict[str, Any]]:
        until_then = bot.gateway.term.until
        try:
            return await get(args, alive)
        finally:
            ends.append((until_then, clock.now()))

    house.simulator.bot(BOT).get_updates = watched  # type: ignore[method-assign]
    waiting = asyncio.ensure_future(bot.call("getUpdates", timeout=50))
    for _ in range(8):  # renewals
        await asyncio.sleep(ttl * 0.05)
        bot.gateway.arm(clock.now() + ttl)
    await until(lambda: clock.now() > bot.gateway.term.until, ttl + 1)  # and then none
    await asyncio.sleep(0.1)
    assert ends and all(over < limit for limit, over in ends)
    waiting.cancel()
    assert house.simulator.bot(BOT).held is None


async def test_no_poll_is_promoted_to_three_seconds(house: House) -> None:
    """The server holds a poll with the offset of the one before for 3 s, whatever its time-out says."""
    bot = await house.gateway()
    house.user().say("x")
    await bot.poll()
    waiting = asyncio.ensure_future(bot.poll(timeout=30))
    await until(lambda: len(house.simulator.polls[BOT]) >= 5, 15)
    waiting.cancel()
    spans = house.simulator.polls[BOT]
    assert max((s.end or clock.now()) - s.begin for s in spans) < poller.POLL + 0.4
    assert max(b.begin - (a.end or 0) for a, b in itertools.pairwise(spans)) < 0.5  # nor is there a gap between two


async def test_allowed_updates_pass_to_the_successor(house: House) -> None:
    old = await house.gateway()
    await old.poll(timeout=0, allowed_updates=["message", "chat_member"])
    await old.poll(timeout=1)
    await old.gateway.drain(clock.now())
    await old.gateway.finish()
    await old.gateway.close()
    house.simulator.bot(BOT).allowed = ["message"]  # somebody else's call
    new = await house.gateway(term=2)
    await new.poll(timeout=1)
    assert house.simulator.bot(BOT).allowed == ["message", "chat_member"]


@pytest.mark.long
async def test_the_inbox_of_a_busy_bot_stays_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BACKLOG", 200)
    bot, chat = await house.gateway(), house.user()
    most, got = 0, 0
    for n in range(1500):  # some 300 a second
        chat.say(str(n))
        if n % 10 == 0:
            await asyncio.sleep(0.033)
            got += len(await bot.poll(timeout=0, limit=2))
        if report := bot.gateway.report().get(str(BOT)):
            most = max(most, report.waiting + report.in_hand)
    assert 200 <= most <= 300
    while got < 1500:
        got += len(await bot.poll(timeout=5))
    assert got == 1500
    await bot.poll(timeout=0)
    await until(lambda: _rows(house) <= 1, 20)


async def test_the_inbox_is_bounded_in_bytes_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BACKLOG_BYTES", 10_000)
    bot, chat = await house.gateway(), house.user()
    await bot.call("getUpdates", timeout=0)  # it polls, and then is busy for long
    await until(lambda: house.called("getUpdates") > 0)
    for _ in range(200):
        chat.say("x" * 5_000)
        await asyncio.sleep(0.005)
    assert 2 <= bot.gateway.report()[str(BOT)].waiting <= 5
    got = 0
    while got < 200:
        got += len(await bot.poll(timeout=5))


def _rows(house: House) -> int:
    db = sqlite3.connect(house.url.removeprefix("sqlite:///") + "-updates")
    try:
        return int(db.execute("SELECT count(*) FROM bot_updates").fetchone()[0])
    finally:
        db.close()


async def test_an_update_that_was_in_hand_at_many_deaths_is_set_aside(house: House) -> None:
    chat = house.user()
    chat.say("poison")
    for term in range(1, 6):
        bot = await house.gateway(term=term)
        assert await bot.poll() == ["poison"]
        await bot.gateway.close()
    bot = await house.gateway(term=6)
    chat.say("good")
    assert await bot.poll() == ["good"]
    assert bot.gateway.report()[str(BOT)].set_aside == 1 and house.says("set aside: 1")()


async def test_hooks_that_never_acknowledge_do_not_make_the_bot_deaf(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "IN_HAND", 20)
    monkeypatch.setattr(poller, "STUCK", 0.5)
    bot, chat = await house.gateway(), house.user()
    got = 0
    for n in range(60):
        chat.say(str(n))
        got += len(await bot.poll(prefix="/ack"))
    assert got == 60


async def test_what_may_end_the_bot_goes_out_alone_and_if_it_is_only_slow_the_others_follow(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "ALONE", 2.0)
    chat = house.user()
    for text in ("slow", "other"):
        chat.say(text)
    for term in (1, 2):
        bot = await house.gateway(term=term)
        got: list[str] = []
        while len(got) < 2:
            got += await bot.poll(prefix="/ack")
        await bot.gateway.close()  # as if it were killed with both in hand
    bot = await house.gateway(term=3)
    assert await bot.poll(prefix="/ack") == ["slow"]
    assert await bot.poll(prefix="/ack", timeout=0) == []
    assert await bot.poll(prefix="/ack", timeout=20) == ["other"]
    report = bot.gateway.report()[str(BOT)]
    assert report.in_hand == 2 and report.set_aside == 0


async def test_a_database_that_is_away_stops_the_confirming_and_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botlease.stores import StoreError

    bot, chat = await house.gateway(), house.user()
    chat.say("one")
    assert await bot.poll() == ["one"]
    inbox: Any = bot.gateway._inbox
    save = inbox.save

    async def away(*args: Any) -> bool:
        raise StoreError("gone fishing")

    inbox.save = away
    waiting = asyncio.ensure_future(bot.poll(timeout=20))
    message = chat.say("two")
    await until(house.says("the inbox cannot be written: gone fishing"))
    assert not waiting.done() and message.confirmed_at is None
    assert (await bot.call("sendMessage", chat_id=chat.chat_id, text="still here"))["ok"]
    inbox.save = save
    assert await waiting == ["two"]


async def test_a_token_that_is_refused_is_told_to_the_bot(house: House) -> None:
    bot = await house.gateway()
    house.simulator.faults.append(("getupdates", ApiError(401, "Unauthorized")))
    answer = await bot.call("getUpdates", timeout=5)
    assert (answer["status"], answer["description"]) == (401, "Unauthorized")


async def test_deaf_counts_the_seconds_since_a_poll_succeeded(house: House) -> None:
    bot = await house.gateway()
    house.user()
    waiting = asyncio.ensure_future(bot.poll(timeout=50))
    await until(lambda: len(house.simulator.polls[BOT]) >= 2)
    assert bot.gateway.report()[str(BOT)].deaf < poller.POLL + 0.5
    await house.simulator.stop()
    bot.gateway._upstream.abort()
    await until(house.says("the Bot API cannot be reached"))
    await asyncio.sleep(1.0)
    assert bot.gateway.report()[str(BOT)].deaf >= 1.0
    waiting.cancel()


# The fence -------------------------------------------------------------------------------------------------------


async def test_before_the_term_only_what_reads_passes_and_the_rest_waits(house: House) -> None:
    bot, chat = await house.gateway(seconds=0), house.user()
    assert (await bot.call("getMe"))["ok"]
    sending = asyncio.ensure_future(bot.call("sendMessage", chat_id=chat.chat_id, text="early"))
    polling = asyncio.ensure_future(bot.poll(timeout=20))
    await asyncio.sleep(0.2)
    assert house.called("sendMessage") == house.called("getUpdates") == 0
    bot.gateway.begin(Holding(str(BOT), 1, "n1"), clock.now() + 60)
    assert (await sending)["ok"]
    chat.say("now")
    assert await polling == ["now"]


async def test_after_the_end_of_trust_nothing_leaves(house: House) -> None:
    bot, chat = await house.gateway(seconds=0.5), house.user()
    assert (await bot.call("sendMessage", chat_id=chat.chat_id, text="in time"))["ok"]
    await until(lambda: clock.now() > bot.gateway.term.until)
    calls = len(house.simulator.calls)
    late = await bot.call("sendMessage", chat_id=chat.chat_id, text="late")
    assert (late["status"], late["ok"]) == (503, False)
    assert (await bot.call("getMe"))["status"] == 503
    assert len(house.simulator.calls) == calls


async def test_a_request_in_flight_at_the_end_is_broken_off_with_a_reset(house: House) -> None:
    came, ended = asyncio.Event(), asyncio.Event()
    how: list[BaseException | None] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(65_536):
                came.set()
            how.append(None)
        except ConnectionError as e:
            how.append(e)
        ended.set()
        writer.transport.abort()

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 50_000
            await asyncio.sleep(0.01)

    upload = asyncio.ensure_future(bot.session.post(f"{bot.base}/bot{TOKEN}/sendDocument", data=endless()))
    await came.wait()
    await bot.gateway.close()
    await asyncio.wait_for(ended.wait(), 5)
    assert isinstance(how[0], ConnectionResetError)
    upload.cancel()
    with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
        await upload
    server.close()


# Guards ----------------------------------------------------------------------------------------------------------


async def test_the_bot_cannot_destroy_what_waits_for_its_sibling(house: House) -> None:
    chat = house.user()
    for n in range(4):
        chat.say(str(n))
    bot = await house.gateway()
    assert (await bot.call("deleteWebhook", drop_pending_updates=True))["result"] is True
    assert (await bot.call("setWebhook", url="", drop_pending_updates=True))["result"] is True
    assert (await bot.call("getUpdates", offset=-1))["result"] == []
    assert (await bot.call("close"))["result"] is True
    assert (await bot.call("logOut"))["result"] is True
    assert house.called("deleteWebhook") == house.called("close") == house.called("logOut") == 0
    assert await bot.poll() == ["0", "1", "2", "3"]
    assert house.says("nothing was dropped")() and house.says("they were kept")()


async def test_a_webhook_that_is_set_loses_only_its_wish_to_drop_updates(house: House) -> None:
    house.user().say("pending")
    bot = await house.gateway()
    answer = await bot.call("setWebhook", url="https://example.org/hook", drop_pending_updates=True)
    assert answer["description"] == "Webhook was set"
    assert house.simulator.bot(BOT).webhook_url and len(house.simulator.bot(BOT).queue) == 1


async def test_a_webhook_is_reported_and_left_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "RECHECK", 0.3)
    house.simulator.bot(BOT).webhook_url = "https://hooks.example.org/secret-path"
    bot = await house.gateway()
    waiting = asyncio.ensure_future(bot.poll(timeout=20))
    await until(house.says("has a webhook at hooks.example.org"))
    assert not waiting.done() and house.called("getUpdates") == 0 and house.called("deleteWebhook") == 0
    assert bot.gateway.report()[str(BOT)].webhook == "hooks.example.org"
    assert not house.says("secret-path")()
    house.simulator.bot(BOT).webhook_url = ""  # its owner took it away
    house.user().say("hello")
    assert await waiting == ["hello"]


async def test_a_webhook_is_deleted_if_that_was_asked_for(house: House) -> None:
    house.simulator.bot(BOT).webhook_url = "https://hooks.example.org/x"
    house.user().say("hello")
    bot = await house.gateway(delete_webhook=True)
    assert await bot.poll() == ["hello"] and house.simulator.bot(BOT).webhook_url == ""


async def test_a_foreign_poller_is_named_and_not_fought(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "CONFLICT_PAUSES", (0.2, 1.5, 3.0))
    bot = await house.gateway()
    waiting = asyncio.ensure_future(bot.poll(timeout=30))
    stranger = aiohttp.ClientSession()
    house.clients.append(stranger)

    async def strange() -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                url = f"{house.simulator.url}/bot{TOKEN}/getUpdates"
                await (await stranger.post(url, json={"timeout": 20, "offset": 3})).read()

    other = asyncio.ensure_future(strange())
    await until(house.says("somebody else polls with the token of bot 123456"))
    polls = house.called("getUpdates")
    await asyncio.sleep(1.0)
    assert house.called("getUpdates") <= polls + 1  # only the stranger's
    assert bot.gateway.report()[str(BOT)].conflicts == 2 and not waiting.done()
    other.cancel()
    waiting.cancel()


async def test_the_token_is_nowhere(house: House, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(poller, "CONFLICT_PAUSES", (0.1, 0.1))
    bot, chat = await house.gateway(), house.user()
    chat.say("x")
    await bot.poll()
    house.simulator.faults += [("getupdates", ApiError(409, "Conflict: terminated by other getUpdates request"))] * 2
    house.simulator.faults += [("getupdates", ApiError(500, "Internal Server Error"))]
    waiting = asyncio.ensure_future(bot.poll(timeout=20))
    await until(house.says("answers 500"))
    waiting.cancel()
    errors = [await (await house.gateway(term=2, upstream="http://127.0.0.1:1")).call("sendMessage")]
    async with bot.session.get(f"{bot.base}/bot{TOKEN}x y/getMe") as r:
        errors.append(await r.json())
    secret = TOKEN.split(":")[1]
    assert secret not in "\n".join(house.said) + str(errors) + caplog.text + repr(bot.gateway.report())
    for file in Path(house.url.removeprefix("sqlite:///")).parent.iterdir():
        assert secret.encode() not in file.read_bytes(), file


async def test_others_than_the_bot_api_s_paths_are_refused(house: House) -> None:
    bot = await house.gateway()
    for path in ("/", "/botx/getMe", f"/bot{TOKEN}", "/bot/getMe", f"//bot{TOKEN}/getMe", "/bot1:a/getMe"):
        async with bot.session.get(bot.base + path) as r:
            assert r.status == 404 and (await r.json())["ok"] is False
    assert not house.simulator.calls


async def test_arguments_that_cannot_be_read_are_an_error(house: House) -> None:
    bot = await house.gateway()
    headers = {"content-type": "application/json"}
    async with bot.session.post(f"{bot.base}/bot{TOKEN}/getUpdates", data=b"{", headers=headers) as r:
        assert r.status == 400
    for args in ({"offset": "x", "timeout": [1]}, {"limit": -5, "timeout": 0}, {"allowed_updates": "nonsense"}):
        assert (await bot.call("getUpdates", **args))["status"] == 200
    for ids in ("nonsense", "[1", 5, None):
        assert (await bot.call("botleaseDone", update_ids=ids))["status"] in (200, 400)


async def test_an_answer_of_unknown_length_passes(house: House) -> None:
    async def chunked(request: http.Request) -> http.Response:
        async def pieces() -> AsyncIterator[bytes]:
            for n in range(100):
                yield json.dumps(n).encode()

        return http.Response(200, pieces())

    server = await http.serve(chunked, 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with bot.session.get(f"{bot.base}/bot{TOKEN}/getSomething") as r:
        assert (await r.read()) == "".join(map(str, range(100))).encode()
    server.close()


# Found in review ---------------------------------------------------------------------------------------------------


async def test_a_slow_bot_with_a_hook_is_not_given_its_whole_backlog(house: House) -> None:
    chat = house.user()
    for n in range(700):
        chat.say(str(n))
    bot = await house.gateway()
    got: list[str] = []
    while more := await bot.poll(prefix="/ack", timeout=1):
        got += more
    assert len(got) == desk.IN_HAND  # the rest waits where a kill does not reach it
    done = [int(i) for i in range(bot.offset - len(got), bot.offset)]
    await bot.call("botleaseDone", update_ids=done[:150])
    assert len(await bot.poll(prefix="/ack")) > 0
    await bot.gateway.flush()
    await bot.gateway.close()
    again = await house.gateway(term=2)
    rest: list[str] = []
    while more := await again.poll(timeout=5):
        rest += more
    assert sorted({int(t) for t in rest} | set(range(150))) == list(range(700))


async def test_a_burst_after_a_quiet_time_is_not_taken_for_a_hook_that_is_stuck(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "STUCK", 0.5)
    bot, chat = await house.gateway(), house.user()
    waiting = asyncio.ensure_future(bot.poll(prefix="/ack", timeout=20))
    await asyncio.sleep(1.0)
    for n in range(300):
        chat.say(str(n))
    got = await waiting
    while len(got) < desk.IN_HAND:
        got += await bot.poll(prefix="/ack", timeout=2)
    await asyncio.sleep(0.2)
    assert bot.gateway.report()[str(BOT)].set_aside == 0 and bot.gateway.report()[str(BOT)].in_hand == desk.IN_HAND
    await until(lambda: bot.gateway.report()[str(BOT)].set_aside == desk.IN_HAND)  # but in the end it is


async def test_what_could_not_be_stored_is_not_confirmed(house: House) -> None:
    bot, chat = await house.gateway(), house.user()
    chat.say("one")
    assert await bot.poll() == ["one"]
    inbox: Any = bot.gateway._inbox
    save, broken = inbox.save, [True, True]

    async def breaks(*args: Any) -> bool:
        if args[2].received and broken:
            broken.pop()
            raise RuntimeError("a bug")
        return bool(await save(*args))

    inbox.save = breaks
    message = chat.say("two")
    assert await bot.poll(timeout=20) == ["two"] and not broken
    await bot.poll(timeout=0)
    await until(lambda: message.confirmed_at)


async def test_an_answer_that_is_cut_off_does_not_make_the_bot_deaf(house: House) -> None:
    polls = 0

    async def cutting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal polls
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
                await reader.readexactly(size)
                if b"getUpdates" not in head:
                    writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 23\r\n\r\n{"ok":true,"result":{}}')
                    continue
                polls += 1
                if polls < 3:
                    writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"ok":true,')
                    await writer.drain()
                    break
                body = b'{"ok":true,"result":[{"update_id":7,"message":{"text":"hello"}}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(cutting, "127.0.0.1", 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert await bot.poll(timeout=15) == ["hello"] and polls >= 3
    server.close()


async def test_clients_that_hang_up_leave_nothing_behind(house: House) -> None:
    release = asyncio.Event()

    async def slow(request: http.Request) -> http.Response:
        await release.wait()

        async def pieces() -> AsyncIterator[bytes]:
            yield b"x" * 1000

        return http.Response(200, pieces())

    server = await http.serve(slow, 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for _ in range(10):
        with contextlib.suppress(asyncio.TimeoutError, aiohttp.ClientError):
            await bot.session.get(f"{bot.base}/bot{TOKEN}/getFile", timeout=aiohttp.ClientTimeout(0.05))
    release.set()
    await until(lambda: not bot.gateway._upstream._busy)
    server.close()


async def test_what_a_warm_bot_gave_up_is_not_sent_when_its_term_begins(house: House) -> None:
    bot, chat = await house.gateway(seconds=0), house.user()
    for _ in range(5):
        with contextlib.suppress(asyncio.TimeoutError):
            call = f"{bot.base}/bot{TOKEN}/sendMessage"
            timeout = aiohttp.ClientTimeout(0.1)
            await bot.session.post(call, json={"chat_id": chat.chat_id, "text": "I am up"}, timeout=timeout)
    last = asyncio.ensure_future(bot.call("sendMessage", chat_id=chat.chat_id, text="I am up"))
    await asyncio.sleep(0.2)
    bot.gateway.begin(Holding(str(BOT), 1, "n1"), clock.now() + 60)
    assert (await last)["ok"] and house.called("sendMessage") == 1


@pytest.mark.parametrize("path", ["test/getUpdates", "getUpdates/", "get%55pdates", "deleteWebhook/", "/getUpdates"])
async def test_nothing_slips_past_by_an_odd_path(house: House, path: str) -> None:
    bot = await house.gateway()
    house.user().say("x")
    async with bot.session.get(yarl.URL(f"{bot.base}/bot{TOKEN}/{path}", encoded=True), params={"timeout": 1}) as r:
        assert r.status == 404 or (await r.json())["result"] == []
    await until(lambda: path != "test/getUpdates" or "123456-test" in bot.gateway.report())
    assert house.called("getUpdates") == house.called("deleteWebhook") == 0


async def test_two_pollers_share_a_backlog_without_a_double(house: House) -> None:
    chat = house.user()
    for n in range(40):
        chat.say(str(n))
    one = await house.gateway()
    bots = one, Bot(house, one.gateway, one.base)
    texts: list[str] = []

    async def go(bot: Bot) -> None:
        while got := await bot.poll(timeout=2, prefix=""):
            await asyncio.sleep(0.01)
            texts.extend(got)

    await asyncio.gather(*(go(bot) for bot in bots))
    assert sorted(texts, key=int) == [str(n) for n in range(40)]
    await until(lambda: one.gateway.report()[str(BOT)].in_hand == 0)


async def test_a_webhook_that_cannot_be_deleted_is_not_asked_for_without_pause(house: House) -> None:
    house.simulator.bot(BOT).webhook_url = "https://hooks.example.org/x"
    house.simulator.faults += [("deletewebhook", ApiError(429, "Too Many Requests", {"retry_after": 9}))] * 50
    bot = await house.gateway(delete_webhook=True)
    assert (await bot.call("getUpdates", timeout=1))["result"] == []
    assert house.called("deleteWebhook") == 1


async def test_a_set_webhook_in_pieces_passes(house: House) -> None:
    bot = await house.gateway()

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"url": "https://example.org/hook",'
        yield b' "max_connections": 1}'

    headers = {"content-type": "application/json"}
    async with bot.session.post(f"{bot.base}/bot{TOKEN}/setWebhook", data=pieces(), headers=headers) as r:
        assert (await r.json())["description"] == "Webhook was set"


async def test_a_header_that_is_not_ascii_passes(house: House) -> None:
    async def named(request: http.Request) -> http.Response:
        name = 'attachment; filename="Größe.pdf"'.encode()
        return http.Response(200, b"x", headers=((b"content-disposition", name),))

    server = await http.serve(named, 0)
    bot = await house.gateway(upstream=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with bot.session.get(f"{bot.base}/file/bot{TOKEN}/documents/a.pdf") as r:
        assert r.status == 200 and "Größe" in r.headers["content-disposition"]
    server.close()


async def test_a_bot_that_always_asks_for_a_negative_offset_is_served_after_the_first(house: House) -> None:
    bot = await house.gateway()
    house.user().say("x")
    assert (await bot.call("getUpdates", offset=-1, timeout=5))["result"] == []
    assert len((await bot.call("getUpdates", offset=-1, timeout=5))["result"]) == 1


async def test_what_is_done_is_durable_after_a_flush_that_meets_a_write_under_way(house: House) -> None:
    bot, chat = await house.gateway(), house.user()
    chat.say("x")
    assert await bot.poll(prefix="/ack") == ["x"]
    inbox: Any = bot.gateway._inbox
    save = inbox.save

    async def slowly(*args: Any) -> bool:
        await asyncio.sleep(0.2)
        return bool(await save(*args))

    inbox.save = slowly
    await bot.call("botleaseDone", update_ids=[bot.offset - 1])
    await asyncio.sleep(0.05)
    await bot.gateway.flush()
    await bot.gateway.close()
    again = await house.gateway(term=2)
    assert await again.poll(timeout=1) == [] and again.gateway.report()[str(BOT)].repeated == 0


async def test_what_is_confirmed_after_a_stop_signal_counts_only_if_the_bot_ends_by_itself(house: House) -> None:
    for clean, left in ((False, ["x"]), (True, [])):
        chat = house.user()
        bot = await house.gateway(term=len(house.gateways) + 1)
        if not left:
            assert await bot.poll(timeout=5) == ["x"]
        else:
            chat.say("x")
            assert await bot.poll(timeout=5) == ["x"]
        bot.gateway.signalled()
        await bot.call("getUpdates", "/batch", offset=bot.offset, limit=1)  # grammY's last call
        await bot.gateway.finish(clean=clean)
        await bot.gateway.close()
        after = await house.gateway(term=len(house.gateways) + 1)
        assert await after.poll(timeout=1) == left
        await after.gateway.close()


async def test_a_connection_that_is_cancelled_while_its_answer_is_ready_ends() -> None:
    """Swallowed, the cancellation would leave it waiting for a next request on a loop that closes."""
    waits = asyncio.Event()

    class Reader:
        async def read(self, most: int) -> bytes:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                waits.set()
                await asyncio.sleep(0)
                raise
            return b""

    async def handler(request: http.Request) -> http.Response:
        return http.Response(200, b"")

    talk = http._Conversation(Reader(), None, handler, False, 1, 1.0, 1.0)  # type: ignore[arg-type]
    talk.received.set()
    task = asyncio.create_task(talk._answer(http.Request("GET", "/", {})))
    await waits.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
