"""A deterministic world that drives the production core and the production SQL of the SQLite store.

N candidates, one database, one true time. Each node has its own clock (rate 0.99 to 1.01), its own
network, may be paused for far longer than the ttl, and may crash at any step. Answers are lost, late,
repeated and reordered; requests may be applied long after their sender gave up. The database's clock
steps, an operator edits rows by hand, the database fails over and loses its last commits. Machines sleep; some are
restored from a snapshot that still runs elsewhere, or are stopped together with their clocks: then two can be at
work until the older trust is over, which no lease can prevent, and not for longer (docs/design.md, "The promise").

Latencies are extreme on purpose (almost zero, or just around the attempt's deadline): gentle random
ones catch almost nothing.

Invariants, checked as it runs: no two works of one bot at once; terms only rise; nothing begins after
a stop signal; what a dead holder had in flight has landed before a successor works after an expiry.
Afterwards, in one world of six: exactly one works within the bound, counted from the last fault.
"""

from __future__ import annotations

import copy
import heapq
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from botlease import core
from botlease.model import How, Mode, Timing
from botlease.stores import Registration
from botlease.stores.sqlitefile import SqliteFile

BOT = "bot"


def seen_or_its_release(row: Any, q: core.Question) -> bool:
    """Whether this may be acquired: what had been seen, or, of a holder, just its release."""
    term, beat, nonce, holder = q.key
    if q.how is not How.RELEASED or holder is None:
        return bool(row.key == q.key)
    return (row.term, row.nonce, row.holder, row.proof) == (term, nonce, None, "") and row.beat > beat


class Violation(AssertionError):
    """An invariant was broken; the message carries the seed that shows it."""


@dataclass
class Plan:
    """Which faults a run has, drawn from its seed."""

    nodes: int
    length: float
    timings: list[Timing]
    loss: float
    late: float
    partitions: bool
    crashes: bool
    pauses: bool
    clock_steps: bool
    operator: bool
    vandal: bool
    failover: bool
    same_host: bool
    deaf_work: bool
    ambush: float  # how often the worst happens at the worst moment: just after asking or being answered
    watching: bool  # every commit wakes everybody, as inotify on an SQLite file does
    ailing: bool = False  # works crash, or hang
    leaves: bool = False  # the superseded one ends when the newcomer has passed its probation
    warm: bool = False
    sleeps: bool = False  # whole machines do, and their clocks go on
    snapshots: bool = False  # machines are restored from one while they run, or stopped together with their clocks
    settles: bool = True  # in the end faults end, and exactly one must work in bounded time
    forgets: bool = False  # the database crashes, and has lost what waited for no disk
    sharp: bool = False
    """Everything at its bound: clocks at opposite rates, work that is deaf and dies at the last moment."""

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        plan = cls._draw(rng)
        if rng.random() < 0.3:
            timings = [replace(t, lock_delay=rng.choice([0.0, 1.0])) for t in plan.timings[:1]]
            plan = replace(
                plan, sharp=True, timings=timings, loss=0.0, deaf_work=True, ambush=0.1, watching=True, failover=False
            )
        # Not drawn from rng: those who hunt for planted bugs know the worlds of their seeds.
        return replace(plan, forgets=random.Random(repr(plan)).random() < 0.25)

    @classmethod
    def _draw(cls, rng: random.Random) -> Plan:
        ttl = rng.choice([3.0, 3.0, 5.0, 10.0])
        timings = [replace(Timing.for_ttl(ttl, stop_grace=ttl / 2), lock_delay=rng.choice([0.0, 1.0]))]
        timings = [replace(timings[0], probation=rng.choice([0.0, ttl, 3 * ttl]))]
        # For the same CPU time worlds of 2.7, 3.8 and 7.6 ttl found as many planted bugs; but the shortest never that a
        # quarantine is forgotten, which takes a long story.
        length = rng.choice([1, 1, 1, 2, 4, 10])
        if rng.random() < 0.25:
            other = Timing.for_ttl(rng.choice([3.0, 12.0]), stop_grace=2.0)
            timings.append(replace(other, lock_delay=timings[0].lock_delay))  # it is the taker's own wait
        return cls(
            nodes=rng.choice([2, 3, 3, 4]),
            length=length * ttl,
            timings=timings,
            loss=rng.choice([0.0, 0.1, 0.4]),
            late=rng.choice([0.0, 0.2, 0.5]),
            partitions=rng.random() < 0.6,
            crashes=rng.random() < 0.6,
            pauses=rng.random() < 0.6,
            clock_steps=rng.random() < 0.4,
            operator=rng.random() < 0.5,
            vandal=rng.random() < 0.15,
            # What a database loses in a fail-over it cannot say: a takeover by one with a longer ttl among it is the
            # assumption 3 of docs/design.md.
            failover=rng.random() < 0.2 and len(timings) == 1,
            same_host=rng.random() < 0.3,
            deaf_work=rng.random() < 0.4,
            ambush=rng.choice([0.0, 0.02, 0.1]),
            watching=rng.random() < 0.5,
            ailing=rng.random() < 0.4,
            leaves=rng.random() < 0.5,
            warm=rng.random() < 0.3,
            sleeps=rng.random() < 0.3,
            snapshots=rng.random() < 0.1,
            # Waiting for one to work, and go on to, is half of what a world costs.
            settles=rng.random() < (0.5 if length == 10 else 0.1),
        )


@dataclass(eq=False)
class Work:
    node: Node
    term: int
    drained: bool = False
    alive: bool = True
    crashed: bool = False  # it waits for its restart: a drain is over at once
    frozen: bool = False  # its machine sleeps
    doomed: bool = False  # killed while its machine slept: it never runs again


