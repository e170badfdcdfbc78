"""Released frameworks behind the gateway: a part of ``scripts/matrix``, which has all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.matrix import BOTS, FRAMEWORKS, Cell, Outcome, run_all

NODE = ("grammY", "Telegraf", "node-telegram-bot-api")


@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    "framework", [pytest.param(f, marks=[] if f == "python-telegram-bot" else pytest.mark.long) for f in FRAMEWORKS]
)
async def test_an_unmodified_framework_loses_nothing_and_sees_no_conflict(framework: str) -> None:
    if framework in NODE and not (BOTS / "node" / "node_modules").exists():
        pytest.skip("needs node and npm (scripts/test installs the frameworks)")
    cells = [
        Cell(framework, "planned deploy", "busy", "h2", True),
        Cell(framework, "SIGTERM to all", "busy", "source", True),
        Cell(framework, "SIGKILL", "busy", "h1", True),
    ]
    results = await run_all(cells, jobs=3, verbose=True)
    for cell, outcome in results.items():
        assert isinstance(outcome, Outcome), f"{cell}: {outcome}"
        assert outcome.messages > 5 and not outcome.broken(cell), f"{cell}: {outcome}"


def test_the_promise_of_a_cell_can_be_broken() -> None:
    planned, killed = (Cell("aiogram", e, "busy", "source", True) for e in ("planned deploy", "SIGKILL"))
    fine = Outcome(messages=9, conflicts=0, lost=0, twice=0, repeated=0, seconds=1.0)
    assert not fine.broken(planned) and not fine.broken(killed)
    for worse in ({"conflicts": 1}, {"lost": 1}, {"twice": 1}):
        assert Outcome(**{**_plain(fine), **worse}).broken(planned)
    counted = Outcome(**{**_plain(fine), "twice": 1, "repeated": 1})
    assert counted.broken(planned) and not counted.broken(killed)
    assert Outcome(**{**_plain(fine), "twice": 2, "repeated": 1}).broken(killed)


def _plain(outcome: Outcome) -> dict[str, int]:
    return {name: getattr(outcome, name) for name in ("messages", "conflicts", "lost", "twice", "repeated", "seconds")}
