"""getUpdates of one token, owned: one poll upstream at a time, whoever asks for how many downstream.

* A poll is only started if it must be over before the end of trust. So nobody finds a poll of a dead holder.
* On a drain the last one returns; it is never broken off, and no confirming call follows. The Bot API does not notice
  that a client hung up: such a poll lives on until its time-out.
* Polls are short (:data:`POLL`): a handover waits for the last one, and whoever follows a holder that was killed waits
  so long before its first one.
* What came is stored before it is handed out, and handed out before the Bot API is told (by the next offset) that it
  can forget it.
* A poll with the offset of the one before would be held for 3 s whatever its time-out says (Client.cpp 15714), longer
  than the lease may last. So every other one asks with an offset lower by one, which confirms and evicts nothing.
* A 409 although we hold the lease means that somebody outside of this database polls: named, never fought.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from botlease import clock, http
from botlease.stores.inbox import Begun, Changes, Inbox, Update
from botlease.telegram.arguments import integer
from botlease.telegram.desk import TRIES, Desk, Poll
from botlease.telegram.term import Bell, Term
from botlease.telegram.upstream import CONNECT, Fenced, Unreachable, Upstream
from botlease.telegram.writer import Writer
from botlease.text import redact

POLL: Final = 2.0
"""Seconds a poll is held. What it costs: half a request a second when nobody writes."""
MARGIN: Final = 0.3
"""Seconds between the latest end of a poll and the end of trust, for its way there; the successor waits for at least
kill_budget and lock_delay more."""
PROMOTED: Final = 3.1
"""Seconds for which a poll may be held that has the offset of the one before it, begun within 3 s."""
SLOW: Final = 5.0
"""Seconds for the way of a poll and its answer, beyond the time for which it is held."""
ALONE: Final = 15.0
"""Seconds for which an update that may end the bot is in hand alone: one that does so does it sooner, and a handler
that takes half an hour must not keep everybody else waiting."""
STUCK: Final = 300.0
"""Seconds without an acknowledgement after which a program with its hands full is not waited for."""
EMPTY: Final = b'{"ok":true,"result":[]}'
BACKLOG: Final = 1000
BACKLOG_BYTES: Final = 16 * 1024 * 1024
"""With so many updates at hand nothing is fetched: they wait at the Bot API, which keeps 100,000 for a day."""
QUIET: Final = 90.0
"""Seconds after its last poll for which a program counts as one that polls. (The Bot API holds one for 50 at most.)"""
LONGEST_POLL: Final = 50.0
RECHECK: Final = 60.0
"""Seconds until a webhook that is set, or a token that was refused, is looked at again."""
CONFLICT_PAUSES: Final = (3.2, 30.0, 60.0, 120.0, 300.0)
"""After a 409. The first may be a packet that was late; the Bot API delays every further one within 3 s."""


@dataclass(slots=True)
class Tally:
    """What there is to say about one token."""

    deaf: float = 0.0  # seconds since the last getUpdates that succeeded, both upstream and of the program
    waiting: int = 0
    in_hand: int = 0
    repeated: int = 0
    set_aside: int = 0
    conflicts: int = 0
    webhook: str = ""


class Poller:
    def __init__(
        self,
        token: str,
        term: Term,
        upstream: Upstream,
        inbox: Inbox,
        say: Callable[[str], None],
        *,
        delete_webhook: bool = False,
    ) -> None:
        self.api = token.split(":")[0] + ("-test" if token.endswith("/test") else "")
        self.desk = Desk()
        self.tally = Tally()
        self.signalled = False  # the program has been told to stop
        self._doubtful: list[int] = []  # confirmed since then
        self._token = token
        self._term = term
        self._upstream = upstream
        self._say = say
        self._delete_webhook = delete_webhook
        self._refused: tuple[int, bytes] | None = None
        self._offset = 0
        self._confirmed = 0
        self._low = False  # the next poll asks with the lower offset
        self._asked = (-1, -1e9)  # the offset of the last poll, and when it began
        self._held_until = 0.0  # a poll that was not answered may be held by the Bot API until then
        self._recent: set[int] = set()  # done, and perhaps to be had once more
        self._allowed: str | None = None
        self._marked: set[int] = set()  # counted as handed out in this process
        self._polling = True
        self._writer = Writer(self.api, term, inbox, say, self._fill_in)
        self._strikes, self._struck_at = 0, -1e9  # 409s
        self._trouble, self._back_off = "", 1.0
        self._polls = 0  # of the program
        self._failures = 0
        self._negative = False
        self._handed_at = self._done_at = clock.now()
        self._heard_at = self._polled_at = clock.now()
        self._stopping = False
        self.proved = False  # the Bot API takes the token for one
        self._loaded = False
        self._news = Bell()
        self._task = asyncio.ensure_future(self._run())

    # Downstream --------------------------------------------------------------------------------------------------

    async def get_updates(
        self, args: dict[str, Any], request: http.Request, acknowledges: bool, limit: int = 100
    ) -> tuple[int, bytes]:
        """Answer a poll of the program: status and body. Waits as long as it asks for."""
        offset = integer(args.get("offset"), 0)
        timeout = min(max(integer(args.get("timeout"), 0), 0), LONGEST_POLL)
        limit = min(max(integer(args.get("limit"), 100), 1), limit)
        self._state_allowed(args.get("allowed_updates"))
        end = clock.now() + timeout
        poll = Poll(offset, limit, acknowledges, request.connection, request.closed)
        left = asyncio.ensure_future(request.gone.wait())
        arrived = False
        try:
            if offset < 0:
                # It would forget everything but the last ones: what came while nobody polled, at every deployment.
                poll.offset, first, self._negative = 0, not self._negative, True
                if first:  # a bot that goes on asking like that is served
                    self._say(f"the bot asks for offset {offset}, to drop what is pending: nothing was dropped")
                    return 200, EMPTY
            self._polls += 1
            self._polled_at = clock.now()
            if not await self._until(lambda: self._loaded or self._refused is not None, end, left):
                return 200, EMPTY
            if not self._loaded:
                assert self._refused is not None
                return self._refused
            self._passed(self.desk.enter(poll))
            self._news.ring()
            try:
                await self._until(lambda: self._refused is not None or self._has(poll), end, left)
                if self._refused is not None:
                    return self._refused
                updates = [] if request.gone.is_set() else self.desk.take(poll)
                if updates:
                    self._handed_at = clock.now()
                    await self._hand_out(updates)
                arrived = not request.gone.is_set()
            finally:
                self.desk.leave(poll, arrived=arrived)
                self._polled_at = clock.now()
                self._news.ring()
            return 200, b'{"ok":true,"result":[' + ",".join(u.payload for u in updates).encode() + b"]}"
        finally:
            left.cancel()

    def _passed(self, done: list[int]) -> None:
        if self.signalled:
            self._doubtful += done
        else:
            self._finish(done)

    def _has(self, poll: Poll) -> bool:
        """The oldest poll is served first."""
        if clock.now() > max(self._handed_at, self._done_at) + ALONE:
            self.desk.relent()
        return self.desk.open[0] is poll and self.desk.offers(poll)

    async def _until(self, what: Callable[[], bool], end: float, gone: asyncio.Future[Any]) -> bool:
        while True:
            news, changed = self._news.heard(), self._term.changed.heard()
            if self._term.over:
                raise Fenced
            if what():
                return True
            rest = end - clock.now()
            if rest <= 0 or gone.done():
                return False
            await asyncio.wait({news, changed, gone}, timeout=min(rest, 1.0), return_when=asyncio.FIRST_COMPLETED)

    async def _hand_out(self, updates: list[Update]) -> None:
        """Write down that they are in the program's hands, before they are."""
        new = [u for u in updates if u.update_id not in self._marked]
        self._marked |= {u.update_id for u in new}
        again = [u for u in new if u.tries > 0]
        self._writer.changes.given += [u.update_id for u in new]
        if again:
            self._writer.changes.repeated += len(again)
            self.tally.repeated += len(again)
            self._say(f"updates that were in hand when the one before ended, handed out again: {len(again)}")
        if self._writer.changes.given:
            await self._writer.save()

    def _state_allowed(self, wanted: Any) -> None:
        if isinstance(wanted, list):
            text = json.dumps(wanted)
            if text != self._allowed:
                self._allowed = self._writer.changes.allowed = text

    def acknowledge(self, ids: list[int]) -> None:
        self._finish(self.desk.acknowledge(ids))

    def _finish(self, ids: list[int]) -> None:
        if ids:
            self._done_at = clock.now()
            self._writer.changes.done += ids
            self._marked -= set(ids)
            self._recent |= set(ids)
            self._news.ring()
            self._writer.save_soon()

    def _fill_in(self, changes: Changes) -> None:
        changes.offset, changes.confirmed, changes.asked = self._offset, self._confirmed, self._asked[0]
        changes.polling, changes.webhook = self._polling, self.tally.webhook

    # Upstream ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._prove_the_token()
            if self._stopping:
                return
            await self._term.begun.wait()
            begun = await self._begin()
            self._offset, self._allowed = begun.offset, self._allowed or begun.allowed
            self._recent |= set(begun.done)
            self._low = begun.offset > 1 and begun.asked == begun.offset
            self._asked = (begun.asked, -1e9)
            self.desk.receive([u for u in begun.updates if u.tries < TRIES])
            hopeless = [u.update_id for u in begun.updates if u.tries >= TRIES]
            if hopeless:
                self._set_aside(hopeless, f"each was in hand when {TRIES} processes ended")
            self._loaded = True
            self._news.ring()
            # The poll of the one before may still be held, and by some accounts of the server would make ours fail;
            # begun within 3 s of it with its offset, ours would be held for longer than it asks for.
            free_at = self._held_until = clock.now() + PROMOTED if begun.unfinished else 0.0
            looked = False
            while not self._stopping:
                try:
                    await self._while_unwanted()
                    if not looked:
                        await self._mind_the_webhook()
                        await self._pause(free_at - clock.now())
                        looked = True
                    await self._turn()
                except Fenced:
                    if self._term.over:
                        raise
                    await self._pause(0.2)  # this process alone was stopped, and has not heard of the renewals yet
                except Exception as e:  # a bug of ours must not make a bot deaf
                    await self._failed(f"the gateway failed: {type(e).__name__}: {redact(str(e))}", 3.0)
        except Fenced:
            if not self._term.over:
                self._say("the term is over: nothing is fetched any more")

    async def _prove_the_token(self) -> None:
        """Nothing is taken from the inbox, let alone handed out, for a token that the Bot API has not taken for one:
        its digits are public, and the rest is all that tells the bot from anybody else on this machine."""
        while not self._stopping:
            try:
                status, body = await self._ask("getMe")
            except Unreachable as e:
                if self._failures:
                    await self._failed(f"the Bot API cannot be reached: {e}")
                else:
                    self._failures = 1
                    await self._pause(0.2)
                continue
            if status == 200:
                self.proved = True
                if self._trouble:
                    self._say("the Bot API answers again")
                self._trouble, self._back_off, self._failures, self._refused = "", 1.0, 0, None
                return
            await self._refusal(status, body)

    async def _refusal(self, status: int, body: bytes) -> None:
        if status in (401, 404):
            # The program should hear that its token is wrong.
            self._refused = (status, body)
            self._news.ring()
            await self._failed(f"the Bot API refuses the token of bot {self.api}: {status}", RECHECK)
            return
        try:
            parameters = json.loads(body).get("parameters")
        except (ValueError, AttributeError):
            parameters = None
        wait = parameters.get("retry_after", 0) if isinstance(parameters, dict) else 0
        await self._failed(f"the Bot API answers {status}", float(wait) if isinstance(wait, int) else 0.0)

    async def _begin(self) -> Begun:
        while True:
            try:
                return await self._writer.begin()
            except Fenced:
                raise
            except Exception as e:
                await self._failed(f"the gateway failed: {type(e).__name__}: {redact(str(e))}", 3.0)

    async def _while_unwanted(self) -> None:
        """A program that does not poll (or uses a webhook) is not polled for."""
        while not self._stopping:
            news = self._news.heard()
            if self.desk.open or (self._polls and clock.now() - self._polled_at < QUIET):
                return
            await asyncio.wait({news}, timeout=1.0)

    async def _turn(self) -> None:
        if self.desk.crowded and clock.now() > max(self._handed_at, self._done_at) + STUCK:
            self._set_aside(
                self.desk.let_go(), f"the bot has its hands full, and for {STUCK:g} s none was acknowledged"
            )
        news, changed = self._news.heard(), self._term.changed.heard()
        remaining = self._term.remaining
        full = self.desk.size >= BACKLOG or sum(len(u.payload) for u in self.desk.waiting.values()) >= BACKLOG_BYTES
        if self._stopping or full or remaining <= MARGIN:
            await asyncio.wait({news, changed}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            return
        low = self._low
        offset = self._offset - low if self._offset > 1 else int(low)
        last, began = self._asked
        if offset == last and clock.now() < began + PROMOTED:
            await self._pause(began + PROMOTED - clock.now())
            return
        seconds = 0

        def question() -> bytes:
            """Made when the connection is there: connecting may have taken a good part of the time."""
            nonlocal seconds
            seconds = int(min(POLL, self._term.remaining - MARGIN))
            if self._term.remaining <= MARGIN:
                raise Unreachable("connecting took too long")
            asked: dict[str, Any] = {"offset": offset, "timeout": seconds}
            if self._allowed is not None:
                asked["allowed_updates"] = json.loads(self._allowed)
            self._asked = (offset, clock.now())
            self._held_until = clock.now() + PROMOTED
            return json.dumps(asked).encode()

        try:
            status, body = await self._ask("getUpdates", question)
        except Unreachable as e:
            if self._failures:  # the first may be a connection that the server had closed
                await self._failed(f"the Bot API cannot be reached: {e}")
            else:
                self._failures = 1
                await self._pause(0.2)
            return
        self._held_until = 0.0
        await self._answered(status, body, offset)
        if not seconds:
            await self._pause(0.3)  # a lease too short for a poll that is held

    async def _ask(self, method: str, body: bytes | Callable[[], bytes] = b"{}") -> tuple[int, bytes]:
        """Never repeated by itself: a poll that is asked twice is held for longer."""
        headers = [(b"content-type", b"application/json"), (b"accept", b"application/json")]
        try:
            async with asyncio.timeout(CONNECT + POLL + SLOW):
                answer = await self._upstream.call("POST", f"/bot{self._token}/{method}", headers, body)
                return answer.status, await answer.read()
        except TimeoutError:
            raise Unreachable("it did not answer in time") from None

    async def _answered(self, status: int, body: bytes, confirmed: int) -> None:
        try:
            reply = json.loads(body)
        except ValueError:
            reply = {}
        if not isinstance(reply, dict):
            reply = {}
        if status == 200 and isinstance(reply.get("result"), list):
            await self._received(reply["result"], confirmed)
        elif status == 409:
            await self._conflict(str(reply.get("description", "")))
        else:
            await self._refusal(status, body)

    async def _received(self, result: list[Any], confirmed: int) -> None:
        if self._trouble:
            self._say("the Bot API answers again")
        self._trouble, self._back_off, self._failures, self._refused = "", 1.0, 0, None
        self._heard_at = clock.now()
        self._writer.changes.polled = True
        self._confirmed = confirmed
        self._low = not self._low
        if len(self._recent) > 10 * BACKLOG:
            self._recent = {i for i in self._recent if i >= confirmed}
        updates = [
            Update(u["update_id"], json.dumps(u, separators=(",", ":")))
            for u in result
            if isinstance(u, dict) and isinstance(u.get("update_id"), int)
        ]
        new = [u for u in updates if not self.desk.knows(u.update_id) and u.update_id not in self._recent]
        before = self._offset
        if updates:
            self._offset = updates[-1].update_id + 1
            self._low = False
        if new:
            # Those that somebody waits for are stored as handed out: they are, as soon as they are stored.
            soon = self.desk.wanted
            new = [replace(u, tries=int(n < soon)) for n, u in enumerate(new)]
            self._writer.changes.received += new
            try:
                await self._writer.save()
            except BaseException:
                self._offset = before  # what is not stored must not be confirmed
                raise
            self._marked |= {u.update_id for u in new if u.tries}
            self.desk.receive([replace(u, tries=0) for u in new])
            self._news.ring()
        elif clock.now() - self._writer.saved_at > 10.0:
            await self._writer.save()  # for those who look at "deaf"

    async def _conflict(self, description: str) -> None:
        if "webhook" in description.lower():
            await self._mind_the_webhook()
            return
        now = clock.now()
        if now - self._struck_at > 2 * CONFLICT_PAUSES[-1]:
            self._strikes = 0
        self._struck_at = now
        self._strikes += 1
        self._writer.changes.conflicts += 1
        self.tally.conflicts += 1
        pause = CONFLICT_PAUSES[min(self._strikes, len(CONFLICT_PAUSES)) - 1]
        if self._strikes > 1:
            self._say(
                f"somebody else polls with the token of bot {self.api}, outside of this database: we hold the lease, "
                f"and get 409. Not fighting: looking again in {pause:g} s. Stop it there, or make a second bot"
            )
        await self._writer.save()
        await self._pause(pause)

    async def _mind_the_webhook(self) -> None:
        """Where a webhook is set polling is refused. It may be another system's: it is named, and left alone."""
        while not self._stopping:
            try:
                status, body = await self._ask("getWebhookInfo")
                info = json.loads(body).get("result", {}) if status == 200 else {}
                url = str(info.get("url") or "") if isinstance(info, dict) else ""
            except (Unreachable, ValueError):
                return  # the poll itself will tell
            if not url:
                if self.tally.webhook:
                    self.tally.webhook = ""
                    self._say("the webhook is gone: polling")
                return
            host = urlsplit(url).hostname or "an address"  # the rest of it may hold a secret
            if self._delete_webhook:
                self._say(f"deleting the webhook of bot {self.api} at {host}")
                with contextlib.suppress(Unreachable):
                    status, _ = await self._ask("deleteWebhook")
                    if status == 200:
                        continue
                await self._pause(RECHECK)
                continue
            if not self.tally.webhook:
                self._say(
                    f"bot {self.api} has a webhook at {host}: the Bot API refuses polling, and it was left alone. "
                    "If nothing needs it, start with --delete-webhook"
                )
            self.tally.webhook = host
            await self._writer.save()
            await self._pause(RECHECK)

    def _set_aside(self, ids: list[int], why: str) -> None:
        self._writer.changes.set_aside += len(ids)
        self.tally.set_aside += len(ids)
        self._say(f"updates set aside: {len(ids)}; {why}")
        self._finish(ids)

    # Waiting -----------------------------------------------------------------------------------------------------

    async def _failed(self, what: str, wait: float = 0.0) -> None:
        self._failures += 1
        if what != self._trouble:
            self._trouble = what
            self._say(what)
        await self._pause(max(wait, self._back_off))
        self._back_off = min(self._back_off * 2, 15.0)

    async def _pause(self, seconds: float) -> None:
        end = clock.now() + seconds
        while not self._stopping and not self._term.over:
            news, changed = self._news.heard(), self._term.changed.heard()
            rest = end - clock.now()
            if rest <= 0:
                return
            await asyncio.wait({news, changed}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)

    # The end -----------------------------------------------------------------------------------------------------

    @property
    def deaf(self) -> float:
        """Seconds since the last getUpdates that succeeded, upstream and of the program."""
        polled = clock.now() if self.desk.open else self._polled_at
        return max(0.0, clock.now() - min(self._heard_at, polled))

    @property
    def counts(self) -> bool:
        """Not a token that somebody has made up or mistyped, once: it would look like a bot that is deaf for ever."""
        return self.proved or bool(self.desk.open) or clock.now() - self._polled_at < LONGEST_POLL

    def report(self) -> Tally:
        waiting, in_hand = len(self.desk.waiting), len(self.desk.given)
        return replace(self.tally, deaf=round(self.deaf, 1), waiting=waiting, in_hand=in_hand)

    def stop(self) -> None:
        """Start no poll and hand nothing out any more."""
        self._stopping = True
        self.desk.shut = True
        self._news.ring()

    async def settled(self) -> None:
        """Until nothing is in the program's hands."""
        while not self.desk.idle and not self._term.over:
            news, changed = self._news.heard(), self._term.changed.heard()
            if not self.desk.idle:
                await asyncio.wait({news, changed}, return_when=asyncio.FIRST_COMPLETED)

    async def flush(self) -> None:
        if self._loaded:
            await self._writer.flush()

    async def finish(self, clean: bool) -> None:
        """Let the last poll return, and write down that it has."""
        self.stop()
        if clean:
            self._finish(self._doubtful)
        if not self._term.begun.is_set():
            self._task.cancel()
        await asyncio.wait({self._task})
        if self._loaded:
            self._polling = clock.now() < self._held_until
            self._writer.changes.returned = [i for i in self.desk.waiting if i in self._marked]
            with contextlib.suppress(Fenced):
                await self._writer.save()

    def cancel(self) -> None:
        self._task.cancel()
        self._writer.cancel()
