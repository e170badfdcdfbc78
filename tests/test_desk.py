"""Which update goes to whom, and when it is done."""

from __future__ import annotations

import pytest

from botlease.stores.inbox import Update
from botlease.telegram.desk import Desk, Poll


def desk(*ids: int) -> Desk:
    d = Desk()
    d.receive([Update(i, "{}") for i in ids])
    return d


class Connection:
    def __init__(self, closed: bool = False) -> None:
        self.is_closed = closed


ONE, TWO = Connection(), Connection()


def asked(d: Desk, offset: int = 0, limit: int = 100, acknowledges: bool = False, connection: Connection = ONE) -> Poll:
    poll = Poll(offset, limit, acknowledges, connection, lambda: connection.is_closed)
    poll.finished = d.enter(poll)  # type: ignore[attr-defined]
    return poll


def got(d: Desk, poll: Poll) -> list[int]:
    return [u.update_id for u in d.take(poll)]


def answered(d: Desk, poll: Poll) -> list[int]:
    ids = got(d, poll)
    d.leave(poll, arrived=True)
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
    d.leave(poll, arrived=False)
    assert answered(d, asked(d)) == [5, 6]


@pytest.mark.parametrize("acknowledges", [False, True])
def test_a_poller_that_asks_for_the_same_again_has_not_got_it(acknowledges: bool) -> None:
    d, gone = desk(5, 6), Connection()
    answered(d, asked(d, acknowledges=acknowledges))
    assert answered(d, asked(d, acknowledges=acknowledges)) == [5, 6]
    assert answered(d, asked(d, acknowledges=acknowledges, connection=gone)) == []  # another poller's
    ONE.is_closed = True
    try:
        assert answered(d, asked(d, acknowledges=acknowledges, connection=gone)) == [5, 6]
    finally:
        ONE.is_closed = False


def test_two_pollers_are_never_given_the_same_even_with_a_backlog() -> None:
    d = desk(5, 6, 7, 8)
    assert answered(d, asked(d, limit=1)) == [5]
    assert answered(d, asked(d, limit=1, connection=TWO)) == [6]
    # each asks for what comes after its own: of what the other one has in hand it says nothing
    later = asked(d, offset=7, limit=1, connection=TWO)
    assert later.finished == [6] and answered(d, later) == [7]  # type: ignore[attr-defined]
    assert list(d.given) == [5, 7]
    later = asked(d, offset=6, limit=1)
    assert later.finished == [5] and answered(d, later) == [8]  # type: ignore[attr-defined]


def test_a_program_with_its_hands_full_is_given_no_more() -> None:
    d = desk(*range(1, 501))
    assert len(answered(d, asked(d, acknowledges=True))) == 100
    assert len(answered(d, asked(d, offset=101, acknowledges=True))) == 100
    poll = asked(d, offset=201, acknowledges=True)
    assert not d.offers(poll)
    d.acknowledge([1, 2, 3])
    assert answered(d, poll) == [201, 202, 203]
    assert len(d.let_go()) == 200 and d.idle


def test_an_offset_that_points_nowhere_finishes_nothing() -> None:
    d = desk(5, 6)
    answered(d, asked(d))
    far = asked(d, offset=90_000)
    assert far.finished == [] and list(d.given) == [5, 6]  # type: ignore[attr-defined]


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
    d.leave(poll, arrived=True)
    assert d.wanted == 0


def test_what_two_processes_had_in_hand_when_they_ended_goes_out_alone_and_takes_nothing_with_it() -> None:
    """Five crashes, of whatever cause, threw two hundred innocent updates away."""
    d = Desk()
    d.receive([Update(5, "{}", tries=2), Update(6, "{}", tries=2), Update(7, "{}", tries=1), Update(8, "{}")])
    first = asked(d, acknowledges=True)
    assert answered(d, first) == [5] and d.full
    assert answered(d, asked(d, offset=6, acknowledges=True)) == []
    d.acknowledge([5])
    assert answered(d, asked(d, offset=6, acknowledges=True)) == [6]
    d.acknowledge([6])
    assert answered(d, asked(d, offset=7, acknowledges=True)) == [7, 8] and not d.full


def test_one_that_may_end_the_bot_waits_until_nothing_else_is_in_hand() -> None:
    d = Desk()
    d.receive([Update(5, "{}"), Update(6, "{}", tries=2), Update(7, "{}")])
    assert answered(d, asked(d, acknowledges=True)) == [5]
    assert answered(d, asked(d, offset=6, acknowledges=True)) == []
    d.acknowledge([5])
    assert answered(d, asked(d, offset=6, acknowledges=True)) == [6]


def test_what_another_poller_has_in_hand_stays_with_it_although_its_connection_is_closed() -> None:
    """Many clients close theirs after each answer: two in one program had the same update, without any crash."""
    d, once = desk(10, 11), Connection()
    assert answered(d, asked(d, limit=1)) == [10]
    assert answered(d, asked(d, limit=1, connection=once)) == [11]
    once.is_closed = True
    assert answered(d, asked(d, offset=11, connection=ONE)) == []  # it is done with 10, and 11 is none of its
    retry = asked(d, connection=TWO)  # whoever asked from 0 asks from there again: its answer did not arrive
    assert answered(d, retry) == [11]


def test_what_was_put_back_and_is_acknowledged_all_the_same_is_done() -> None:
    d = desk(5)
    poll = asked(d, acknowledges=True)
    got(d, poll)
    d.leave(poll, arrived=False)
    assert d.acknowledge([5]) == [5] and not d.waiting


def test_a_batch_is_in_the_order_of_its_ids_as_offsets_are_read() -> None:
    """A wall clock that was set back between two receipts turns the order of the rows round."""
    d = desk(11, 10)
    assert answered(d, asked(d)) == [10, 11]
    assert asked(d, offset=12).finished == [10, 11]  # type: ignore[attr-defined]


def test_who_waits_for_one_that_may_end_the_bot_and_does_not_is_served_in_the_end() -> None:
    d = Desk()
    d.receive([Update(5, "{}", tries=2), Update(6, "{}", tries=2), Update(7, "{}")])
    assert answered(d, asked(d, acknowledges=True)) == [5]
    waiting = asked(d, offset=6, acknowledges=True)
    assert got(d, waiting) == []
    d.relent()  # a handler that takes half an hour has been at it for some time
    assert got(d, waiting) == [6, 7] and not d.full
