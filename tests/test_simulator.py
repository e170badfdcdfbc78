"""The Bot API simulator: the 16 acceptance tests that follow from the server's source, the two hostile profiles,
and released frameworks, unmodified, as clients."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import BOTLEASE, clean_env

from botlease.telegram.botapi import OTHER, Profile
from botlease.telegram.simulator import Simulator

SPEED = 5.0  # the simulator's seconds per second of ours
_ids = itertools.count(100)


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    s = await Simulator.start(speed=SPEED)
    yield s
    await s.stop()


class Client:
    """One poller with connections of its own."""

    def __init__(self, simulator: Simulator, bot_id: int) -> None:
        self.base = f"{simulator.url}/bot{bot_id}:token"
        self.session = aiohttp.ClientSession()
        self.simulator = simulator
        self.bot = simulator.bot(bot_id)

    async def call(self, method: str, **args: Any) -> tuple[int, dict[str, Any], float]:
        began = time.monotonic()
        async with self.session.post(f"{self.base}/{method}", json=args) as r:
            return r.status, await r.json(), (time.monotonic() - began) * SPEED

    def hold(self, **args: Any) -> asyncio.Task[tuple[int, dict[str, Any], float]]:
        return asyncio.ensure_future(self.call("getUpdates", **({"timeout": 30} | args)))

    async def held(self, before: object = None) -> None:
        """Until a poll other than ``before`` is in the slot."""
        while self.bot.held is None or self.bot.held is before:
            await asyncio.sleep(0.002)


@pytest.fixture
async def pair(simulator: Simulator) -> AsyncIterator[tuple[Client, Client]]:
    bot_id = next(_ids)
    a, b = Client(simulator, bot_id), Client(simulator, bot_id)
    yield a, b
    await a.session.close()
    await b.session.close()


def ids(result: tuple[int, dict[str, Any], float]) -> list[int]:
    assert result[0] == 200, result
    return [u["update_id"] for u in result[1]["result"]]


def is_conflict(result: tuple[int, dict[str, Any], float], text: str = OTHER) -> bool:
    return result[0] == 409 and result[1] == {"ok": False, "error_code": 409, "description": text}


async def test_01_a_new_long_poll_evicts_the_held_one(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    second = b.hold(offset=5)
    assert is_conflict(await first)
    await a.held()
    assert not second.done()
    second.cancel()


async def test_02_the_next_conflict_is_answered_after_three_seconds(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    poll = a.bot.held
    second = b.hold(offset=5)
    assert is_conflict(await first)
    await a.held(poll)
    poll = a.bot.held
    third = a.hold(offset=7)
    began = time.monotonic()
    await a.held(poll)
    assert is_conflict(await second)
    assert 2.5 < (time.monotonic() - began) * SPEED < 4.5
    third.cancel()


async def test_03_a_short_poll_leaves_the_held_one_alone(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    assert ids(await b.call("getUpdates", offset=5, timeout=0)) == []
    assert not first.done() and a.bot.held is not None
    first.cancel()


async def test_04_the_same_offset_within_three_seconds_is_promoted_to_a_long_poll(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold(offset=9)
    await a.held()
    result = await b.call("getUpdates", offset=9, timeout=0)
    assert is_conflict(await first)
    assert ids(result) == [] and result[2] >= 2.9


async def test_05_the_same_offset_later_is_not(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold(offset=9)
    await a.held()
    await asyncio.sleep(3.2 / SPEED)
    result = await b.call("getUpdates", offset=9, timeout=0)
    assert ids(result) == [] and result[2] < 1.5
    assert not first.done()
    first.cancel()


async def test_06_with_updates_two_pollers_both_get_them_and_nobody_a_409(pair: tuple[Client, Client]) -> None:
    a, b = pair
    one, two = a.bot.push("message", {}), a.bot.push("message", {})
    assert ids(await a.call("getUpdates", offset=0, timeout=30)) == [one, two]
    await asyncio.sleep(0.6 / SPEED)
    assert ids(await b.call("getUpdates", offset=0, timeout=30)) == [one, two]


async def test_07_an_abandoned_poll_loses_nothing(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    first.cancel()
    await asyncio.sleep(0.05)
    one = a.bot.push("message", {})
    await asyncio.sleep(0.05)
    assert ids(await b.call("getUpdates", offset=0, timeout=30)) == [one]


async def test_08_an_abandoned_poll_conflicts_with_nobody(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    poll = a.bot.held
    first.cancel()
    await asyncio.sleep(0.1)
    second = b.hold(offset=5)
    await b.held(poll)
    await asyncio.sleep(0.1)
    assert not second.done()
    assert (a.bot.counters.conflicts_live, a.bot.counters.conflicts_dead) == (0, 1)
    second.cancel()


async def test_09_a_negative_offset_destroys_the_backlog(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    made = [a.bot.push("message", {}) for _ in range(5)]
    assert ids(await a.call("getUpdates", offset=-1)) == made[-1:]
    assert list(a.bot.queue) == made[-1:]


async def test_10_an_offset_confirms_what_is_below_it_for_good(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    made = [a.bot.push("message", {}) for _ in range(5)]
    assert ids(await a.call("getUpdates", offset=made[3])) == made[3:]
    assert ids(await a.call("getUpdates", offset=made[1])) == made[3:]


async def test_11_an_offset_far_above_confirms_nothing(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    made = [a.bot.push("message", {}) for _ in range(3)]
    assert ids(await a.call("getUpdates", offset=a.bot.tail + 11)) == made


async def test_12_a_webhook_evicts_the_poll_and_refuses_the_next(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    assert (await b.call("setWebhook", url="https://example.org/hook"))[1]["description"] == "Webhook was set"
    assert is_conflict(await first, "Conflict: terminated by setWebhook request")
    text = (
        "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
    )
    result = await a.call("getUpdates")
    assert is_conflict(result, text) and result[2] > 2.0


async def test_13_deleting_a_webhook_leaves_the_poll_alone(pair: tuple[Client, Client]) -> None:
    a, b = pair
    first = a.hold()
    await a.held()
    assert (await b.call("deleteWebhook"))[1]["description"] == "Webhook is already deleted"
    assert not first.done() and a.bot.held is not None
    first.cancel()


async def test_14_a_timeout_is_clamped_to_fifty_seconds(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    result = await a.call("getUpdates", timeout=60)
    assert ids(result) == [] and 49 < result[2] < 54


async def test_15_the_same_offset_within_half_a_second_gets_one_update(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    made = [a.bot.push("message", {}) for _ in range(5)]
    a.bot.now = lambda: 1000.0  # both calls at one moment
    assert ids(await a.call("getUpdates", offset=0)) == made
    assert ids(await a.call("getUpdates", offset=0)) == made[:1]


async def test_16_allowed_updates_belong_to_the_bot_not_to_the_poller(pair: tuple[Client, Client]) -> None:
    a, b = pair
    await a.call("getUpdates", allowed_updates=["message"])
    await b.call("getUpdates", offset=1, allowed_updates=["message", "message_reaction"])
    assert a.bot.push("message_reaction", {}) is not None
    await a.call("getUpdates", offset=2, allowed_updates=["message"])
    assert a.bot.push("message_reaction", {}) is None


@pytest.mark.parametrize("profile", [Profile.H1, Profile.H2])
async def test_the_hostile_profiles_fail_the_newer_request(profile: Profile) -> None:
    simulator = await Simulator.start(profile=profile, speed=SPEED)
    bot_id = next(_ids)
    a, b = Client(simulator, bot_id), Client(simulator, bot_id)
    first = a.hold(timeout=10)
    await a.held()
    assert is_conflict(await b.call("getUpdates", offset=5, timeout=30))
    if profile is Profile.H2:
        assert is_conflict(await first)
    else:
        first.cancel()  # abandoned: it conflicts until its time-out has ended
        assert is_conflict(await b.call("getUpdates", offset=6, timeout=30))
        await asyncio.sleep(10 / SPEED)
        assert ids(await b.call("getUpdates", offset=7, timeout=0)) == []
    for c in (a, b):
        await c.session.close()
    await simulator.stop()


@pytest.mark.parametrize(
    ("path", "status", "description"),
    [
        ("/bot0123:x/getMe", 401, "Unauthorized: invalid token specified"),
        ("/botnocolon/getMe", 401, "Unauthorized: invalid token specified"),
        ("/bot1:x/noSuchMethod", 404, "Not Found: method not found"),
        ("/elsewhere", 404, "Not Found"),
    ],
)
async def test_what_is_not_there_is_answered_as_the_server_does(
    simulator: Simulator, path: str, status: int, description: str
) -> None:
    async with aiohttp.ClientSession() as session, session.get(simulator.url + path) as r:
        assert r.status == status
        assert await r.json() == {"ok": False, "error_code": status, "description": description}


BOTS = Path(__file__).parent / "bots"


@pytest.mark.parametrize("framework", ["ptb", pytest.param("aiogram", marks=pytest.mark.long), "telebot"])
async def test_an_unmodified_framework_runs_and_a_second_copy_of_it_conflicts(framework: str) -> None:
    simulator = await Simulator.start()
    bot_id = next(_ids)
    user = simulator.user(bot_id)
    command = [sys.executable, str(BOTS / f"{framework}_bot.py"), simulator.url, f"{bot_id}:AAtoken"]
    processes = [await asyncio.create_subprocess_exec(*command, env=clean_env(), stderr=asyncio.subprocess.DEVNULL)]
    try:
        async with asyncio.timeout(60):
            for n in range(5):
                message = user.say(f"hello {n}")
                while not message.replies:
                    await asyncio.sleep(0.01)
                assert message.replies[0][1] == f"{framework} hello {n}"
        report = simulator.report(bot_id)
        assert (report.messages, report.answered, report.lost, report.twice, report.conflicts) == (5, 5, 0, 0, 0)

        processes.append(await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL))
        async with asyncio.timeout(60):
            while not simulator.report(bot_id).conflicts:
                await asyncio.sleep(0.01)
    finally:
        for p in processes:
            p.kill()
            await p.wait()
        await simulator.stop()


async def test_lost_and_twice_are_counted(simulator: Simulator) -> None:
    bot_id = next(_ids)
    user = simulator.user(bot_id)
    client = Client(simulator, bot_id)
    lost, twice, fine = (user.say(t) for t in ("lost", "twice", "fine"))
    await client.call("getUpdates", offset=0)
    for message, times in ((twice, 2), (fine, 1)):
        for _ in range(times):
            await client.call(
                "sendMessage", chat_id=user.chat_id, text="x", reply_parameters={"message_id": message.message_id}
            )
    await client.call("getUpdates", offset=lost.update_id + 3)
    report = simulator.report(bot_id)
    assert (report.lost, report.twice, report.answered, report.waiting) == (1, 1, 2, 0)
    await client.session.close()


async def test_the_gap_without_a_poller_is_measured(simulator: Simulator) -> None:
    from botlease import clock

    bot_id = next(_ids)
    client = Client(simulator, bot_id)
    begin = clock.now()
    await client.call("getUpdates", timeout=1)
    polled = clock.now()
    await asyncio.sleep(0.15)
    await client.call("getUpdates", timeout=1, offset=3)
    end = clock.now()
    assert 0.14 <= simulator.gap(bot_id, begin, end) <= max(polled - begin, end - polled)
    await client.session.close()


async def test_the_command_serves_and_counts() -> None:
    process = await asyncio.create_subprocess_exec(
        *BOTLEASE, "simulator", "--port", "0", "--every", "0.05", stdout=asyncio.subprocess.PIPE, env=clean_env()
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        first = (await process.stdout.readline()).decode()
        url = first.split()[5].split("/bot")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/bot77:token/getMe") as r:
                assert (await r.json())["result"]["id"] == 77
            while b"messages=" not in (line := await process.stdout.readline()):
                assert line
            async with session.get(f"{url}/simulator/report") as r:
                assert (await r.json())["77"]["messages"] > 0
        process.send_signal(2)
        assert await process.wait() == 0
