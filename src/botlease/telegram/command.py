"""``botlease simulator``: the simulator with users that talk to every bot that shows up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from botlease.telegram.botapi import Profile
from botlease.telegram.simulator import Simulator

TEXTS = ["/start", "/price BTC", "/price ETH", "/buy BTC 0.001", "/sell BTC 0.001", "/portfolio"]


async def serve(port: int, profile: str, users: int, every: float, seed: int, say: Callable[[str], None]) -> None:
    simulator = await Simulator.start(port, Profile(profile), seed=seed)
    say(f"the Bot API is at {simulator.url}/bot<token>/METHOD (profile {profile}); Ctrl-C ends it")
    rng = random.Random(seed)  # noqa: S311 - chat noise
    known: set[int] = set()
    last: dict[int, object] = {}
    try:
        while True:
            for bot_id in [i for i in simulator.bots if i not in known]:
                known.add(bot_id)
                say(f"bot {bot_id} has come; {users} users talk to it")
                for _ in range(users):
                    simulator.user(bot_id).chatter(TEXTS, every, rng)
            await asyncio.sleep(1)
            for bot_id in known:
                r = simulator.report(bot_id)
                line = (
                    f"bot {bot_id}: messages={r.messages} answered={r.answered} lost={r.lost} twice={r.twice} "
                    f"conflicts={r.conflicts}"
                )
                gap = f" gap_ms_max={r.gap_ms_max:.0f}"
                if last.get(bot_id) != line:
                    last[bot_id] = line
                    say(line + gap)
    finally:
        await simulator.stop()
