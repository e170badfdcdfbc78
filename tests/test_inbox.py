"""The gateway's inbox, on both stores."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from botlease.stores import StoreError, open_store
from botlease.stores.inbox import Changes, Holding, Inbox, Update, open_inbox
from botlease.testing import DEADLINE

API = "123456"
FIRST, SECOND = Holding("bot", 1, "n1"), Holding("bot", 2, "n2")


@pytest.fixture
async def inboxes(any_url: str) -> AsyncIterator[tuple[Inbox, Inbox]]:
    """Two processes' on one database."""
    store = open_store(any_url)
    await store.open(DEADLINE)
    await store.aclose()
    both = open_inbox(any_url), open_inbox(any_url)
    yield both
    for inbox in both:
        await inbox.aclose()


def updates(*ids: int, tries: int = 0) -> list[Update]:
    return [Update(i, f'{{"update_id":{i}}}', tries) for i in ids]


async def save(inbox: Inbox, me: Holding, **changes: Any) -> bool:
    return await inbox.save(me, API, Changes(**changes), DEADLINE)


async def test_what_a_term_received_and_did_not_finish_is_found_by_the_next(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    begun = await a.begin(FIRST, API, DEADLINE)
    assert begun is not None and begun.updates == [] and begun.offset == 0 and not begun.unfinished
    assert await save(a, FIRST, received=updates(7, 8, 9), offset=10, allowed='["message"]', asked=10)
    assert await save(a, FIRST, given=[7, 8], offset=10, confirmed=7)
    assert await save(a, FIRST, done=[7], offset=10, confirmed=7, polling=False, asked=9)

    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None
    assert [(u.update_id, u.tries) for u in found.updates] == [(8, 1), (9, 0)]
    assert (found.offset, found.allowed, found.unfinished, found.asked, found.done) == (
        10,
        '["message"]',
        False,
        9,
        [7],
    )


async def test_what_was_not_handed_out_after_all_is_not_counted(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1, 2, tries=1), offset=3)
    await save(a, FIRST, returned=[2], offset=3)
    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None and [(u.update_id, u.tries) for u in found.updates] == [(1, 1), (2, 0)]


async def test_a_term_that_ended_without_a_word_may_have_left_a_poll_behind(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, offset=10)
    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None and found.unfinished


async def test_nothing_of_a_stale_term_gets_in(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1), offset=2)
    await b.begin(SECOND, API, DEADLINE)
    assert not await save(a, FIRST, received=updates(2, 3), done=[1], offset=4)
    assert await a.begin(FIRST, API, DEADLINE) is None
    assert not await save(b, Holding("bot", 2, "another nonce"), received=updates(4), offset=5)

    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None and [u.update_id for u in found.updates] == [1] and found.offset == 2


async def test_what_is_done_is_kept_until_the_bot_api_has_heard_of_it(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1, 2, 3), offset=4)
    await save(a, FIRST, done=[1, 2, 3], offset=4, confirmed=3)
    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None and found.updates == [] and found.done == [3]
    await save(b, SECOND, offset=4, confirmed=4)
    later = await a.begin(Holding("bot", 3, "n3"), API, DEADLINE)
    assert later is not None and later.done == []


async def test_an_update_that_comes_twice_is_kept_once(inboxes: tuple[Inbox, Inbox]) -> None:
    a, b = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1, tries=1), offset=2)
    await save(a, FIRST, received=updates(1, 2), offset=3)
    found = await b.begin(SECOND, API, DEADLINE)
    assert found is not None and [(u.update_id, u.tries) for u in found.updates] == [(1, 1), (2, 0)]


async def test_two_tokens_of_a_bot_have_nothing_to_do_with_each_other(inboxes: tuple[Inbox, Inbox]) -> None:
    a, _ = inboxes
    for api in ("1", "2"):
        await a.begin(FIRST, api, DEADLINE)
        assert await a.save(FIRST, api, Changes(received=updates(int(api)), offset=9), DEADLINE)
    found = await a.begin(SECOND, "2", DEADLINE)
    assert found is not None and [u.update_id for u in found.updates] == [2]


