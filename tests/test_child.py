"""The supervisor's side of the reaper: what it says to it, and when. The test listens in the reaper's place."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from harness import World, clean_env, until

from botlease import clock
from botlease.work import reaper, tree
from botlease.work.child import ChildWork, Command


class Heard:
    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        self.inbox = reaper.Inbox(self.sock)
        self.sock.setblocking(False)
        command = Command(("bot",), {"TOKEN": "t"}, "b", "b-1")
        self.work = ChildWork(command, os.getpid(), ours, lambda text: None)

    def all(self) -> list[dict[str, Any]]:
        return self.inbox.receive() or []


@contextmanager
def standing_by() -> Iterator[Heard]:
    heard = Heard()
    try:
        yield heard
    finally:
        heard.work._loop.remove_reader(heard.work._sock)
        heard.work._sock.close()
        heard.sock.close()
        tree.prctl(tree.PR_SET_CHILD_SUBREAPER, 0)  # it had made the process of the tests one


async def test_what_the_bot_is_is_said_ahead_and_its_term_with_the_order() -> None:
    with standing_by() as heard:
        (brief,) = heard.all()
        assert (brief["do"], brief["argv"]) == ("prepare", ["bot"])
        assert brief["env"] == {"TOKEN": "t", "BOTLEASE_BOT": "b", "BOTLEASE_INSTANCE_ID": "b-1"}
        heard.work.start(7, "n", clock.now() + 20, None)
        (order,) = heard.all()
        assert (order["do"], order["env"]) == ("start", {"BOTLEASE_TERM": "7"})


async def test_the_fence_is_moved_on_with_each_confirmed_renewal() -> None:
    """R2. To wake the reaper for every second one would be cheaper, and a reaper that is starved for a while would end
    a healthy bot sooner."""
    with standing_by() as heard:
        now = clock.now()
        heard.work.start(1, "n", now + 8, None)
        heard.work.pid = 1  # as if the reaper had said so
        heard.all()
        for until_then in (now + 10, now + 12, now + 14):
            heard.work.arm(until_then)
            assert [(m["do"], m["until"]) for m in heard.all()] == [("arm", until_then)]


def test_a_bot_whose_renewals_fail_has_all_of_the_trust_to_stop_in(sqlite_world: World) -> None:
    """At this ttl 2.9 s, from the drain to the end of what the last renewal gave."""
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
        assert {*done.stdout.splitlines()} == {"True True"}, (more, done.stderr)
