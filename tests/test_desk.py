"""Which update goes to whom, and when it is done."""

from __future__ import annotations

from botlease.stores.inbox import Update
from botlease.telegram.desk import Desk, Poll


def desk(*ids: int) -> Desk:
    d = Desk()
    d.receive([Update(i, "{}") for i in ids])
    return d


def asked(d: Desk, offset: int = 0, limit: int = 100, since: float = 0.0, acknowledges: bool = False) -> Poll:
    poll = Poll(offset, limit, since, acknowledges)
    poll.finished = d.enter(poll)  # type: ignore[attr-defined]
    return poll


def got(d: Desk, poll: Poll) -> list[int]:
    return [u.update_id for u in d.take(poll)]


def answered(d: Desk, poll: Poll, now: float = 0.0) -> list[int]:
    ids = got(d, poll)
    d.leave(poll, now, arrived=True)
    return ids


def test_the_next_offset_says_what_is_done() -> None:
    d = desk(5, 6, 7)
    assert answered(d, asked(d, limit=2)) == [5, 6]
    assert not d.idle
    later = asked(d, offset=7)
    assert later.finished == [5, 6] and answered(d, later) == [7]  # type: ignore[attr-defined]


def test_a_framework_that_confirms_a_part_of_a_batch_gets_the_rest_again() -> None:
    d = desk(5, 6, 7)
    answered(d, asked(d))
    assert asked(d, offset=6).finished == [5]  # type: ignore[attr-defined]
    assert list(d.waiting) == [6, 7]


def test_with_acknowledgements_an_offset_finishes_nothing_and_hands_nothing_out_again() -> None:
    d = desk(5, 6)
    assert answered(d, asked(d, acknowledges=True)) == [5, 6]
    later = asked(d, offset=7, acknowledges=True)
    assert later.finished == [] and answered(d, later) == []  # type: ignore[attr-defined]
    assert d.acknowledge([6]) == [6] and not d.idle
    assert d.acknowledge([6, 5]) == [5] and d.idle


def test_an_answer_that_did_not_arrive_is_given_again() -> None:
    d = desk(5, 6)
    poll = asked(d)
    assert got(d, poll) == [5, 6]
    d.leave(poll, 0.0, arrived=False)
    assert answered(d, asked(d)) == [5, 6]


def test_a_lone_poller_that_asks_for_the_same_again_has_not_got_it() -> None:
    d = desk(5, 6)
    answered(d, asked(d, acknowledges=True))
    assert answered(d, asked(d, offset=0, acknowledges=True)) == [5, 6]


def test_two_pollers_are_never_given_the_same() -> None:
    d = desk()
    one, two = asked(d, since=0.0), asked(d, since=1.0)
    d.receive([Update(5, "{}"), Update(6, "{}")])
    assert got(d, one) == [5, 6] and got(d, two) == []
    d.leave(one, 3.0, arrived=True)
    assert d.several
    d.receive([Update(7, "{}")])
    assert answered(d, two, 4.0) == [7]
    # the second one asks for what comes after its own; what the first one has is none of its business
    again = asked(d, offset=8, since=5.0)
    assert again.finished == [7]  # type: ignore[attr-defined]
    assert asked(d, offset=0, since=5.5).finished == [] and not d.waiting  # type: ignore[attr-defined]
    assert asked(d, offset=7, since=6.0).finished == [5, 6]  # type: ignore[attr-defined]


def test_a_poller_that_hangs_up_and_asks_anew_is_one_poller() -> None:
    d = desk()
    one, again = asked(d, since=1.0), asked(d, since=1.02)
    d.leave(one, 1.03, arrived=False)
    d.receive([Update(5, "{}")])
    assert answered(d, again, 9.0) == [5] and not d.several


def test_a_program_that_remembers_its_offset_is_not_given_what_it_had() -> None:
    d = desk(5, 6, 7)
    first = asked(d, offset=7)
    assert first.finished == [5, 6] and answered(d, first) == [7]  # type: ignore[attr-defined]


def test_an_offset_far_beyond_the_queue_means_none() -> None:
    d = desk(5, 6)
    far = asked(d, offset=90_000)  # ids begin anew after a week
    assert far.finished == [] and answered(d, far) == [5, 6]  # type: ignore[attr-defined]


def test_a_desk_that_is_shut_hands_nothing_out() -> None:
    d = desk(5)
    d.shut = True
    assert answered(d, asked(d)) == [] and list(d.waiting) == [5] and d.idle


def test_ids_that_begin_anew_lower_than_before_are_handed_out() -> None:
    d = desk(900)
    answered(d, asked(d))
    asked(d, offset=901)
    d.receive([Update(5, "{}")])
    assert answered(d, d.open[0]) == [5]


def test_what_comes_while_the_open_poll_is_being_answered_is_not_wanted_yet() -> None:
    d = desk()
    assert d.wanted == 0
    poll = asked(d, limit=1)
    assert d.wanted == 1
    d.receive([Update(5, "{}")])
    assert got(d, poll) == [5] and d.wanted == 0
    d.leave(poll, 0.0, arrived=True)
    assert d.wanted == 0
