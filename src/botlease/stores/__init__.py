"""The store protocol: where the lease lives, in nine verbs, and what an operator asks of it.

A store is a class with the verbs below. What each must keep:

* every verb is atomic, and a verb that changes something is guarded on exactly what the caller saw;
* ``acquire`` gives a term above every term ever used for this bot; rows of leases are never deleted;
* ``renew`` and ``release`` touch exactly one ``(term, nonce)``, at one of the beats that are named;
* no verb outlasts ``deadline`` seconds, whatever the driver does: it raises :class:`StoreError` and
  the outcome is then unknown;
* times of the database are written for people; no verb decides by them.

:mod:`botlease.testing` has the conformance suite. To add a store: one file, one line in ``open_store``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from botlease.model import Held, How, Lease, Peer, Probation, Reason, View
from botlease.value import value

SCHEMA_VERSION: Final = 5
SEED_COLUMNS: Final = ("instance_id", "started_at", "last_heartbeat", "is_active")
KEEP_ENDED_DAYS: Final = 30
"""Rows of ended instances and terms older than this are pruned when somebody registers."""

T = TypeVar("T")
E = TypeVar("E", Probation, How)


class StoreError(Exception):
    """The store did not answer as it should: the outcome of the call is unknown."""


class Late(StoreError):
    """No answer within the deadline, in seconds: it may have been carried out."""

    def __init__(self, deadline: float) -> None:
        super().__init__(f"no answer within {deadline:.2g} s")


def unanswered(e: StoreError, url: str) -> str:
    """What is to be said of an error to whoever has named this database, without a password: no answer is as a rule
    that of a wrong address."""
    if not isinstance(e, Late):
        return str(e)
    cure = "who has it locked, and is its disk well" if url.startswith("sqlite:") else "check host, port and firewall"
    return f"the database at {url} does not answer: {e}: {cure}"


class StoreRefused(StoreError):
    """The store can be reached but must not be used as it is; the message names the cure."""


class StoreEmpty(StoreRefused):
    """Nothing of ours has run there yet."""


@value
class Registration:
    """One start of one instance."""

    instance_id: str
    bot: str
    deployment: str
    host: str
    pid: int
    version: str
    ttl: float


@value
class Renewal:
    assigned: bool
    vacant: bool
    origin: str
    paused: bool = False


@value
class Grant:
    term: int
    origin: str
    unknown: tuple[str, str] | None = None
    """Proof and instance of whose work began last, where that is not the holder that the row named (a file was restored
    meanwhile; a grant between was given back): something of it may be left on this host."""


class Store(Protocol):
    url: str  # without a password: fit for people's eyes
    on_change: Callable[[], None] | None
    """Called from the event loop when the database changed, as a hint; may never be called. Whoever is next in line
    asks for a release then, mostly in vain: that must cost no more than a look, or little more."""

    async def open(self, deadline: float, *, upgrade: bool = True) -> None:
        """Connect; create or upgrade the tables, or refuse. Without ``upgrade`` nothing is changed: missing tables are
        :class:`StoreEmpty`, older ones are refused. Who only looks must not stop a bot of an older version."""

    async def aclose(self) -> None: ...

    async def register(self, me: Registration, deadline: float) -> View:
        """Insert our row, our deployment and the bot's lease where they are missing. Idempotent."""

    async def read(self, bot: str, instance_id: str, deadline: float) -> View: ...

    async def claim(self, bot: str, instance_id: str, source: tuple[str, int, int] | None, deadline: float) -> bool:
        """Take the assignment from exactly ``source``: an instance, its generation and beat (None: from nobody). One
        that is carried out late is refused if that instance has begun or ended a term meanwhile."""

    async def acquire(
        self,
        bot: str,
        instance_id: str,
        key: tuple[int, int, str, str | None],
        *,
        nonce: str,
        floor: int,
        origin: str,
        how: How,
        ttl: float,
        proof: str,
        probation: Probation,
        deadline: float,
    ) -> Grant | None:
        """Begin a term above ``floor``, if this is still the database ``origin`` (a fail-over in between may have lost
        the very acquire that would defeat ours), the row is still exactly ``key``, the bot is not paused, and we are
        assigned and not ended. With ``RELEASED`` and the key of a holder, the row must be just that hold's release: its
        term and nonce, nobody, and a later beat. ``probation``: whether it begins on probation."""

    async def renew(
        self, bot: str, instance_id: str, held: Held, beat: int, deadline: float, label: str = ""
    ) -> Renewal | None:
        """Write the new beat, if the row is still exactly this hold and shows one of its beats. With a ``label`` it is
        a :meth:`touch` as well."""

    async def release(
        self,
        bot: str,
        instance_id: str,
        held: Held,
        *,
        reason: Reason,
        pass_on: bool,
        leave: bool,
        deadline: float,
    ) -> bool:
        """End the term, journal it, notify; with ``pass_on`` hand our assignment to the best live standby."""

    async def passed(self, bot: str, instance_id: str, held: Held, deadline: float) -> bool:
        """Journal that the term has passed its probation, and notify."""

    async def touch(self, instance_id: str, state: str, deadline: float) -> None:
        """One heartbeat of the instance row."""

    async def leave(self, bot: str, instance_id: str, *, reason: Reason, pass_on: bool, deadline: float) -> None:
        """Mark the instance ended: from then on no acquire of its can match."""

    async def overview(self, deadline: float) -> dict[str, Any]:
        """Leases and instances as plain values, for ``status``."""

    async def promote(self, instance_id: str, deadline: float) -> None:
        """What the operator's UPDATE does. Raises :class:`StoreRefused` for an unknown or ended instance."""

    async def terms(self, bot: str | None, limit: int, deadline: float) -> list[dict[str, Any]]:
        """The journal, newest term first, of one bot or (None) of all."""

    async def deactivate(self, bot: str | None, instance_id: str | None, deadline: float) -> int:
        """Take the assignment away; None means every one. Returns from how many."""

    async def pause(self, bot: str | None, on: bool, deadline: float) -> int:
        """Set or end the pause. Returns for how many bots that was a change."""

    async def prune(self, bot: str | None, days: float, deadline: float) -> tuple[int, int]:
        """Delete ended instances and closed terms older than that. Returns how many of each."""

    async def diagnose(self, deadline: float) -> dict[str, Any]:
        """For ``doctor``, without changing anything: server, seconds (of one call), schema (a version or None), pooled,
        clock (the database's minus ours, seconds) and missing (privileges)."""

    def guard_fd(self, bot: str) -> int | None:
        """A lock for the owner of the work to keep as long as it runs, where the store has one. The caller owns
        the descriptor from then on."""


