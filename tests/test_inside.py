"""In-process: the async context manager and the decorator, under the same kernel fence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import aiohttp
import pytest
from harness import clean_env, until

import botlease
from botlease.stores import StoreError
from botlease.telegram.address import address, served
from botlease.telegram.simulator import Simulator


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BOTLEASE_", "RAILWAY_", "DATABASE_URL")):
            monkeypatch.delenv(name)


async def test_one_body_at_a_time_and_terms_rise(any_url: str) -> None:
    inside = 0
    terms = []

    async def one() -> None:
        nonlocal inside
        async with botlease.active("mybot", database=any_url, ttl=2.0) as term:
            inside += 1
            assert inside == 1
            term.check()
            assert 0 < term.remaining <= 2.0
            terms.append(term.number)
            await asyncio.sleep(0.05)
            inside -= 1
        with pytest.raises(botlease.LeaseLost):
            term.check()

    await asyncio.gather(*(one() for _ in range(4)))
    assert terms == sorted(set(terms)) and len(terms) == 4


async def test_a_term_that_is_over_before_its_body_begins_raises_lease_lost(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bare cancellation, which would end the program that goes round in a loop for its next turn."""
    from botlease import inside
    from botlease.model import Reason

    class Short(inside.BodyWork):
        def start(self, term: int, nonce: str, until: float, guard_fd: int | None) -> None:
            super().start(term, nonce, until, guard_fd)
            self.drain(until, Reason.SUPERSEDED)  # as if the next event of the same moment were a newer deployment

    monkeypatch.setattr(inside, "BodyWork", Short)
    with pytest.raises(botlease.LeaseLost, match="superseded"):
        async with botlease.active("b", database=any_url, ttl=2.0):
            pytest.fail("the body began")
    monkeypatch.undo()
    async with botlease.active("b", database=any_url, ttl=2.0) as term:  # it was given back
        assert term.number == 2


async def test_a_take_over_cancels_the_body_and_raises_lease_lost(any_url: str) -> None:
    entered = asyncio.Event()
    cleaned = []

    async def old() -> None:
        with pytest.raises(botlease.LeaseLost, match="superseded"):
            async with botlease.active("b", database=any_url, ttl=2.0, deployment="v1"):
                entered.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    cleaned.append("old")

    task = asyncio.create_task(old())
    await asyncio.wait_for(entered.wait(), 10)
    async with botlease.active("b", database=any_url, ttl=2.0, deployment="v2") as term:
        assert cleaned == ["old"]
        assert term.number == 2
    await task