async def test_what_is_older_than_a_day_is_forgotten_and_counted(inboxes: tuple[Inbox, Inbox], any_url: str) -> None:
    a, _ = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1, 2), offset=3)
    await run(any_url, "UPDATE bot_updates SET received_at = '2020-01-01 00:00:00' WHERE update_id = 1")
    found = await a.begin(SECOND, API, DEADLINE)
    assert found is not None and [u.update_id for u in found.updates] == [2]
    assert (await polls(any_url))[0]["set_aside"] == 1


async def test_the_status_of_a_database_shows_the_polls(inboxes: tuple[Inbox, Inbox], any_url: str) -> None:
    a, _ = inboxes
    await a.begin(FIRST, API, DEADLINE)
    await save(a, FIRST, received=updates(1, 2), offset=3, conflicts=1, repeated=2, webhook="example.org", polled=True)
    (row,) = await polls(any_url)
    assert (row["waiting"], row["conflicts"], row["repeated"], row["webhook"]) == (2, 1, 2, "example.org")
    assert row["polled_at"] and row["conflict_at"] and row["polling"]


async def test_a_file_that_was_deleted_is_noticed(tmp_path: Path) -> None:
    inbox = open_inbox(f"sqlite:///{tmp_path}/lease.db")
    await inbox.begin(FIRST, API, DEADLINE)
    (tmp_path / "lease.db-updates").unlink()
    with pytest.raises(StoreError, match="replaced or deleted"):
        await save(inbox, FIRST, received=updates(1), offset=2)
    assert not await save(inbox, FIRST, received=updates(1), offset=2)  # a new file: that term has not begun there
    await inbox.aclose()


async def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    inbox = open_inbox(f"sqlite:///{tmp_path}/lease.db")
    await inbox.begin(FIRST, API, DEADLINE)
    for file in tmp_path.glob("lease.db-updates*"):
        assert file.stat().st_mode & 0o077 == 0, file
    await inbox.aclose()


async def polls(url: str) -> list[dict[str, Any]]:
    store = open_store(url)
    await store.open(DEADLINE)
    try:
        found: list[dict[str, Any]] = (await store.overview(DEADLINE))["polls"]
        return found
    finally:
        await store.aclose()


async def run(url: str, sql: str) -> None:
    if url.startswith("sqlite"):
        db = sqlite3.connect(url.removeprefix("sqlite:///") + "-updates")
        db.execute(sql)
        db.commit()
        db.close()
    else:
        import asyncpg

        connection = await asyncpg.connect(url)
        await connection.execute(sql)
        await connection.close()


async def test_a_lease_file_that_was_lost_and_made_anew_does_not_shut_its_terms_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/lease.db"
    for n, terms in ((1, (7,)), (2, (1, 2))):
        store = open_store(url)
        await store.open(DEADLINE)
        await store.aclose()
        inbox = open_inbox(url)
        for term in terms:
            begun = await inbox.begin(Holding("bot", term, f"n{n}{term}"), API, DEADLINE)
            assert begun is not None
        assert await inbox.begin(Holding("bot", terms[-1] - 1, "late"), API, DEADLINE) is None
        await inbox.aclose()
        (tmp_path / "lease.db").unlink()


async def test_a_holder_of_a_lease_file_that_was_replaced_is_shut_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/lease.db"
    inboxes = []
    for term in (7, 1):
        store = open_store(url)
        await store.open(DEADLINE)
        await store.aclose()
        inboxes.append(open_inbox(url))
        assert await inboxes[-1].begin(Holding("bot", term, f"n{term}"), API, DEADLINE) is not None
        if term == 7:
            (tmp_path / "lease.db").rename(tmp_path / "away")
    old, new = inboxes
    stale = Holding("bot", 7, "n7")
    assert not await save(old, stale, received=updates(1), offset=2)
    assert await old.begin(stale, API, DEADLINE) is None
    assert await save(new, Holding("bot", 1, "n1"), received=updates(1), offset=2)
    for inbox in inboxes:
        await inbox.aclose()
