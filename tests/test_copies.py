"""Two copies of one process, as a virtual machine restored twice from one snapshot makes them."""

from __future__ import annotations

import asyncio

from botlease import core
from botlease.keeper import Keeper
from botlease.model import Reason, Timing
from botlease.stores import open_store
from botlease.testing import registration
from botlease.value import replace
from botlease.work.body import BodyWork
from botlease.work.fence import Fence


class NoFence(Fence):
    """The kernel's would end the whole test run on a machine that is busy for longer than the trust."""

    def __init__(self) -> None: ...
    def arm(self, until: float) -> None: ...
    def disarm(self) -> None: ...
    def close(self) -> None: ...


async def test_of_two_copies_of_a_holder_one_goes_on_and_the_other_ends_within_its_trust(any_url: str) -> None:
    timing = Timing.for_ttl(5.0, stop_grace=1.0)
    loop = asyncio.get_running_loop()
    ended: dict[str, float] = {}

    async def keeper(name: str, begun: asyncio.Future[int]) -> Keeper:
        work = BodyWork(begun.set_result, lambda reason: cancelled(name))
        work.fence.close()
        work.fence = NoFence()
        store = open_store(any_url)
        await store.open(5.0)
        made = Keeper(store, registration("a"), core.Candidate("a"), timing, work)
        return made

    def cancelled(name: str) -> None:
        ended.setdefault(name, loop.time())
        loop.call_soon({"first": first, "second": second}[name].work.ended)  # type: ignore[attr-defined]

    begun: asyncio.Future[int] = loop.create_future()
    first = await keeper("first", begun)
    runs = [asyncio.ensure_future(first.run())]
    term = await begun
    second = await keeper("second", loop.create_future())

    second.state = replace(first.state, asking=None)  # restored: its connection is gone
    assert second.state.term is not None
    second.work.start(term, second.state.term.nonce, second.state.term.trusted_until, None)
    at = loop.time()
    runs.append(asyncio.ensure_future(second.run()))
    done, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED, timeout=10)

    assert [r.result() for r in done] == [Reason.COPIED]
    assert len(ended) == 1 and ended.popitem()[1] - at <= timing.trust
    (other,) = set(runs) - done
    survivor = first if other is runs[0] else second
    confirmed = set()
    while len(confirmed) < 3:  # it goes on: its renewals are its own
        assert survivor.state.phase is core.Phase.WORKING and survivor.state.term is not None
        confirmed.add(survivor.state.term.asked_at)
        await asyncio.sleep(0.05)
    survivor.work.ended()  # type: ignore[attr-defined]
    assert await other is Reason.WORK_ENDED
    for k in (first, second):
        k.work.close()
        await k.store.aclose()