@dataclass(eq=False)
class Node:
    clock_counts_sleep: ClassVar[bool] = True

    world: World
    number: int
    deployment: str
    rate: float
    offset: float
    timing: Timing
    host: str
    incarnation: int = 0
    state: core.State = field(init=False)
    alive: bool = True
    paused_until: float = 0.0
    excused_until: float = 0.0  # before this moment no lease can tell that its work is one of two
    asleep_until: float = 0.0  # the whole machine: nothing of it runs, the work neither
    cut_until: float = 0.0
    slow_until: float = 0.0
    quick_until: float = 0.0
    inbox: list[tuple[core.Event, core.Question | None]] = field(default_factory=list)
    wake: int = 0
    work: Work | None = None
    fence: float = 0.0
    armed: tuple[int, float] = (0, 0.0)
    stopped_at: float | None = None
    watched: set[str] = field(default_factory=set)
    hows: dict[int, How] = field(default_factory=dict)
    renewed_at: float = -1e9  # true time of the last renewal that was confirmed to it
    began_at: float = 0.0

    @property
    def name(self) -> str:
        return f"n{self.number}.{self.incarnation}"

    @property
    def proof(self) -> str:
        return f"{self.host}/{self.name}"

    def nonce(self, q: core.Question) -> str:
        """The keeper draws a random one for each acquire."""
        return f"{self.host}/{self.name}#{q.serial}" if q.verb is core.Verb.ACQUIRE else ""

    def local(self) -> float:
        return self.offset + self.rate * self.world.time

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate

    def boot(self) -> None:
        plan = self.world.plan
        monitored = plan.ailing and self.number % 2 == 0
        me = core.Candidate(self.name, Mode.PREEMPT, plan.warm, monitored, plan.leaves)
        self.state = core.start(me, self.timing, self.local())
        self.world.trace(f"{self.name} starts ({self.deployment})")
        self.feed(core.Tick())
        if plan.warm:
            self.world.at(self.world.time + self.world.rng.choice([0.01, 1.0]), lambda: self.feed(core.Ready(True)))

    # The keeper in small: one inbox, one timer -----------------------------------------------------------------

    def feed(self, event: core.Event) -> None:
        if not self.alive:
            return
        if self.world.time < self.paused_until:
            self.inbox.append((event, None))
            return
        self.state, actions = core.step(self.state, event, self.local())
        for action in actions:
            self.act(action)
            if not self.alive:
                return
        self.wake += 1
        at = core.next_wakeup(self.state)
        if at is not None:
            token = self.wake
            slack = 1e-6 + 1e-4 * self.world.rng.random()  # no two timers go off in the same nanosecond
            self.world.at(max(self.true(at), self.world.time) + slack, lambda: self._tick(token))

    def _tick(self, token: int) -> None:
        if token == self.wake:
            self.feed(core.Tick())

    def resume(self) -> None:
        if not self.alive or self.world.time < self.paused_until:
            return
        events, self.inbox = [e for e, _ in self.inbox], []
        if self.world.rng.random() < 0.5:
            events.insert(0, core.Tick())
        for event in events:
            self.feed(event)
        self.feed(core.Tick())

    def act(self, action: core.Action) -> None:
        match action:
            case core.Ask(question=q):
                if q.verb in (core.Verb.ACQUIRE, core.Verb.RENEW):
                    self.world.ambush(self)
                if q.verb is core.Verb.ACQUIRE and self.world.plan.failover:
                    self.world.lose_what_comes(self)
                self.world.call(self, q)
            case core.Arm(until=until):
                self.arm(until)
            case core.Start(term=term, until=until):
                self.arm(until)
                self.begin(term, until)
            case core.Drain():
                if self.work is not None and (self.work.crashed or not self.world.plan.deaf_work):
                    work = self.work
                    work.drained = True
                    takes = self.world.rng.choice([0.01, 0.5, self.timing.stop_grace * 1.5])
                    self.world.at(self.world.time + (0 if work.crashed else takes), lambda: self.world.gone(work))
            case core.Kill():
                if self.work is not None:
                    self.world.kill(self.work, planned=True)
            case core.Restart(hung=hung):
                if hung and self.work is not None:
                    self.world.ail(self.work, crash=True)
            case core.Danger():
                pass
            case core.Watch(lease=lease):
                self.watched.add(lease.proof)
            case core.End(reason):
                self.alive = False
                self.world.trace(f"{self.name} ends ({reason})")
                if reason is core.Reason.COPIED:
                    self.world.later_restart(self)

    def arm(self, until: float) -> None:
        if self.world.no_fence:
            return
        term = self.state.term.number if self.state.term else 0
        if self.armed[0] == term and self.local() >= self.armed[1]:
            raise Violation(f"seed {self.world.seed}: {self.name} moves its fence after the end of trust")
        self.armed = (term, until)
        self.fence = until
        self.world.at(self.true(until), lambda: self._fence(until))

    def _fence(self, until: float) -> None:
        """The kernel's timer. It does not ask whether the supervisor runs."""
        if self.world.time < self.asleep_until:
            self.world.at(self.asleep_until, lambda: self._fence(until))
        elif self.local() < until - 1e-9:  # its clock stood still meanwhile
            self.world.at(self.true(until), lambda: self._fence(until))
        elif self.fence == until and self.work is not None:
            self.world.trace(f"{self.name} fenced by the kernel")
            self.work.doomed = self.work not in self.world.running
            if self.world.rng.random() < 0.5:
                self.alive = False  # the supervisor's own timer
                self.world.later_restart(self)
            self.world.kill(self.work)

    def begin(self, term: int, until: float) -> None:
        world = self.world
        if self.stopped_at is not None:
            raise Violation(f"{self.name} begins work after its stop signal")
        work = self.work = Work(self, term)
        delay = 0.0 if world.plan.sharp else world.rng.choice([0.0, 0.001, 0.2])

        def go() -> None:
            if not work.alive:
                return
            if self.world.time < self.paused_until and self.local() < until:
                world.at(self.paused_until, go)
            elif self.local() >= max(until, self.fence) and not world.no_fence:
                world.gone(work)  # the reaper refuses to start what its fence would kill
            else:
                world.begin(work, self.hows.get(term, How.RELEASED))

        world.at(world.time + delay, go)