async def test_a_users_own_cancellation_is_not_swallowed(sqlite_url: str) -> None:
    entered = asyncio.Event()

    async def body() -> None:
        async with botlease.active("b", database=sqlite_url, ttl=2.0):
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(body())
    await asyncio.wait_for(entered.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with botlease.active("b", database=sqlite_url, ttl=2.0):
        pass  # it was released


@pytest.mark.parametrize("way", ["active", "exclusive"])
async def test_whoever_is_cancelled_again_while_he_gives_the_lease_back_has_given_it_back(
    any_url: str, way: str
) -> None:
    ttl = 30.0  # nobody waits for that

    async def hold(begun: asyncio.Event) -> None:
        async def body(term: botlease.Term) -> None:
            begun.set()
            await asyncio.Event().wait()

        if way == "active":
            async with botlease.active("mybot", database=any_url, ttl=ttl) as term:
                await body(term)
        else:
            await botlease.exclusive("mybot", database=any_url, ttl=ttl)(body)()

    for ticks in range(6):  # at one of them the release is on its way
        begun = asyncio.Event()
        task = asyncio.create_task(hold(begun))
        async with asyncio.timeout(5):
            await begun.wait()
            task.cancel()
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_an_error_of_the_body_comes_out_as_it_is(sqlite_url: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with botlease.active("b", database=sqlite_url, ttl=2.0):
            _ = 1 / 0


async def test_exclusive_returns_the_result_of_the_function(sqlite_url: str) -> None:
    @botlease.exclusive("b", database=sqlite_url, ttl=2.0)
    async def main(term: botlease.Term) -> int:
        """Trade."""
        return term.number * 10

    assert await main() == 10
    assert await main() == 20
    assert main.__doc__ == "Trade."


async def test_exclusive_runs_again_when_it_gets_the_assignment_back(any_url: str) -> None:
    runs: list[int] = []
    changed = asyncio.Event()

    @botlease.exclusive("b", database=any_url, ttl=2.0, deployment="v1")
    async def main(term: botlease.Term) -> str:
        runs.append(term.number)
        changed.set()
        if len(runs) == 2:
            return "done"
        await asyncio.sleep(60)
        return "?"

    task = asyncio.create_task(main())
    await asyncio.wait_for(changed.wait(), 10)
    async with botlease.active("b", database=any_url, ttl=2.0, deployment="v2") as term:
        assert term.number == 2
    assert await asyncio.wait_for(task, 15) == "done"
    assert runs == [1, 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ttl": 0.1}, "at least 1 s"),
        ({"database": "mysql://x"}, "use postgresql://"),
        ({"take_over": True, "standby": True}, "exclude each other"),
    ],
)
def test_wrong_settings_are_refused_before_anything_happens(options: dict[str, object], says: str) -> None:
    with pytest.raises((botlease.ConfigurationError, botlease.StoreError), match=says):
        botlease.active("b", **options)


STUCK = {
    "sleeps": "time.sleep(60)",
    "holds the GIL in C code": "re.match('(a*)*b', 'a' * 60)",
    "blocks every signal": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(60)",
}


def program(tmp_path: Path, url: str, body: str) -> subprocess.Popen[bytes]:
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(f"""
        import asyncio, os, re, signal, time, botlease
        async def main():
            async with botlease.active("b", database={url!r}, ttl=1.5) as term:
                open({str(tmp_path / "begun")!r}, "w").write(str(time.clock_gettime(time.CLOCK_BOOTTIME)))
                {body}
        asyncio.run(main())
        """)
    )
    return subprocess.Popen([sys.executable, str(path)], env=clean_env())


@pytest.mark.parametrize("how", STUCK)
def test_a_program_that_is_stuck_is_killed_by_the_kernel_at_the_end_of_trust(
    tmp_path: Path, sqlite_url: str, how: str
) -> None:
    process = program(tmp_path, sqlite_url, STUCK[how])
    assert process.wait(20) == -signal.SIGKILL
    begun = float((tmp_path / "begun").read_text())

    assert time.clock_gettime(time.CLOCK_BOOTTIME) - begun < 1.5


def test_a_stopped_program_is_killed_by_the_kernel_and_another_takes_over(tmp_path: Path, any_url: str) -> None:
    process = program(tmp_path, any_url, "await asyncio.sleep(60)")
    until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    process.send_signal(signal.SIGSTOP)
    assert process.wait(20) == -signal.SIGKILL

    async def next_one() -> int:
        async with botlease.active("b", database=any_url, ttl=1.5) as term:
            return term.number

    assert asyncio.run(next_one()) == 2


def test_sigterm_ends_the_body_and_releases(tmp_path: Path, sqlite_url: str) -> None:
    process = program(
        tmp_path,
        sqlite_url,
        "\n".join(
            ["try:", "    " * 5 + "await asyncio.sleep(60)", "    " * 4 + "finally: print('cleaned', flush=True)"]
        ),
    )
    until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1  # LeaseLost, as the program did not catch it


async def test_cancelling_an_exclusive_function_gives_the_lease_back(sqlite_url: str) -> None:
    begun = asyncio.Event()

    @botlease.exclusive("b", database=sqlite_url, ttl=20.0)
    async def main(term: botlease.Term) -> None:
        begun.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(main())
    await asyncio.wait_for(begun.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5), botlease.active("b", database=sqlite_url, ttl=20.0) as term:
        assert term.number == 2


async def test_a_stop_signal_reaches_every_instance_of_the_program(sqlite_url: str) -> None:
    async with botlease.active("inner", database=sqlite_url, ttl=2.0):
        pass
    with pytest.raises(botlease.LeaseLost, match="stopped"):
        async with botlease.active("outer", database=sqlite_url, ttl=2.0):
            async with botlease.active("inner", database=sqlite_url, ttl=2.0):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(10)


def test_fences_give_their_kernel_timers_back() -> None:
    from botlease.work.fence import Fence

    for _ in range(2000):
        Fence().close()
    limit = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    assert Fence().kernel or limit[0] == 0


