"""The supervisor's side of the reaper: what it says to it, and when. The test listens in the reaper's place."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import World, clean_env, until

from botlease import clock
from botlease.model import Reason, Timing
from botlease.work import reaper, tree
from botlease.work.child import ChildWork, Command, fence_ahead

TIMING = Timing.for_ttl(30)
"""With seconds to spare, so that a machine which stands still for a moment changes nothing here."""


class Heard:
    def __init__(self, timing: Timing) -> None:
        ours, self.sock = socket.socketpair()
        self.inbox = reaper.Inbox(self.sock)
        self.sock.setblocking(False)
        command = Command(("bot",), {"TOKEN": "t"}, "b", "b-1", fence_ahead=fence_ahead(timing), back_off=30.0)
        self.work = ChildWork(command, os.getpid(), ours, lambda text: None)

    def all(self) -> list[dict[str, Any]]:
        return self.inbox.receive() or []

    def fences(self) -> list[float]:
        return [m["until"] for m in self.all() if m["do"] == "arm"]

    async def says(self, **message: Any) -> None:
        reaper.send(self.sock, message)
        await asyncio.sleep(0)  # the loop polls once, and hears it
        await asyncio.sleep(0)


@contextmanager
def standing_by(timing: Timing = TIMING) -> Iterator[Heard]:
    heard = Heard(timing)
    try:
        yield heard
    finally:
        heard.work._loop.remove_reader(heard.work._sock)
        heard.work._sock.close()
        heard.sock.close()
        tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 0)  # it had made the process of the tests one


@contextmanager
def at_work(timing: Timing = TIMING) -> Iterator[tuple[Heard, float]]:
    with standing_by(timing) as heard:
        began = clock.now()
        heard.work.start(1, "n", began + timing.trust, None)
        heard.work.pid = 1  # as if the reaper had said so
        heard.all()
        yield heard, began


async def test_what_the_bot_is_is_said_ahead_and_its_term_with_the_order() -> None:
    with standing_by() as heard:
        (brief,) = heard.all()
        assert (brief["do"], brief["argv"]) == ("prepare", ["bot"])
        assert brief["env"] == {"TOKEN": "t", "BOTLEASE_BOT": "b", "BOTLEASE_INSTANCE_ID": "b-1"}
        heard.work.start(7, "n", clock.now() + 20, None)
        (order,) = heard.all()
        assert (order["do"], order["env"]) == ("start", {"BOTLEASE_TERM": "7"})


async def test_the_reaper_is_woken_for_every_second_renewal() -> None:
    with at_work() as (heard, now):
        # Times are those of the renewals to come: what counts is how far ahead of now the fence stands.
        trust, every = TIMING.trust, TIMING.renew_every
        told = []
        for n in range(1, 7):
            heard.work._fenced -= every  # as the time passes
            heard.work.arm(now + trust)
            told += [n for _ in heard.fences()]
        assert told == [2, 4, 6]


async def test_where_there_is_no_time_to_spare_it_is_woken_for_each() -> None:
    timing = Timing.for_ttl(3)
    with at_work(timing) as (heard, now):
        for _ in range(3):
            heard.work._fenced -= timing.renew_every
            heard.work.arm(now + timing.trust)
            assert heard.fences() == [now + timing.trust]


async def test_a_drain_gives_the_work_all_that_is_left_of_the_trust() -> None:
    with at_work() as (heard, now):
        heard.work._fenced -= TIMING.renew_every
        heard.work.arm(now + TIMING.trust + 0.01)
        assert heard.fences() == []
        heard.work.drain(now + 40, Reason.SILENT)
        first, second = heard.all()
        assert (first["do"], first["until"]) == ("arm", now + TIMING.trust + 0.01)
        assert second["do"] == "signal"
        heard.work.arm(now + TIMING.trust + 0.02)  # and every renewal counts from here on
        assert heard.fences() == [now + TIMING.trust + 0.02]


async def test_after_a_crash_the_fence_is_where_the_trust_ends() -> None:
    """Until the restart only the side-car lock hangs on it, and the restart is trusted for as long."""
    with at_work() as (heard, now):
        heard.work._fenced -= TIMING.renew_every
        heard.work.arm(now + TIMING.trust + 0.01)
        assert heard.fences() == []
        await heard.says(say="gone", status=1, guarded=True)
        assert heard.fences() == [now + TIMING.trust + 0.01]
        heard.work.arm(now + TIMING.trust + 0.02)
        assert heard.fences() == [now + TIMING.trust + 0.02]


def test_a_bot_whose_renewals_fail_has_all_of_the_trust_to_stop_in(sqlite_world: World) -> None:
    """The one before the last renewal is the last that the reaper was woken for: 6.9 s after the last one its fence
    would stand, 0.9 s after the drain has begun."""
    world = sqlite_world
    run = world.run("--deployment", "v1", ttl="10", bot=world.bot(slow=1.8))
    world.works()
    with closing(sqlite3.connect(world.url.removeprefix("sqlite:///"), timeout=10)) as db:
        until(lambda: db.execute("SELECT beat FROM bot_leases").fetchone()[0] > 0)
        db.execute("BEGIN EXCLUSIVE")
        run.says("no renewal was confirmed in time")
        drained = clock.now()
        pid = max(pid for pid, _ in world.stamps())
        until(lambda: not Path(f"/proc/{pid}").exists())
    assert max(last for _, last in world.stamps().values()) > drained + 1.5
    assert world.overlap() == 0


@pytest.mark.parametrize("ttl", [1.0, 3.0, 8.71, 10.0, 30.0, 3600.0])
@pytest.mark.parametrize("attempt", [0.01, 0.1, 0.5, 1.0])
def test_the_fence_that_is_left_where_it_is_stands_behind_the_drain(ttl: float, attempt: float) -> None:
    """Whatever the timing: the reaper kills a little before the fence, and must have been told of the drain by then."""
    scaled = Timing.for_ttl(ttl)
    timing = replace(scaled, attempt=scaled.attempt * attempt)
    assert fence_ahead(timing) - reaper.EARLY >= timing.drain_after + 0.25


def test_garbage_is_collected_again_when_all_is_loaded(tmp_path: Path) -> None:
    """It is off while modules are loaded. A supervisor runs for months; one that is barred as well."""
    spy = (
        "import gc, asyncio\n"
        "from botlease import run\n"
        "was, wait = run.Supervisor._keep, asyncio.Event.wait\n"
        "def tell(): print(gc.isenabled(), gc.get_freeze_count() > 10_000)\n"
        "async def keep(self, store, gate):\n"
        "    tell()\n"
        "    return await was(self, store, gate)\n"
        "async def barred(self):\n"
        "    tell()\n"
        "run.Supervisor._keep, asyncio.Event.wait = keep, barred\n"
        "from botlease.__main__ import main\n"
        "main('botlease')\n"
    )
    argv = [sys.executable, "-c", spy, "run", "--name", "gc", "--deployment", "v1", "--", "true"]
    env = clean_env() | {"BOTLEASE_DATABASE_URL": f"sqlite:///{tmp_path}/gc.db"}
    for more in ({}, {"BOTLEASE_ENVIRONMENT": "production", "RAILWAY_ENVIRONMENT_NAME": "pr-7"}):
        done = subprocess.run(argv, env=env | more, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == "True True\n", (more, done.stderr)
