"""``scripts/demo``: users chat without pause while version 2 is deployed beside version 1, the holder is killed
with -9 and restarted, a version 3 that is broken is rolled back by itself, and an operator's SQL moves the bot.
Beside it the same with the seed's plain design.

SQLite and the simulator by default: no account, no token, no server. With DATABASE_URL=postgresql://... the same
on PostgreSQL. Exit code 1 if something that must be zero is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from botlease import clock
from demo.seed import execute
from demo.world import BROKEN, Ours, Plain, Result, World

PAUSE_DEPLOY, PAUSE_KILL, PAUSE_RESTART, PAUSE_MOVE = 9.0, 5.0, 9.0, 9.0
TRIES, PAUSE_BROKEN = 3, 4.0  # a broken version is started so often, so long apart


class View:
    """Live lines, the two worlds in two colours."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.began = clock.now()

    def say(self, world: str, text: str) -> None:
        colour = {"botlease": "cyan", "plain": "magenta"}.get(world, "white")
        style = "bold" if not text.startswith(" ") else ""
        at = clock.now() - self.began
        self.console.print(f"[dim]{at:5.1f} s[/] [{colour}]{world:>8}[/] ", end="")
        self.console.print(text, style=style, markup=False)

    def head(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/]")

    def result(self, results: dict[str, Result]) -> None:
        table = Table(title="one minute of deployments", title_style="bold")
        table.add_column("")
        for name in results:
            table.add_column(name, justify="right")
        rows = (
            ("handovers", lambda r: r.handovers, False),
            ("overlap, ms (two at work)", lambda r: f"{r.overlap_ms:g}", True),
            ("409s that a client received", lambda r: r.conflicts, True),
            ("updates lost", lambda r: r.lost, True),
            ("updates handled twice", lambda r: r.twice, True),
            ("updates lost at kill -9 *", lambda r: r.lost_at_kill, False),
            ("updates handled twice at kill -9 *", lambda r: r.twice_at_kill, False),
            ("messages of users", lambda r: r.messages, False),
            ("silence at each event, ms", lambda r: " ".join(f"{g:.0f}" for g in r.gaps_ms), False),
        )
        for label, value, must_be_zero in rows:
            cells = []
            for r in results.values():
                text = str(value(r))
                cells.append(f"[{'green' if text == '0' else 'red'}]{text}[/]" if must_be_zero else text)
            table.add_row(label, *cells)
        self.console.print()
        self.console.print(table)
        self.console.print(
            "[dim]* in flight when it was killed (confirmed and not handled, or the reverse): no lease alone can "
            "save those.\n  Most of each silence is the bot's own stop and start.[/]"
        )


async def story(world: World) -> None:
    """The same events at the same times in each world."""
    await world.open()
    try:
        world.log("version 1 is deployed")
        old = await world.deploy("1")
        world.chat()
        await world.reply(30)
        world.log("users chat without pause")
        await asyncio.sleep(3)
        world.event("version 2 is deployed beside version 1")
        new = await world.deploy("2")
        await asyncio.sleep(PAUSE_DEPLOY)
        world.kill(new)
        await asyncio.sleep(PAUSE_KILL)
        world.event("the platform restarts version 2")
        await world.deploy("2")
        await asyncio.sleep(PAUSE_RESTART)
        world.event("version 3 is deployed, and it is broken: it dies at its start")
        broken = await world.deploy(BROKEN)
        for _ in range(TRIES - 1):
            broken = await world.restarts(broken, PAUSE_BROKEN)
        await asyncio.sleep(PAUSE_BROKEN)
        with contextlib.suppress(TimeoutError):  # on a slow machine the one that is rolled back to takes its time
            await world.reply(5)
        await world.move(old.version)
        await asyncio.sleep(PAUSE_MOVE)
        world.hush()
        await asyncio.sleep(1.5)  # what was asked last is answered
        world.log("end")
    finally:
        await world.close()


async def main() -> int:
    view = View()
    url = os.environ.get("DATABASE_URL", "")
    with tempfile.TemporaryDirectory(prefix="botlease-demo-") as name:
        folder = Path(name)
        ours_url, plain_url = (url, url) if url else (f"sqlite:///{name}/demo.db", f"sqlite:///{name}/seed.db")
        if url and not url.startswith(("postgres://", "postgresql://")):
            print("demo: DATABASE_URL must be postgresql://..., or unset for SQLite", file=sys.stderr)
            return 78
        view.head(f"A trading bot is redeployed, killed and moved, on {'PostgreSQL' if url else 'SQLite'}")
        ident = random.SystemRandom().randint(10**8, 10**9)
        ours = Ours("botlease", folder, ours_url, ident, view.say)
        plain = Plain("plain", folder, plain_url, ident + 1, view.say)
        await give_plain_a_term(folder, plain.bot_id)
        await asyncio.gather(story(ours), story(plain))
        result = ours.result()
        view.result({"botlease": result, "the seed's plain design": plain.result()})
    print(
        f"demo: handovers={result.handovers} overlap_ms={result.overlap_ms:g} conflicts={result.conflicts} "
        f"lost={result.lost} twice={result.twice} lost_at_kill={result.lost_at_kill} "
        f"gap_ms_median={result.gap_ms_median:.0f}"
    )
    return 0 if result.clean and result.handovers >= 3 else 1


async def give_plain_a_term(folder: Path, bot_id: int) -> None:
    """The trading bot's ledger wants to see a term. The plain design has none: it gets one, valid for ever."""
    await execute(
        f"sqlite:///{folder}/plain.db",
        "CREATE TABLE bot_leases (bot TEXT, term INTEGER, holder TEXT)",
        f"INSERT INTO bot_leases VALUES ('{bot_id}', 0, 'everybody')",
    )


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