def older(version: int) -> str:
    return (
        f"its tables are of an older botlease (version {version}, this one knows {SCHEMA_VERSION}): they are upgraded "
        "when the first instance of this one starts"
    )


def make_view(row: Any, origin: str, era: int) -> View:
    """Build a :class:`View` from one row of a READ statement, whose columns both dialects name alike."""
    lease = None
    if row["term"] is not None:
        lease = Lease(
            term=row["term"],
            beat=row["beat"],
            nonce=row["nonce"],
            holder=row["holder"],
            ttl=float(row["ttl"]),
            origin=row["origin"],
            proof=row["proof"],
            served=row["served"],
        )
    peer = None
    if row["a_id"] is not None:
        peer = Peer(
            row["a_id"], row["a_generation"] or 0, bool(row["a_ended"]), row["a_beat"] or 0, float(row["a_age"] or 0)
        )
    return View(
        lease=lease,
        origin=origin,
        assigned=peer,
        generation=row["my_generation"] or 0,
        ahead=row["ahead"],
        renewed_ago=float(row["renewed_ago"] or 0),
        era=era,
        paused=bool(row["paused"]),
        probation=_word(Probation, row["probation"], Probation.NONE),
        failures=row["failures"],
        others=row["others"],
        ended=bool(row["my_ended"]),
        rooted=_word(How, row["rooted"], How.EXPIRED),
    )