@pytest.mark.parametrize("way", ["active", "exclusive"])
async def test_whoever_tries_until_the_database_is_there_leaves_nothing_of_each_try(tmp_path: Path, way: str) -> None:
    (tmp_path / "lease.db").write_bytes(b"this is no database" * 100)
    url = f"sqlite:///{tmp_path}/lease.db"

    async def once() -> None:
        with pytest.raises(StoreError):
            if way == "active":
                async with botlease.active("b", database=url):
                    pass
            else:

                async def never(term: botlease.Term) -> None:
                    raise AssertionError

                await botlease.exclusive("b", database=url)(never)()

    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), Path("/proc/self/timers").read_text().count("ID:")

    await once()
    before = left()
    for _ in range(5):
        await once()
    # A thread of the first try, or of the test before, may have been on its way out then.
    until(lambda: all(now <= then for now, then in zip(left(), before, strict=True)))


def test_the_check_is_cheap_enough_for_every_order() -> None:
    from botlease.inside import Term

    class Work:
        until = 1e12

    term = Term(1, "b", "i", Work())  # type: ignore[arg-type]
    began = time.perf_counter()
    for _ in range(20_000):
        term.check()
    each = (time.perf_counter() - began) / 20_000
    began = time.perf_counter()
    for _ in range(20_000):
        sum((1, 2, 3))
    assert each < 100 * (time.perf_counter() - began) / 20_000  # no system call that waits, no I/O


async def test_an_error_in_on_danger_does_not_end_the_renewals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[bool] = []

    def warn(on: bool) -> None:
        heard.append(on)
        raise RuntimeError("a bug in the user's callback")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    url = f"sqlite:///{tmp_path}/lease.db"
    async with botlease.active("bot", database=url, ttl=6.0, on_danger=warn) as term:
        assert not term.in_danger
        other = sqlite3.connect(tmp_path / "lease.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        async with asyncio.timeout(10):
            while heard != [True]:
                await asyncio.sleep(0.01)
        assert term.in_danger
        other.execute("ROLLBACK")
        other.close()
        async with asyncio.timeout(10):
            while heard != [True, False]:
                await asyncio.sleep(0.01)
        assert not term.in_danger
        term.check()


@pytest.mark.parametrize("end", ["stop", "newer"])
async def test_a_program_finishes_what_it_has_from_the_gateway_before_it_is_cancelled(any_url: str, end: str) -> None:
    simulator = await Simulator.start()
    chat, token = simulator.user(77777), "77777:AA-a-token-of-a-test-0123456789"
    taken = asyncio.Event()

    async def bot(url: str) -> None:
        offset = 0
        async with aiohttp.ClientSession() as http:
            while True:
                call = f"{url}/bot{token}"
                async with http.post(f"{call}/getUpdates", json={"offset": offset, "timeout": 20}) as r:
                    updates = (await r.json())["result"]
                for update in updates:
                    taken.set()
                    await asyncio.sleep(0.5)
                    message = update["message"]
                    reply = {
                        "chat_id": message["chat"]["id"],
                        "text": "x",
                        "reply_to_message_id": message["message_id"],
                    }
                    await (await http.post(f"{call}/sendMessage", json=reply)).read()
                    offset = update["update_id"] + 1

    async def instance(deployment: str) -> None:
        with contextlib.suppress(botlease.LeaseLost):
            async with (
                botlease.active("77777", database=any_url, deployment=deployment) as term,
                botlease.gateway(term, bot_api=simulator.url) as url,
            ):
                assert address(None) == url and "BOTLEASE_API_URL" not in os.environ
                await bot(url)
        assert served.get() == ""

    first = asyncio.ensure_future(instance("v1"))
    message = chat.say("in hand")
    await asyncio.wait_for(taken.wait(), 10)
    late = chat.say("late")
    second = asyncio.ensure_future(instance("v2")) if end == "newer" else None
    if second is None:
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(first, 15)
    assert len(message.replies) == 1
    if second is not None:
        while not late.replies:
            await asyncio.sleep(0.01)
        assert len(message.replies) == len(late.replies) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(second, 15)
    assert simulator.report(77777).conflicts == 0
    await simulator.stop()