class Database:
    """The databases of worlds that are over, emptied for others: to make the tables, and to have SQLite prepare every
    statement anew, is a third of what a world costs."""

    free: ClassVar[list[SqliteFile]] = []

    @classmethod
    def take(cls, wall: Callable[[], float]) -> SqliteFile:
        file = cls.free.pop() if cls.free else SqliteFile(":memory:")
        if file.db.in_transaction:  # what it was in broke off
            file.db.execute("ROLLBACK")
        for table in ("bot_leases", "bot_terms", "bot_instances", "bot_deployments", "sqlite_sequence"):
            file.db.execute(f"DELETE FROM {table}")
        file.wall, file.commits, file.origin = wall, 0, file.origin.rstrip("+")
        return file


class World:
    lazy: ClassVar = {core.Verb.RELEASE, core.Verb.LEAVE}
    """What waits for no disk: on PostgreSQL a release, and where synchronous_commit is off a farewell as well."""

    def __init__(self, seed: int, plan: Plan | None = None, *, no_fence: bool = False, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plan = plan or Plan.draw(self.rng)
        self.no_fence = no_fence
        self.time = 1000.0
        self.heap: list[tuple[float, int, Callable[[], Any]]] = []
        self.count = 0
        self.db_offset = 0.0
        self.db = Database.take(lambda: 1.7e9 + self.time + self.db_offset)
        self.db.era = lambda: self.db.origin.count("+") * 1_000_000  # what a PostgreSQL timeline gives
        self.snapshots: list[tuple[float, bytes]] = []
        self.lines: list[str] | None = [] if tracing else None
        self.running: set[Work] = set()
        self.last_term = 0
        self.granted = 0  # the highest term
        self.only_instances_know = False  # it, as the journal was deleted
        self.by_hand = False  # the operator has taken the assignment away from everybody, once
        self.anew = False  # the database was emptied, and nobody has said since that nobody shall work
        self.side_car = 0  # the same, where it is kept beside a database that was emptied
        self.in_flight_until: dict[int, float] = {}
        self.nodes: list[Node] = []
        self.calm = False
        self.deployments = 0
        self.births = 0
        self.steps = 0
        self.faults: Counter[str] = Counter()
        self.handovers = 0
        self.recovery = 0.0  # seconds from the last fault to the work that stays, of `bound()`
        self.dead_proofs: set[str] = set()
        self.host_of: dict[str, str] = {}
        self.broken: set[str] = set()
        self.limit = 200_000

    def trace(self, text: str) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.time - 1000:9.4f} {text}")

    def at(self, when: float, what: Callable[[], Any]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (max(when, self.time), self.count, what))

    def run_until(self, end: float) -> None:
        while self.heap and self.heap[0][0] <= end:
            self.time, _, what = heapq.heappop(self.heap)
            self.steps += 1
            if self.steps > self.limit:
                raise Violation(f"seed {self.seed}: livelock, {self.limit} steps")
            what()
        self.time = end

    # The oracle ------------------------------------------------------------------------------------------------

    def begin(self, work: Work, how: How) -> None:
        self.trace(f"{work.node.name} WORKS in term {work.term} ({how})")
        self.look_for_two(work)
        excused = self.time < work.node.excused_until
        if work.term <= self.last_term and not excused:
            raise Violation(f"seed {self.seed}: term {work.term} after term {self.last_term}")
        for term, until in self.in_flight_until.items():
            if self.time < until and not excused:
                raise Violation(f"seed {self.seed}: term {work.term} works while term {term} has requests in flight")
        self.last_term = max(self.last_term, work.term)
        work.node.began_at = self.time
        self.handovers += 1
        self.running.add(work)
        if self.rng.random() < 0.05 and not self.calm:
            # Every other one with its reaper, as if that had been killed.
            unowned = work.term % 2 == 0
            self.at(
                self.time + self.rng.uniform(0.1, 20), lambda: None if self.calm else self.gone(work, unowned=unowned)
            )
        if work.node.deployment in self.broken:
            self.at(self.time + 0.05, lambda: self.crash_loop(work, 1.0))
            return
        if work.node.state.me.monitored:
            self.at(self.time + 0.2, lambda: work.node.feed(core.Healthy(work.term)))
        if self.plan.ailing and self.rng.random() < 0.5:
            crash = self.rng.random() < 0.5
            self.at(self.time + self.rng.uniform(0.1, 10), lambda: None if self.calm else self.ail(work, crash))

    def look_for_two(self, work: Work) -> None:
        """Beside a work that is at it again, or just now began."""
        if self.time < work.node.excused_until:
            return
        rest = [w for w in self.running if w is not work and self.time >= w.node.excused_until]
        if rest:
            others = ", ".join(f"{w.node.name} (term {w.term})" for w in rest)
            raise Violation(f"seed {self.seed}: two at work: {work.node.name} (term {work.term}) beside {others}")

    def ail(self, work: Work, crash: bool) -> None:
        """It crashes and is started again a second later, or it hangs."""
        if not work.alive or not work.node.alive or work.frozen:
            return
        self.faults["work crashed or hung"] += 1
        self.trace(f"{work.node.name} {'crashes' if crash else 'hangs'} in term {work.term}")
        if crash:
            work.crashed = True
            self.at(self.time + 1.0, lambda: self.up_again(work))
        work.node.feed(core.Crashed(work.term) if crash else core.Unhealthy(work.term))

    def up_again(self, work: Work) -> None:
        work.crashed = False
        if work.alive and work.node.alive:
            work.node.feed(core.Healthy(work.term))

    def crash_loop(self, work: Work, wait: float) -> None:
        """What the supervisor does with a bot that dies at once: five restarts with back-off, then the end."""
        if not work.alive or not work.node.alive:
            return
        if wait > 16:
            self.gone(work)
            return
        work.crashed = True
        self.running.discard(work)
        self.at(self.time + wait, lambda: self.crash_loop(work, wait * 2))
        work.node.feed(core.Crashed(work.term))

    def kill(self, work: Work, planned: bool = False) -> None:
        budget = work.node.timing.kill_budget * 0.98
        wait = budget if self.plan.sharp else self.rng.choice([0.001, 0.05, budget])
        self.at(self.time + wait, lambda: self.gone(work, killed=True))

    def gone(self, work: Work, killed: bool = False, unowned: bool = False) -> None:
        if not work.alive:
            return
        work.alive = False
        self.trace(f"{work.node.name} work of term {work.term} is gone")
        if work in self.running and not work.drained and self.time >= work.node.excused_until:
            self.in_flight_until[work.term] = self.time + work.node.timing.lock_delay * 0.9
        self.running.discard(work)
        node = work.node
        node.fence = 0.0
        node.work = None
        if node.alive:
            node.feed(core.WorkEnded(work.term, unowned=unowned))
        else:
            self.prove_dead(node)

    def prove_dead(self, node: Node) -> None:
        if node.alive or node.work is not None:
            return
        if any(n is not node and n.name == node.name and n.alive for n in self.nodes):
            return  # assumption 4 of docs/design.md: no other instance on a machine that was copied
        self.dead_proofs.add(node.proof)
        for other in self.nodes:
            if other.alive and other.host == node.host and node.proof in other.watched:
                self.tell_dead(other, node.proof)

    def tell_dead(self, node: Node, proof: str) -> None:
        view = node.state.view
        if view is not None and view.lease is not None and view.lease.proof == proof:
            node.feed(core.HolderDied(view.lease.term, view.lease.nonce))

    # The network and the database ---------------------------------------------------------------------------------

    def delay(self, node: Node, *, answer: bool = False) -> float | None:
        """None: lost. Extreme values, since those are what catches bugs."""
        if self.time < node.cut_until:
            return None
        if self.time < node.slow_until and not answer:
            return node.slow_until - self.time
        if self.time < node.quick_until:
            return 0.001
        if self.calm:
            return 0.002
        attempt = node.timing.attempt
        if self.plan.sharp:
            if answer and self.rng.random() < self.plan.late:
                self.faults["message late"] += 1
                return attempt * 0.97
            return 0.0
        if self.rng.random() < self.plan.loss:
            self.faults["message lost"] += 1
            return None
        if self.rng.random() < self.plan.late:
            self.faults["message late"] += 1
            return self.rng.choice([attempt * 0.49, attempt * 0.97, attempt * 1.5, attempt * 8])
        return self.rng.choice([0.0, 0.0001, 0.003])

    def call(self, node: Node, q: core.Question) -> None:
        there = self.delay(node)
        if there is not None:
            self.at(self.time + there, lambda: self.serve(node, q))
        deadline = node.true(node.local() + node.timing.attempt)
        self.at(deadline, lambda: self.give_up(node, q))

    def give_up(self, node: Node, q: core.Question) -> None:
        if node.state.asking is not None and node.state.asking.serial == q.serial:
            node.feed(core.Failed(q.serial, node.nonce(q)))  # an answered call has no deadline any more

    def serve(self, node: Node, q: core.Question) -> None:
        lazy = q.verb in self.lazy and self.plan.forgets and not self.calm
        before_it = self.db.db.serialize() if lazy else b""
        try:
            event = self.answer(node, q)
        except sqlite3.Error:
            event = core.Failed(q.serial, node.nonce(q))
        if before_it and not isinstance(event, core.Failed):  # of what was denied something is written, too
            self.forget(q.verb, before_it)
        back = self.delay(node, answer=True)
        if back is not None:
            self.at(self.time + back, lambda: self.deliver(node, event))
            if not self.calm and self.rng.random() < 0.05:
                self.faults["answer repeated"] += 1
                self.at(self.time + back * 2 + 0.5, lambda: self.deliver(node, event))

    def deliver(self, node: Node, event: core.Event) -> None:
        if isinstance(event, core.Registered | core.Seen) and event.view.lease is not None:
            proof = event.view.lease.proof
            if proof in self.dead_proofs and self.host_of.get(proof) == node.host:
                node.feed(core.HolderDied(event.view.lease.term, event.view.lease.nonce))
        if isinstance(event, core.Renewed | core.Granted):
            node.renewed_at = self.time
            if self.plan.vandal and node.timing.ttl > min(t.ttl for t in self.plan.timings) and self.rng.random() < 0.3:
                self.hide_the_ttl(node)
            self.at(self.time + 1e-5, lambda: self.ambush(node))
        expired = isinstance(event, core.Granted) and node.hows.get(event.term) is How.EXPIRED
        if expired and self.plan.ambush and self.rng.random() < 0.5:
            # In the middle of its lock-delay it is to go, and somebody awake is to follow.
            self.at(self.time + 0.01, lambda: self.move_on(node))
            if self.plan.same_host:
                self.at(self.time + 0.02, lambda: None if self.calm else self.crash(node))
        node.feed(event)

    def awake_beside(self, node: Node) -> list[Node]:
        return [n for n in self.nodes if n is not node and n.alive and self.time >= max(n.paused_until, n.cut_until)]

    def move_on(self, node: Node) -> None:
        awake = self.awake_beside(node)
        if awake and not self.calm:
            who = self.rng.choice(awake).name
            self.trace(f"operator: TRUE for {who}")
            self.db.db.execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = ?", (who,))
            self.changed(core.Woken())

    def ambush(self, node: Node) -> None:
        if self.calm or not node.alive or self.rng.random() >= self.plan.ambush:
            return
        plan = self.plan
        worst: list[Callable[[], Any]] = [lambda: self.pause(node), lambda: self.cut(node, 30)]
        worst += [lambda: self.crash(node)] * plan.crashes + [self.fail_over] * plan.failover
        worst += [self.delete_the_leases] * plan.vandal
        self.rng.choice(worst)()

    def answer(self, node: Node, q: core.Question) -> core.Event:
        db, me = self.db, node.name
        match q.verb:
            case core.Verb.REGISTER:
                me_row = Registration(me, BOT, node.deployment, node.host, 1, "1", node.timing.ttl)
                return core.Registered(q.serial, db.register(me_row))
            case core.Verb.READ:
                return core.Seen(q.serial, db.read(BOT, me))
            case core.Verb.CLAIM:
                before = db.read(BOT, me)
                ok = db.claim(BOT, me, q.source)
                self.trace(f"{me} claims from {q.source}: {ok}")
                if ok:
                    self.check_claim(node, before)
                return self.changed(core.Claimed(q.serial, ok))
            case core.Verb.ACQUIRE:
                assert q.key is not None
                nonce = node.nonce(q)
                self.host_of[node.proof] = node.host
                row = db.read(BOT, me).lease
                grant = db.acquire(
                    *(BOT, me, q.key),
                    nonce=nonce,
                    floor=max(q.floor, self.side_car),
                    origin=q.origin,
                    how=q.how,
                    ttl=node.timing.ttl,
                    proof=node.proof,
                    probation=q.probation,
                )
                granted = (
                    "nothing" if grant is None else f"term {grant.term}, timeline {grant.origin.partition('/')[2]}"
                )
                self.trace(f"{me} acquires ({q.how}): {granted}")  # without what the store drew at random
                if grant is None:
                    return core.Denied(q.serial)
                if db.read(BOT, me).paused:
                    raise Violation(f"seed {self.seed}: {me} acquired while the bot is paused")
                if row is None or not seen_or_its_release(row, q):
                    raise Violation(f"seed {self.seed}: {me} acquired {row} which it had seen as {q.key}")
                self.granted = max(self.granted, grant.term)
                node.hows[grant.term] = q.how
                if q.how is How.DIED:
                    self.in_flight_until.pop(row.term, None)  # after a proof of death no lock-delay is promised
                return self.changed(core.Granted(q.serial, grant.term, nonce, grant.origin))
            case core.Verb.RENEW:
                assert q.held is not None
                renewal = db.renew(BOT, me, q.held, q.beat, q.label)
                if renewal is None:
                    return core.Denied(q.serial)
                row = db.read(BOT, me).lease
                if row is None or (row.term, row.nonce, row.holder) != (*q.held[:2], me):
                    raise Violation(f"seed {self.seed}: {me} renewed {row} as if it were its own term {q.held}")
                if self.plan.watching:
                    self.changed(core.Woken())
                return core.Renewed(q.serial, renewal.assigned, renewal.vacant, renewal.origin, renewal.paused)
            case core.Verb.PASS:
                assert q.held is not None
                ok = db.passed(BOT, me, q.held)
                self.trace(f"{me} has passed its probation: {ok}")
                return self.changed(core.Done(q.serial) if ok else core.Denied(q.serial))
            case core.Verb.RELEASE:
                assert q.held is not None and q.reason is not None
                ok = db.release(BOT, me, q.held, reason=q.reason, pass_on=q.pass_on, leave=q.leave)
                self.trace(f"{me} releases {q.held} ({q.reason}): {ok}")
                if ok:
                    self.in_flight_until.pop(q.held[0], None)  # its own work was reaped, and it says so
                return self.changed(core.Done(q.serial) if ok else core.Denied(q.serial))
            case core.Verb.TOUCH:
                db.touch(me, q.label)
                return core.Done(q.serial)
            case core.Verb.LEAVE:
                assert q.reason is not None
                db.leave(BOT, me, reason=q.reason, pass_on=q.pass_on)
                return self.changed(core.Done(q.serial))
        raise AssertionError(q)

    def check_claim(self, node: Node, view: core.View) -> None:
        """Nobody but a strictly newer deployment, and none in quarantine, takes from a holder that is well."""
        peer = view.assigned
        source = next((n for n in self.nodes if peer is not None and n.name == peer.instance_id), None)
        if peer is None or source is None or peer.ended or source.state.phase is not core.Phase.WORKING:
            return
        if source.work not in self.running or self.time < source.paused_until:
            return  # fenced, or asleep: it does not know yet
        if self.time < source.excused_until:
            return  # it could not know that its time was over
        if self.time - source.renewed_at > source.timing.ttl * 0.5 or not source.alive:
            return
        # A claim may rest on news as old as a poll and two slow answers.
        if self.time - source.began_at < node.timing.renew_every + 2 * node.timing.attempt:
            return
        if view.generation <= peer.generation:
            raise Violation(
                f"seed {self.seed}: {node.name} ({node.deployment}) took over from a newer one that is well"
            )
        if view.failures >= 2:
            raise Violation(f"seed {self.seed}: {node.name} took over in quarantine")

    def changed(self, event: core.Event) -> core.Event:
        """Notifications: a hint that is lost now and then."""
        for node in self.nodes:
            wait = self.delay(node)
            if wait is not None and self.rng.random() < 0.8:
                self.at(self.time + wait, lambda n=node: n.feed(core.Woken()))  # type: ignore[misc]
        return event

    # Faults ---------------------------------------------------------------------------------------------------------

    def deploy(self, deployment: str | None = None, number: int | None = None) -> Node:
        if deployment is None:
            self.deployments += 1
            deployment = f"d{self.deployments}"
        rng = self.rng
        number = len(self.nodes) if number is None else number
        node = Node(
            self,
            number,
            deployment,
            rate=rng.choice([0.9901, 1.0099] if self.plan.sharp else [0.9901, 1.0, 1.0099]),
            offset=rng.uniform(0, 1e5),
            timing=rng.choice(self.plan.timings),
            host="h0" if self.plan.same_host else f"h{number}",
        )
        self.nodes.append(node)
        node.boot()
        return node

    def later_restart(self, node: Node) -> None:
        self.at(self.time + self.rng.choice([0.05, 1.0, 5.0]), lambda: self.restart(node))

    def restart(self, node: Node) -> None:
        if node not in self.nodes:
            return
        self.nodes.remove(node)
        self.births += 1  # a name of its own, also beside a copy of the one that is restarted
        fresh = Node(self, node.number, node.deployment, node.rate, node.offset, node.timing, node.host, self.births)
        self.nodes.append(fresh)
        fresh.boot()

    def crash(self, node: Node) -> None:
        if not node.alive:
            return
        self.faults["process killed"] += 1
        self.trace(f"{node.name} crashes")
        node.alive = False
        if node.work is not None:
            work = node.work
            self.at(self.time + 0.004, lambda: self.gone(work))  # death with the parent
        else:
            self.prove_dead(node)
        self.later_restart(node)

    def deploy_another(self) -> None:
        if len(self.nodes) < self.plan.nodes + 3:
            self.faults["deployment"] += 1
            self.deploy()

    def cut(self, node: Node, span: float) -> None:
        self.faults["network cut"] += 1
        self.trace(f"{node.name} cut off for {span:g}")
        node.cut_until = self.time + span

    def step_the_clock(self) -> None:
        self.faults["database clock stepped"] += 1
        self.db_offset = self.rng.choice([0, 3600, -3600, 30, -30])

    def delete_the_leases(self) -> None:
        self.faults["lease rows deleted"] += 1
        self.db.db.execute("DELETE FROM bot_leases")
        (known,) = self.db.db.execute("SELECT coalesce(max(term), 0) FROM bot_instances").fetchone()
        if self.seed % 4 == 0 and len({t.ttl for t in self.plan.timings}) == 1 and known >= self.granted:
            self.db.db.execute("DELETE FROM bot_terms")  # which alone knew of a longer ttl, or of a higher term
            self.only_instances_know = True

    def empty_the_database(self) -> None:
        """The file is deleted, or all rows are: as the side-car lock has it, nobody works or is about to."""
        asked = (n.state.asking for n in self.nodes)
        if (
            self.running
            or any(n.state.term for n in self.nodes)
            or any(q and q.verb is core.Verb.ACQUIRE for q in asked)
        ):
            return
        self.faults["database emptied"] += 1
        self.trace("the database is emptied")
        self.side_car = self.granted
        self.anew = True
        self.in_flight_until.clear()  # what remembered that a term ran out is gone; that its work is, the lock proves
        for table in ("bot_leases", "bot_terms", "bot_instances", "bot_deployments"):
            self.db.db.execute(f"DELETE FROM {table}")

    def stop_one_of_several(self, node: Node) -> None:
        if len([n for n in self.nodes if n.alive]) > 1:
            self.stop(node)

    def pause(self, node: Node) -> None:
        self.faults["process stopped"] += 1
        span = self.rng.choice([0.3, 1.0, 1.5, 3.0]) * node.timing.ttl
        self.trace(f"{node.name} paused for {span:.1f}")
        node.paused_until = max(node.paused_until, self.time + span)
        self.at(node.paused_until, node.resume)

    def sleep(self, node: Node) -> None:
        """Every process of the machine stands still, its fence and its work too. Its clock counts on; the timers that
        became due go off when it wakes."""
        self.faults["machine asleep"] += 1
        span = self.rng.choice([0.3, 1.0, 1.5, 3.0]) * node.timing.ttl
        for one in [n for n in self.nodes if n.host == node.host]:
            self.trace(f"{one.name} sleeps for {span:.1f}")
            self.freeze(one, span)
            if not Node.clock_counts_sleep:
                one.offset -= one.rate * span

    def freeze(self, node: Node, span: float) -> None:
        work = node.work
        node.asleep_until = max(node.asleep_until, self.time + span)
        node.paused_until = max(node.paused_until, node.asleep_until)
        if work is not None and (work in self.running or work.frozen):
            self.running.discard(work)  # what does not run does not work
            work.frozen = True
            # The timer of the kernel comes first, then the processes (measured: within 0.4 ms).
            self.at(node.asleep_until + 1e-6, lambda: self.goes_on(work))
        self.at(node.paused_until + 2e-6, node.resume)

    def goes_on(self, work: Work) -> None:
        if not work.frozen or self.time < work.node.asleep_until:
            return
        work.frozen = False
        down = work.crashed and work.node.deployment in self.broken  # one that only crashed counts as running meanwhile
        if work.alive and not down and not work.doomed:
            self.trace(f"{work.node.name} goes on in term {work.term}")
            self.look_for_two(work)
            self.running.add(work)

    def excuse(self, node: Node) -> None:
        """Its work may be one of two now, or begin as one, until the trust that it has, or has asked for, is over: no
        longer, since the database confirms it to one of them only."""
        # What is under way may still be confirmed to both.
        asked = max((held.asked_at for held in (node.state.term, node.state.asking) if held is not None), default=0.0)
        end = max(node.true(asked + node.timing.trust), node.asleep_until) + node.timing.kill_budget
        node.excused_until = max(node.excused_until, end)
        self.at(node.excused_until + 1e-5, lambda: self.look_again(node))

    def look_again(self, node: Node) -> None:
        if node.work in self.running:
            self.look_for_two(node.work)

    def stop_the_clock(self, node: Node) -> None:
        """A hypervisor stops the machine, and its clocks do not notice."""
        self.faults["machine and clock stopped"] += 1
        span = self.rng.choice([0.3, 1.0, 1.5, 3.0]) * node.timing.ttl
        self.trace(f"{node.name} stands still with its clocks for {span:.1f}")
        self.freeze(node, span)
        node.offset -= node.rate * span
        self.excuse(node)

    def copy(self, node: Node) -> None:
        """The machine is restored elsewhere from a snapshot of this moment, while it goes on here."""
        if not node.alive or self.time < node.paused_until or (node.work is not None and node.work not in self.running):
            return
        self.faults["machine restored twice"] += 1
        twin = copy.copy(node)
        self.nodes.append(twin)
        twin.host = f"copy{len(self.host_of)}{self.time}"
        twin.offset -= self.rng.uniform(0.0, 0.5)
        twin.inbox, twin.watched, twin.hows = list(node.inbox), set(node.watched), dict(node.hows)
        self.trace(f"{node.name} is restored from a snapshot as a second one")
        if node.work is not None:
            twin.work = work = Work(twin, node.work.term, node.work.drained)
            self.running.add(work)
            if work.drained:
                self.at(self.time + node.timing.stop_grace, lambda: self.gone(work))
            self.at(twin.true(twin.fence), lambda: twin._fence(twin.fence))
        self.excuse(node)
        self.excuse(twin)
        q = twin.state.asking
        if q is not None:
            self.at(twin.true(q.asked_at + twin.timing.attempt), lambda: self.give_up(twin, q))
        twin.feed(core.Tick())

    def stop(self, node: Node) -> None:
        if node.alive and node.stopped_at is None:
            self.faults["stop signal"] += 1
            self.trace(f"{node.name} gets a stop signal")
            # A signal that arrives while it is paused is handled after the pause.
            self.at(max(self.time, node.paused_until), lambda: self._stop(node))

    def _stop(self, node: Node) -> None:
        if node.alive and self.time >= node.paused_until and not self.calm:
            node.feed(core.StopAsked())
            node.stopped_at = self.time

    def edit(self) -> None:
        self.faults["operator edit"] += 1
        self.anew = False
        rng, db = self.rng, self.db.db
        ids = [r[0] for r in db.execute("SELECT instance_id FROM bot_instances")]
        live = [n.name for n in self.nodes if n.alive]
        choice = rng.random()
        try:
            if choice < 0.15:
                db.execute("UPDATE bot_leases SET paused = NOT paused")
                self.trace("operator: pauses or resumes")
            elif choice < 0.18:
                db.execute("UPDATE bot_leases SET holder = NULL")
                self.trace("operator: takes the holder out of the lease")
            elif choice < 0.3:
                self.by_hand = True
                db.execute("UPDATE bot_instances SET is_active = FALSE")
                self.trace("operator: all FALSE")
            elif choice < 0.9 and ids:
                who = rng.choice(live if live and rng.random() < 0.7 else ids)
                if rng.random() < 0.5:
                    db.execute("UPDATE bot_instances SET is_active = FALSE")
                done = db.execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = ?", (who,))
                self.by_hand = self.by_hand or not done.rowcount  # it has not registered yet
                self.trace(f"operator: TRUE for {who}")
            elif ids:
                who = rng.choice(ids)
                if not self.only_instances_know:
                    self.by_hand = True  # as good as that, if it was the one that has it
                    db.execute("DELETE FROM bot_instances WHERE instance_id = ?", (who,))
                    self.trace("operator: deletes a row")
        except sqlite3.Error:
            pass
        self.changed(core.Woken())

    def fail_over(self) -> None:
        """The database comes back as another one, without its last commits."""
        self.faults["database failed over"] += 1
        fitting: list[bytes] = []
        if self.snapshots:
            age = self.rng.choice([0.0, 1.0, 5.0])
            fitting = [s for t, s in self.snapshots if t <= self.time - age]
        self.come_back(fitting[-1] if fitting else None)

    def forget(self, verb: core.Verb, image: bytes) -> None:
        """It waited for no disk, and a crash of the server takes it back, unless something was written since, which was
        waited for. It is the same server afterwards, and on the same timeline."""
        if self.rng.random() > 0.7:
            return
        file, written, origin = self.db.db, self.db.db.total_changes, self.db.origin

        def crash() -> None:
            if not self.calm and (file.total_changes, self.db.origin) == (written, origin):
                self.faults[f"{verb} lost"] += 1
                file.deserialize(image)
                self.trace(f"the database crashes, and has not heard of the {verb}")
                if self.rng.random() < 0.5:  # whoever is connected anew looks, but not at once
                    self.changed(core.Woken())

        self.at(self.time + self.rng.choice([0.0, 0.0005, 0.01, 0.2]), crash)

    def hide_the_ttl(self, node: Node) -> None:
        """Nobody but the row knows how long its trust lasts, and the row goes."""
        if not self.calm:
            self.cut(node, 30)
            self.delete_the_leases()
            self.move_on(node)

    def lose_what_comes(self, node: Node) -> None:
        """What it asked for is slow, another one comes first, and the database forgets that."""
        awake = self.awake_beside(node)
        if self.calm or not awake or self.rng.random() > 0.1:
            return
        self.faults["database failed over"] += 1
        before = self.db.db.serialize()
        node.slow_until = self.time + 0.7 * node.timing.attempt
        other = self.rng.choice(awake)
        other.quick_until = node.slow_until
        self.db.db.execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = ?", (other.name,))
        self.at(self.time + 0.001, lambda: other.feed(core.Woken()))

        self.at(self.time + 0.6 * node.timing.attempt, lambda: self.come_back(before))

    def come_back(self, image: bytes | None) -> None:
        """The database, as another one."""
        if image is not None:
            self.db.db.deserialize(image)
        self.db.origin += "+"
        self.anew = False
        self.trace("the database fails over")

    def snapshot(self) -> None:
        self.snapshots.append((self.time, self.db.db.serialize()))
        if not self.calm:
            self.at(self.time + 0.7, self.snapshot)

    def disturb(self) -> None:
        if self.calm:
            return
        rng, plan = self.rng, self.plan
        node = rng.choice(self.nodes)
        options: list[Callable[[], Any]] = [self.deploy_another, lambda: self.stop_one_of_several(node)]
        if plan.partitions:
            options += [lambda: self.cut(node, rng.choice([1, 5, 30]))] * 2
        if plan.crashes:
            options += [lambda: self.crash(node)] * 2
        if plan.pauses:
            options += [lambda: self.pause(node)] * 3
        if plan.sleeps:
            options += [lambda: self.sleep(node)] * 2
        if plan.snapshots:
            options += [lambda: self.stop_the_clock(node), lambda: self.copy(node)]
        if plan.clock_steps:
            options.append(self.step_the_clock)
        if plan.operator:
            options += [self.edit] * 2
        if plan.vandal:
            options += [self.delete_the_leases, self.empty_the_database]
        if plan.failover:
            options.append(self.fail_over)
        rng.choice(options)()
        self.at(self.time + rng.choice([0.05, 0.5, 2.0, 6.0]), self.disturb)

    # A whole run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.close()

    def close(self) -> None:
        """The database is another world's afterwards."""
        Database.free.append(self.db)

    def _run(self) -> None:
        if self.plan.failover:
            self.snapshot()
        for _ in range(self.plan.nodes):
            self.at(self.time + self.rng.choice([0.0, 0.0, 1.0, 8.0]), self.deploy)
        self.at(self.time + 0.5, lambda: self.disturb() if self.nodes else self.at(self.time + 9, self.disturb))
        self.run_until(self.time + self.plan.length)
        if self.plan.settles:
            self.settle()

    def bound(self) -> float:
        """From the last fault to exactly one at work: see docs/design.md, "How long it takes"."""
        t = max(self.plan.timings, key=lambda t: t.ttl)
        return 5.5 * t.ttl * (1 + t.rho) + t.lock_delay + 2 * t.stop_grace

    def settle(self) -> None:
        """Faults end; exactly one must work in bounded time, and go on to."""
        self.calm = True
        self.trace("calm")
        for node in self.nodes:
            node.cut_until = 0.0
            if node.paused_until > self.time:
                node.paused_until = max(self.time, node.asleep_until)
                self.at(node.paused_until + 2e-6, node.resume)
        # until the last ones have woken and been restarted
        self.run_until(max([self.time, *(n.asleep_until for n in self.nodes)]) + 5.001)
        if not any(n.alive and not n.state.stopping for n in self.nodes):
            self.deploy()
            self.run_until(self.time + 1)
        self.db.db.execute("UPDATE bot_leases SET paused = FALSE")
        rows = self.db.db.execute("SELECT count(*) FROM bot_instances WHERE is_active").fetchone()
        if rows[0] == 0 and self.by_hand and not self.anew:
            # The operator wanted nobody to run. Now he wants somebody. (Where he has never said so, an assignment that
            # is lost is a fault, and nobody mends it.)
            who = next(n for n in self.nodes if n.alive and not n.state.stopping)
            done = self.db.db.execute("UPDATE bot_instances SET is_active = TRUE WHERE instance_id = ?", (who.name,))
            if done.rowcount == 0:
                self.deploy()
        # Within the bound one is at work, and then the same one for three ttl. (Handovers may come before.)
        begun = since = self.time
        bound, ttl = begun + self.bound(), max(t.ttl for t in self.plan.timings)
        only = self.running.copy()
        while len(only) != 1 or self.time - since < 3 * ttl:
            self.run_until(self.time + 0.1 * ttl)
            if self.running != only:
                only, since = self.running.copy(), self.time
            if (since if only else self.time) > bound:
                raise Violation(f"seed {self.seed}: {len(only)} at work {self.bound():.1f} s after the last fault")
        self.recovery = since - begun
        working = [n.name for n in self.nodes if n.alive and n.state.phase is core.Phase.WORKING]
        if len(working) != 1:
            raise Violation(f"seed {self.seed}: {working} believe that they work")
