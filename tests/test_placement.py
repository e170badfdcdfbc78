"""Who runs what, and what a member does about it: properties of pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from botlease.model import LEAVING, UNPLACED
from botlease.placement import Plan, choose, place, plan

BOTS = [f"bot{n}" for n in range(300)]
slots = st.sets(st.integers(1, 40), min_size=1, max_size=8)


@settings(deadline=None)  # a busy machine
@given(slots, st.integers(41, 50))
def test_a_slot_that_comes_or_goes_moves_only_its_own_bots(before: set[int], new: int) -> None:
    a, b = sorted(before), sorted(before | {new})
    for bot in BOTS:
        assert place(bot, b) in (new, place(bot, a))


@settings(max_examples=20, deadline=None)
@given(slots)
def test_every_slot_gets_its_share(numbers: set[int]) -> None:
    bots = [f"b{n}" for n in range(4000)]
    share = 4000 / len(numbers)
    counts = dict.fromkeys(numbers, 0)
    for bot in bots:
        counts[place(bot, sorted(numbers))] += 1
    # Six standard deviations of a fair draw. It was four: of the sets that are drawn here one was found beyond that.
    assert all(abs(c - share) < 6 * share**0.5 + 1 for c in counts.values())


def test_a_placement_never_changes_between_versions() -> None:
    """A member of the next release must agree with one of this, or bots go to and fro between them."""
    assert [place(b, [1, 2, 3]) for b in BOTS[:12]] == [1, 1, 2, 1, 3, 3, 2, 3, 1, 3, 2, 2]


@dataclass
class Row:
    bot: str
    slot: int
    paused: bool = False
    term: int = 1
    ours: bool = False


rows = st.lists(
    st.builds(
        Row,
        st.sampled_from(BOTS[:20]),
        st.sampled_from([LEAVING, UNPLACED, 1, 2, 3, 9]),
        st.booleans(),
        st.integers(1, 3),
        st.booleans(),
    ),
    unique_by=lambda r: r.bot,
    max_size=12,
)
running = st.dictionaries(st.sampled_from(BOTS[:20]), st.integers(1, 3), max_size=8)


@settings(deadline=None)
@given(rows, running, st.integers(0, 4), st.booleans())
def test_a_plan_starts_what_belongs_here_and_keeps_nothing_that_does_not(
    seen: list[Row], run: dict[str, int], room: int, calm: bool
) -> None:
    p = plan(1, [1, 2, 3], seen, run, room=room, calm=calm)
    by_bot = {r.bot: r for r in seen}
    starts = {bot for bot, _, _ in p.take}

    assert all(place(bot, [1, 2, 3]) == 1 and bot not in run for bot in starts)
    assert all((r := by_bot[bot]).term == term and r.slot == slot and not r.paused for bot, term, slot in p.take)
    assert all(by_bot[bot].slot != LEAVING for bot in starts)
    # one thing is done with each bot
    done = [*starts, *p.stop, *p.lost, *(b for b, _, _ in p.move), *(b for b, _, _ in p.give), *p.clear]
    assert len(done) == len(set(done))
    # what we cannot see as ours any more is stopped, whatever the plan
    for bot, term in run.items():
        if bot not in by_bot or by_bot[bot].term != term or not by_bot[bot].ours:
            assert bot in p.lost
        elif by_bot[bot].paused or by_bot[bot].slot != 1:
            assert bot in p.stop
    # only so many are on the move, and none while slots are still coming
    moving = [bot for bot, to in p.stop.items() if to != 1]
    assert len(moving) <= (room if calm else 0)
    # what we hold without running it does not stay so
    for r in seen:
        if r.ours and r.bot not in run:
            assert r.bot in starts or r.bot in {b for b, _, _ in p.give} or not calm or place(r.bot, [1, 2, 3]) == 1


def test_a_bot_without_a_slot_is_taken_by_the_one_that_should_have_it_when_all_have_come() -> None:
    mine = next(b for b in BOTS if place(b, [1, 2]) == 1)
    other = next(b for b in BOTS if place(b, [1, 2]) == 2)
    seen = [Row(mine, UNPLACED), Row(other, UNPLACED), Row(BOTS[99], 7)]
    p = plan(1, [1, 2], seen[:2], {}, room=9, calm=True)
    assert p.take == [(mine, 1, UNPLACED)] and p.move == []
    assert plan(1, [1, 2], seen[:2], {}, room=9, calm=False) == Plan()


@dataclass
class Seen:
    number: int
    held: bool = True
    generation: int = 1
    yields: bool = True
    assigned: str | None = "i"
    ended: bool = False
    is_open: bool = True


def test_a_process_applies_for_the_slot_of_an_older_deployment_then_for_one_that_was_left_then_for_a_new_one() -> None:
    old, left, same = Seen(1), Seen(2, held=False, generation=0, ended=True), Seen(3, generation=2)
    assert choose([old, left, same], 2, "me") == 1
    assert choose([old, left, same], 2, "me", newer=False) == 2
    assert choose([left, same], 2, "me") == 2
    assert (choose([same], 2, "me") or 0) > 3
    assert choose([same], 1, "me") is None  # a newer deployment may not want more
    assert choose([], 1, "me") in (1, 2, 3, 4)
    chosen = Seen(1, yields=False)  # to this slot the older one came after us
    assert (choose([chosen, same], 2, "me") or 0) > 3
    assert (choose([same], 1, "me", newer=False) or 0) > 3  # each process is a deployment of its own


def test_where_all_were_deactivated_by_hand_a_process_applies_for_one_of_them_and_waits() -> None:
    off = [Seen(1, held=False, assigned=None), Seen(2, assigned=None)]  # the second is about to release
    assert choose(off, 1, "me") in (1, 2)
    assert (choose([*off, Seen(3)], 1, "me") or 0) > 3


def test_processes_that_start_together_do_not_all_choose_the_same_slot() -> None:
    free = [Seen(n, held=False, ended=True) for n in range(1, 5)]
    assert len({choose(free, 1, f"process-{n}") for n in range(40)}) == 4