def _word(words: type[E], said: str | None, safe: E) -> E:
    """What a row says; where that is none of ours (somebody has edited it) the safe one, lest nobody can read it."""
    try:
        return words(said or safe)
    except ValueError:
        return safe


async def within(deadline: float, work: Awaitable[T], abandon: Callable[[], None]) -> T:
    """Await ``work`` for at most ``deadline`` seconds, even if it does not react to being cancelled.

    ``asyncio.wait_for`` waits for the cancelled task; a driver on a black-holed connection can keep it
    waiting for ever (measured: 11 s with one, 20 s with another). Here nobody waits for it.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[T] = loop.create_future()
    task = loop.create_task(_carry(work, over))
    timer = loop.call_later(max(deadline, 0.001), too_late, over, deadline)
    try:
        return await over
    except (StoreError, asyncio.CancelledError) as e:
        if isinstance(e, Late) or not task.done():
            # The connection is dropped first, and the loop hears of it before the cancellation: a driver that is
            # cancelled on a living connection opens another one to say so.
            abandon()
            loop.call_soon(task.cancel)
        if asyncio.iscoroutine(work):  # whose carrier was cancelled before its first step, it would be "never awaited"
            task.add_done_callback(lambda _: work.close())
        raise
    finally:
        timer.cancel()


async def _carry(work: Awaitable[T], over: asyncio.Future[T]) -> None:
    """Settle ``over`` as ``work`` ends; its outcome is of no interest any more if that is over already."""
    try:
        result = await work
    except asyncio.CancelledError:
        over.cancel()
        raise
    except Exception as e:
        _fail(over, e)
    else:
        if not over.done():
            over.set_result(result)


def _fail(over: asyncio.Future[Any], why: Exception) -> None:
    if not over.done():
        over.set_exception(why)


def too_late(over: asyncio.Future[Any], deadline: float) -> None:
    """End the waiting for ``over``. Only here is it put into words: of a million calls none needs them."""
    _fail(over, Late(deadline))


UNKNOWN_URL: Final = (
    "the database URL is none that we know: use postgresql://user@host/name or sqlite:///path/to/file.db "
    "(BOTLEASE_DATABASE_URL counts before DATABASE_URL)"
)
"""It is not quoted: what is wrong with it may be that half of it is the password."""


def sqlite_path(url: str) -> str:
    """The file that an sqlite URL names: sqlite:///relative, sqlite:////absolute."""
    return unquote(url.removeprefix("sqlite://").removeprefix("/").split("?", 1)[0])


def open_store(url: str) -> Store:
    """The store for a database URL. Raises :class:`StoreRefused` with the cure for one we do not know."""
    try:
        urlsplit(url)
    except ValueError:  # its text would quote the password
        raise StoreRefused("the database URL is not valid: it should read postgresql://user@host:5432/name") from None
    scheme = url.split("://", 1)[0] if "://" in url else ""
    if scheme in ("postgres", "postgresql"):
        try:
            from botlease.stores.postgres import PostgresStore
        except ImportError as e:
            if (e.name or "").split(".")[0] != "asyncpg":
                raise
            raise StoreRefused("PostgreSQL needs the driver asyncpg: pip install 'asyncpg>=0.30'") from None
        return PostgresStore(url)
    if scheme == "sqlite":
        from botlease.stores.sqlite import SqliteStore

        path = sqlite_path(url)
        if not path or path == ":memory:":
            raise StoreRefused(
                "a lease in memory protects nobody; name a file: sqlite:///bot.db or sqlite:////var/lib/bot.db"
            )
        return SqliteStore(path)
    raise StoreRefused(UNKNOWN_URL)
